"""DECIDE for requests: who waits, in which order, how many are answered at once, and when to come again.

Pure like the control law: no I/O, no threads, and the clock is passed in.
"""

from kvpsi.admission.admission import (
    Admission,
    Places,
    QueueFullError,
    TooLateError,
    TurnedAwayError,
    WaitedTooLongError,
)
from kvpsi.admission.policies import POLICIES, AdmissionPolicy, Load, Pressure, Verdict, policy_named

__all__ = [
    "POLICIES",
    "Admission",
    "AdmissionPolicy",
    "Load",
    "Places",
    "Pressure",
    "QueueFullError",
    "TooLateError",
    "TurnedAwayError",
    "Verdict",
    "WaitedTooLongError",
    "policy_named",
]
