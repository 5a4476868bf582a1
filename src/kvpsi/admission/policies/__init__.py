"""Admission policies, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvpsi.admission.policies.adaptive import Adaptive, AdaptiveSettings
from kvpsi.admission.policies.avg10 import Avg10Gate
from kvpsi.admission.policies.base import AdmissionPolicy, Load, Pressure, Verdict
from kvpsi.admission.policies.static import Static
from kvpsi.errors import UsageError
from kvpsi.units import parse_share


def _static(argument: str) -> AdmissionPolicy:
    if argument and not (argument.isascii() and argument.isdigit()):
        raise UsageError(f"static:{argument} has no number of answers; write it as static:4.")
    return Static(int(argument) if argument else None)


def _adaptive(argument: str) -> AdmissionPolicy:
    if argument:
        raise UsageError(f"adaptive:{argument} is not known: adaptive takes no number.")
    return Adaptive()


POLICIES: Mapping[str, Callable[[str], AdmissionPolicy]] = {
    "adaptive": _adaptive,
    "static": _static,
    "avg10": lambda argument: Avg10Gate(parse_share(argument)) if argument else Avg10Gate(),
}
"""All of them by the name that users know; each is made from what stands behind the colon."""


def policy_named(text: str) -> AdmissionPolicy:
    """The policy that ``adaptive``, ``static``, ``static:4``, ``avg10`` or ``avg10:90%`` means.

    Raises:
        UsageError: there is none.
    """
    name, _, argument = text.strip().partition(":")
    if name not in POLICIES:
        raise UsageError(
            f"There is no admission policy {name!r}; use adaptive, static, static:4, avg10 or avg10:90% with "
            "--admission."
        )
    return POLICIES[name](argument.strip())


__all__ = [
    "POLICIES",
    "Adaptive",
    "AdaptiveSettings",
    "AdmissionPolicy",
    "Avg10Gate",
    "Load",
    "Pressure",
    "Static",
    "Verdict",
    "policy_named",
]
