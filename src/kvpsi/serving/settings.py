"""How requests share one model: the options of the engine, and what makes no sense."""

from __future__ import annotations

from dataclasses import dataclass

import llama_cpp

from kvpsi.admission import AdmissionPolicy
from kvpsi.errors import UsageError
from kvpsi.serving.step import EVEN_PIECE_TOKENS


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How requests share the context.

    Attributes:
        parallel: answers at once.
        most_waiting: requests that may wait beside them.
        chunk_beside: tokens of prompts in one decode while somebody's answer is being written.
        admission: how many of them are begun at once; None: `kvpsi.admission.policies.Adaptive`.
        stretch: how much longer answers may take while prompts are read; 0: answers and prompts simply take turns.
        least_idle_s: for which nobody has been answering a conversation before it is parked, unless memory is short.
        heals: whether what was forgotten is read again while nobody is being answered and there is room.
    """

    parallel: int = 8
    most_waiting: int = 64
    chunk_beside: int = EVEN_PIECE_TOKENS
    admission: AdmissionPolicy | None = None
    stretch: float = 2.0
    least_idle_s: float = 10.0
    heals: bool = True

    def __post_init__(self) -> None:
        most = int(llama_cpp.llama_max_parallel_sequences()) - 1
        if not 1 <= self.parallel <= most:
            raise UsageError(f"{self.parallel} answers at once cannot be; give 1 to {most} with --parallel.")
        if self.most_waiting < 0:
            raise UsageError(f"A queue for {self.most_waiting} requests cannot be; give 0 or more with --queue.")
        if self.chunk_beside < 1:
            raise UsageError("chunk_beside must be at least 1, or no prompt is ever read beside an answer.")
        if self.stretch != 0 and not 1.05 <= self.stretch <= 100:
            raise UsageError(
                f"A pace of {self.stretch:g} cannot be kept: answers have to wait a little while prompts are read; "
                "give 1.05 or more with --pace, or 0 to read them as they come."
            )
