"""The records by which governed models of a simulated board know each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvpsi.governor.peers import Record
from kvpsi.sim.memory import Group


class SimPeers:
    """`kvpsi.governor.peers.Peers` of a simulated board: records of processes that were killed are gone with them."""

    def __init__(self, records: dict[str, tuple[Group, Record]], group: Group) -> None:
        self._records, self._group = records, group

    def exchange(self, record: Record) -> Sequence[Record]:
        """See `kvpsi.governor.peers.Peers`."""
        name = self._group.name
        self._records[name] = (self._group, replace(record, name=name))
        return [each for group, each in self._records.values() if group is not self._group and group.alive]

    def close(self) -> None:
        """Be gone."""
        self._records.pop(self._group.name, None)
