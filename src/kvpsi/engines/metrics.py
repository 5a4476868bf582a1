"""What every engine tells of its memory, as metrics: names, descriptions and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol


class MemoryStatus(Protocol):
    """What every engine tells of its cache and of the memory around it."""

    @property
    def capacity_bytes(self) -> int: ...
    @property
    def committed_bytes(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
    @property
    def limit_bytes(self) -> int: ...
    @property
    def may_hold_bytes(self) -> int: ...
    @property
    def all_may_hold_bytes(self) -> int: ...
    @property
    def headroom_bytes(self) -> int: ...
    @property
    def memory_pressure(self) -> float: ...
    @property
    def concurrency_limit(self) -> int: ...
    @property
    def stall_s(self) -> float: ...
    @property
    def releases(self) -> int: ...
    @property
    def returned_bytes(self) -> int: ...
    @property
    def governed(self) -> bool: ...
    @property
    def reserve_bytes(self) -> int: ...
    @property
    def regrow_bytes(self) -> int: ...


def memory_counters(s: MemoryStatus) -> Iterator[tuple[str, str, float]]:
    """Name, description and value of what every engine counts."""
    yield "kvpsi_releases", "How often cache memory went back to the system.", s.releases
    yield "kvpsi_returned_bytes", "Memory that went back to the system.", s.returned_bytes
    yield "kvpsi_memory_stall_seconds", "Time in which something waited for memory (PSI some).", s.stall_s


def memory_gauges(s: MemoryStatus) -> Iterator[tuple[str, str, float]]:
    """Name, description and value of what every engine has now."""
    yield "kvpsi_kv_virtual_bytes", "The whole cache, as the stock engine would hold it.", s.capacity_bytes
    yield "kvpsi_kv_committed_bytes", "Memory of what is in use of it.", s.committed_bytes
    yield "kvpsi_kv_resident_bytes", "Memory of the cache as the kernel counts it.", s.resident_bytes
    yield "kvpsi_kv_limit_bytes", "What of the cache may hold memory now.", s.limit_bytes
    yield "kvpsi_may_hold_bytes", "What this model may hold beside others; 0: it is alone.", s.may_hold_bytes
    yield "kvpsi_all_may_hold_bytes", "What all of these may hold together.", s.all_may_hold_bytes
    yield "kvpsi_headroom_bytes", "Memory that others could take.", s.headroom_bytes
    yield "kvpsi_memory_pressure", "Share of the last tick in which something waited for memory.", s.memory_pressure
    yield "kvpsi_concurrency_limit", "Answers that may be begun at once.", s.concurrency_limit
    yield "kvpsi_governed", "Whether memory is given back when others need it.", float(s.governed)
    yield "kvpsi_reserve_bytes", "Headroom that is kept free for others.", s.reserve_bytes
    yield "kvpsi_regrow_above_bytes", "Headroom from which on the cache may grow back.", s.regrow_bytes
