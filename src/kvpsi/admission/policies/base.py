"""What an admission policy sees, and what it decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class Pressure:
    """Shares of the time in which tasks waited for processors, memory and disks (PSI's ``some``), 0 if unknown.

    ``cpu_avg10`` is the kernel's own mean of the first over ten seconds.
    """

    cpu_stall: float = 0.0
    memory_stall: float = 0.0
    io_stall: float = 0.0
    cpu_avg10: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine and the machine are.

    Attributes:
        time_s: now.
        running: answers that are begun.
        writing: those of them that get a token in each decode, the others' prompts are still being read.
        parallel: the most that there are places for.
        waiting: requests in the queue.
        next_wait_s: for how long the one that is to begin next has been waiting.
        token_s: time between two tokens of an answer, while no prompt is read; None before the first.
        first_token_s: from an answer's begin to its first token, for each token of its prompt that was read; None
            before the first.
        pressure: what the kernel says.
    """

    time_s: float
    running: int
    writing: int
    parallel: int
    waiting: int = 0
    next_wait_s: float = 0.0
    token_s: float | None = None
    first_token_s: float | None = None
    pressure: Pressure = Pressure()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many answers may be begun at once, and one short sentence why."""

    limit: int
    reason: str


class AdmissionPolicy(Protocol):
    """Decides from a load and from what it remembers, like the control law: without I/O, and without a clock.

    Attributes:
        name: by which users know it.
        foresees: whether requests that would wait too long are turned away at once.
    """

    name: ClassVar[str]
    foresees: ClassVar[bool]

    def decide(self, load: Load, state: Any) -> tuple[Verdict, Any]:
        """How many now, and what to remember; ``state`` is None at first."""
        ...
