"""What the headers of a request say of how urgent it is, until when it is wanted, and whose it is.

As their standards demand, a value that makes no sense is taken for none.
"""

from __future__ import annotations

import re

from fastapi import Request

from kvpsi.admission.queue import USUAL_URGENCY

_URGENCY = re.compile(r"(?:^|,)\s*u=([0-7])\s*(?=[,;]|$)")
_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?([0-9]{1,6}(?:\.[0-9]{1,3})?)\"?\s*(?=[,;]|$)", re.IGNORECASE)


def urgency_of(http: Request) -> int:
    """The ``u`` of ``Priority: u=1``: 0 (most urgent) to 7, usually 3. Source: RFC 9218, section 4.1."""
    found = _URGENCY.search(http.headers.get("priority", ""))
    return int(found[1]) if found else USUAL_URGENCY


def wait_s_of(http: Request) -> float | None:
    """Seconds that the client is willing to wait, from ``Prefer: wait=30``. Source: RFC 7240, section 4.3."""
    found = _WAIT.search(",".join(http.headers.getlist("prefer")))
    return float(found[1]) if found else None


def flow_of(http: Request) -> str:
    """Whose request it is: the API key's, or without one the client's address."""
    kind, _, key = http.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return f"key {key.strip()}"
    if key := http.headers.get("x-api-key", ""):
        return f"key {key}"
    return f"address {http.client.host if http.client else ''}"
