"""What the engine has done so far."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """What has happened so far."""

    decodes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    finished_by: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0})
    failed: int = 0
    cancelled: int = 0
    pauses: int = 0
    forgotten_tokens: int = 0
    busy_s: float = 0.0
    prompt_s: float = 0.0
