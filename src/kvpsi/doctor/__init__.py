"""What this machine can do for kvpsi, as a list of findings, each with what to do about it."""

from kvpsi.doctor.examine import can_govern, examine
from kvpsi.doctor.finding import Finding

__all__ = ["Finding", "can_govern", "examine"]
