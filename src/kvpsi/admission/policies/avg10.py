"""The gate of earlier studies: nobody begins while the kernel's mean CPU pressure of ten seconds is high."""

from __future__ import annotations

from typing import Any, ClassVar

from kvpsi.admission.policies.base import Load, Verdict
from kvpsi.errors import UsageError


class Avg10Gate:
    """For comparison. The mean lags by seconds, and while it is high nobody is answered at all.

    Args:
        closes_above: share of the time (0..1) in which tasks wait for a processor.
    """

    name: ClassVar[str] = "avg10"
    foresees: ClassVar[bool] = False

    def __init__(self, closes_above: float = 0.95) -> None:
        if not 0 < closes_above <= 1:
            raise UsageError(f"avg10 is a share of the time: above 0 and at most 100%, not {closes_above:.0%}.")
        self.closes_above = closes_above

    def decide(self, load: Load, state: Any) -> tuple[Verdict, Any]:
        """See `AdmissionPolicy`."""
        avg10 = load.pressure.cpu_avg10
        if avg10 > self.closes_above:
            return Verdict(load.running, f"CPU avg10 is {avg10:.0%}, above {self.closes_above:.0%}"), state
        return Verdict(load.parallel, f"CPU avg10 is {avg10:.0%}"), state
