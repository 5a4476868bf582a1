"""Decide: a pure control law, and the thread that runs it."""

from kvpsi.governor.adapt import AdaptSettings
from kvpsi.governor.governor import Governed, Governor
from kvpsi.governor.guards import GuardSettings
from kvpsi.governor.law import Decision, LawSettings, State, decide
from kvpsi.governor.shares import ShareSettings
from kvpsi.status import CacheStatus

__all__ = [
    "AdaptSettings",
    "CacheStatus",
    "Decision",
    "Governed",
    "Governor",
    "GuardSettings",
    "LawSettings",
    "ShareSettings",
    "State",
    "decide",
]
