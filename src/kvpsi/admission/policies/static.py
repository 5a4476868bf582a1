"""Always as many answers at once."""

from __future__ import annotations

from typing import Any, ClassVar

from kvpsi.admission.policies.base import Load, Verdict
from kvpsi.errors import UsageError


class Static:
    """A number that somebody chose, whatever happens; None: as many as there are places."""

    name: ClassVar[str] = "static"
    foresees: ClassVar[bool] = False

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise UsageError(f"A limit of {limit} answers at once answers nobody; give 1 or more.")
        self.limit = limit

    def decide(self, load: Load, state: Any) -> tuple[Verdict, Any]:
        """See `AdmissionPolicy`."""
        limit = load.parallel if self.limit is None else min(self.limit, load.parallel)
        return Verdict(limit, f"always {limit} at once"), state
