"""What a governor knows of the others: it tells them of its own cache, and puts together what they told."""

from __future__ import annotations

from kvpsi.governor.law import CREDIT_S, State
from kvpsi.governor.peers import Peers, Record, folder_named, open_peers
from kvpsi.governor.shares import Claim, Fellows, ShareSettings
from kvpsi.pressure.reading import Reading
from kvpsi.status import CacheStatus

_EXCHANGE_S = 0.2
_STALE_S = 3.0
_GIVEN_S = CREDIT_S + 0.5
_PEAK_S = 5.0
_STEP_SHARE = 0.05
_REST_SHARE = 0.01


class Sharing:
    """One cache among others. Used by the governor's thread.

    What a cache wants is what it used at most lately, and a step more: so it is given room as it takes it, and one that
    does not take it holds nobody up.

    Args:
        settings: its weight and priority.
        peers: the others.
    """

    def __init__(self, settings: ShareSettings, peers: Peers) -> None:
        self.settings = settings
        self._peers = peers
        self._exchanged_s: float | None = None
        self._published: Claim | None = None
        self._published_returned = 0
        self._records: tuple[Record, ...] = ()
        self._returned: dict[str, int] = {}
        self._given: tuple[tuple[float, int, int], ...] = ()
        self._peaks = (0, 0)
        self._peak_since_s = self._rose_s = float("-inf")

    def look(self, reading: Reading, cache: CacheStatus, state: State) -> Fellows | None:
        """Who shares the tightest limit; None if nobody does."""
        now = reading.time_s
        self._note_use(now, cache)
        own = self._claim(now, cache, state)
        if self._published is None or self._exchanged_s is None or now - self._exchanged_s >= _EXCHANGE_S:
            self._exchange(reading, own, cache.returned_bytes)
        scope = reading.headroom.scope
        others = tuple(
            record.claim for record in self._records if scope in record.scopes and now - record.time_s < _STALE_S
        )
        if not others or self._published is None:
            return None
        self._given = tuple(each for each in self._given if now - each[0] < _GIVEN_S)
        given_bytes = max(0, cache.returned_bytes - self._published_returned)
        return Fellows(self.settings, own, self._published, others, given_bytes, self._given)

    def close(self) -> None:
        """Tell the others that there is one less."""
        self._peers.close()

    def _exchange(self, reading: Reading, own: Claim, returned_bytes: int) -> None:
        now = reading.time_s
        scopes = tuple(room.scope for room in reading.headrooms or (reading.headroom,))
        self._records = tuple(self._peers.exchange(Record(now, scopes, own, returned_bytes)))
        self._published, self._published_returned, self._exchanged_s = own, returned_bytes, now
        before, self._returned = self._returned, {each.name: each.returned_bytes for each in self._records}
        more = sum(max(0, now_bytes - before.get(name, now_bytes)) for name, now_bytes in self._returned.items())
        if more:
            self._given = (*self._given, (now, more, reading.headroom.available_bytes))

    def _note_use(self, now_s: float, cache: CacheStatus) -> None:
        """The most that was used in the last five to ten seconds, and when it was more than ever in these."""
        if now_s - self._peak_since_s >= _PEAK_S:
            self._peaks, self._peak_since_s = (cache.used_bytes, self._peaks[0]), now_s
        if cache.used_bytes > max(self._peaks):
            self._rose_s = now_s
        self._peaks = (max(self._peaks[0], cache.used_bytes), self._peaks[1])

    def _claim(self, now_s: float, cache: CacheStatus, state: State) -> Claim:
        allowance, peak = state.allowance, max(self._peaks)
        limit = cache.capacity_bytes if state.limit_bytes is None else state.limit_bytes
        step = _STEP_SHARE if now_s - self._rose_s < _PEAK_S else _REST_SHARE
        demand = min(cache.capacity_bytes, peak + int(step * cache.capacity_bytes))
        lowest = cache.floor_bytes
        if allowance.left_bytes is not None:
            lowest = max(lowest, allowance.level_bytes - int(allowance.left_bytes))
        return Claim(
            used_bytes=cache.used_bytes,
            held_bytes=max(cache.used_bytes, min(peak, limit)),
            floor_bytes=cache.floor_bytes,
            demand_bytes=demand,
            givable_bytes=max(0, cache.used_bytes - lowest),
            weight=self.settings.weight,
            priority=self.settings.priority,
        )


def open_sharing(settings: ShareSettings | None = None) -> Sharing | None:
    """Share with those whose records lie in the folder that the settings name.

    None if nobody can be known there; unless that was asked for there was a warning.
    """
    settings = settings or ShareSettings()
    peers = open_peers(folder_named(settings.folder))
    return Sharing(settings, peers) if peers is not None else None
