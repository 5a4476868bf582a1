"""The memory of a simulated board, and the kernel that hands it out, takes it back, and kills.

What is modelled, and what decides: page cache that nobody uses goes first, and what was read of mapped files and not
dropped and read again since (mm/workingset.c: only by that it is known to be in use); then, if there is swap, memory
that was never written to, and memory that is not touched any more; then what is in use, files and memory of processes
at 140 to 60 (``vm.swappiness`` is 60). Whoever uses what is gone waits until it is back; whoever takes memory when
there is none waits for room to be made (direct reclaim). When nothing can be taken back, the process with most of it
is killed (mm/oom_kill.c: resident and swapped). Not modelled: slab, huge pages, NUMA, background reclaim.

Constants were fitted to real runs; see `kvpsi.sim.validation`.

All bytes are moved at once, and then waited for, so that a process which is interrupted leaves nothing half done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any, TypeAlias

import simpy

from kvpsi.sim.boards import MIB, Board
from kvpsi.sim.psi import StallCounter

FILE_SHARE = 0.7
ACTIVATED_SHARE = 0.5
"""Of what was dropped and read again, so much is known to be in use; the rest may go again."""
MISSES, MISSES_WITH_SWAP = 0.55, 1.65
"""Bytes that are read for each that has no room, each time that all is used."""
SPARE_SHARE = 0.032
"""Of memory, so much stays free where the kernel swaps."""
_DROP_BYTES_S = 4e9
_STEP_BYTES = 4 * MIB

Events: TypeAlias = Generator[simpy.Event, Any, Any]
"""What takes simulated time."""


class KilledError(Exception):
    """The kernel killed this process."""


def until_killed(work: Events) -> Events:
    """What a process does, which is over when the kernel kills it."""
    try:
        yield from work
    except KilledError:
        return
    except simpy.Interrupt as interrupt:
        if not isinstance(interrupt.cause, KilledError):
            raise


class File:
    """A file that is mapped and read over and over, such as a model's weights.

    Attributes:
        size_bytes: of all of it.
        resident_bytes: in memory.
        active_bytes: of these, what was dropped once and read again, by which the kernel knows that it is in use.
        dropped_bytes: were there once, so that whoever needs them again waits for memory; the rest was never read.
    """

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name, self.size_bytes = name, size_bytes
        self.resident_bytes = self.active_bytes = self.dropped_bytes = 0

    @property
    def inactive_bytes(self) -> int:
        """In memory, and for all that the kernel knows needed only once."""
        return self.resident_bytes - self.active_bytes


class Group:
    """A process, with its own memory: ``warm`` is touched all the time, ``cold`` not any more, ``zero`` was never used
    since it was filled with zeros; ``…_out`` is the same in swap.

    Attributes:
        name: whose.
        files: that it has mapped.
        stall: of this process.
        process: simulates it; None before it begins.
        alive: false once it has ended.
    """

    def __init__(self, name: str, env: simpy.Environment) -> None:
        self.name = name
        self.warm_bytes = self.cold_bytes = self.zero_bytes = 0
        self.warm_out_bytes = self.cold_out_bytes = self.zero_out_bytes = 0
        self.files: list[File] = []
        self.stall = StallCounter(lambda: float(env.now))
        self.process: simpy.Process | None = None
        self.alive = True

    @property
    def anon_bytes(self) -> int:
        """Its own memory that is not in swap."""
        return self.warm_bytes + self.cold_bytes + self.zero_bytes

    @property
    def swapped_bytes(self) -> int:
        """Its own memory that is in swap."""
        return self.warm_out_bytes + self.cold_out_bytes + self.zero_out_bytes

    @property
    def resident_bytes(self) -> int:
        """As `ps` counts it, mapped files included."""
        return self.anon_bytes + sum(file.resident_bytes for file in self.files)


class Memory:
    """All memory of one board.

    Attributes:
        groups: processes that are alive.
        stall: of the whole board.
        killed: names, in order.
        idle_file_bytes: page cache that nobody uses.
        refaulted_bytes: of files, read again after they were dropped.
        peak_bytes: most that was ever used.
    """

    def __init__(self, env: simpy.Environment, board: Board) -> None:
        self.env, self.board = env, board
        self.groups: list[Group] = []
        self.stall = StallCounter(lambda: float(env.now))
        self.killed: list[str] = []
        self.idle_file_bytes = 0
        self.refaulted_bytes = 0
        self.peak_bytes = 0

    def group(self, name: str) -> Group:
        """A new process."""
        group = Group(name, self.env)
        self.groups.append(group)
        return group

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def files(self) -> list[File]:
        """All that are mapped, each once."""
        return list({id(file): file for group in self.groups for file in group.files}.values())

    @property
    def swapped_bytes(self) -> int:
        """In swap, before it is compressed."""
        return sum(group.swapped_bytes for group in self.groups)

    @property
    def usage_bytes(self) -> int:
        """Of the board's memory, all that is not free."""
        files = sum(file.resident_bytes for file in self.files) + self.idle_file_bytes
        return self.board.system_bytes + self._zram_bytes + files + sum(group.anon_bytes for group in self.groups)

    @property
    def free_bytes(self) -> int:
        """What nobody has."""
        return self.board.memory_bytes - self.usage_bytes

    @property
    def _zram_bytes(self) -> int:
        """What compressed swap takes itself; zeros take nothing there."""
        if self.board.swap is None:
            return 0
        return int(self.board.swap.ram_share * sum(g.warm_out_bytes + g.cold_out_bytes for g in self.groups))

    @property
    def _spare_bytes(self) -> int:
        """What stays free where the kernel can swap."""
        return int(SPARE_SHARE * self.board.memory_bytes) if self.board.swap is not None else 0

    @property
    def _swap_free_bytes(self) -> int:
        return max(0, self.board.swap.size_bytes - self.swapped_bytes) if self.board.swap else 0

    # -- what processes do ---------------------------------------------------------------------------------------

    def take(self, group: Group, n_bytes: int, *, zero: bool = False) -> Events:
        """Get so much, and wait until there is room for it.

        Raises:
            KilledError: there is none, and this process was chosen.
        """
        while n_bytes > 0:
            part = min(n_bytes, _STEP_BYTES)
            seconds = self._free_up(group, part)
            if zero:
                group.zero_bytes += part
            else:
                group.warm_bytes += part
            n_bytes -= part
            yield from self._waiting(group, seconds)

    def give(self, group: Group, n_bytes: int) -> None:
        """Give so much of what is used back at once, as much of it in swap as lies there of all."""
        from_swap, kept = _parts(n_bytes, group.warm_out_bytes, group.warm_bytes)
        group.warm_bytes -= kept
        group.warm_out_bytes -= from_swap

    def warm_up(self, group: Group, n_bytes: int) -> Events:
        """So much that was not used is used from now on: first what is not touched any more, then what never was."""
        from_swap, kept = _parts(n_bytes, group.cold_out_bytes, group.cold_bytes)
        group.cold_bytes -= kept
        group.cold_out_bytes -= from_swap
        group.warm_bytes += kept
        group.warm_out_bytes += from_swap
        zero_out, zero = _parts(n_bytes - kept - from_swap, group.zero_out_bytes, group.zero_bytes)
        group.zero_bytes -= zero
        group.zero_out_bytes -= zero_out
        group.warm_bytes += zero
        yield from self.take(group, zero_out)

    def cool_down(self, group: Group, n_bytes: int) -> None:
        """So much is not used any more, but not given back either."""
        from_swap, kept = _parts(n_bytes, group.warm_out_bytes, group.warm_bytes)
        group.warm_bytes -= kept
        group.warm_out_bytes -= from_swap
        group.cold_bytes += kept
        group.cold_out_bytes += from_swap

    def touch(self, group: Group) -> Events:
        """Use all of one's warm memory once, and wait for what is in swap; some of it may have to go there again."""
        swap, left = self.board.swap, group.warm_out_bytes
        while swap is not None and (part := min(left, group.warm_out_bytes, _STEP_BYTES)) > 0:
            left -= part
            group.warm_out_bytes -= part
            seconds = self._free_up(group, part)
            group.warm_bytes += part
            yield from self._waiting(group, seconds + part / swap.read_bytes_s)

    def read(self, group: Group, file: File) -> Events:
        """Use all of a file once, and wait for what is not there.

        What has no room is read and dropped again, at times with what would have been used next. To read what never
        was in memory takes as long, but is no stall.
        """
        missing = file.size_bytes - file.resident_bytes
        if missing <= 0:
            return
        new = missing - file.dropped_bytes
        room = max(0, self.free_bytes - self._spare_bytes)
        seconds = 0.0 if room >= missing else self._reclaim(missing - room, sparing=file)[1]
        found = min(missing, max(0, self.free_bytes - self._spare_bytes))
        file.resident_bytes += found
        file.active_bytes += int(ACTIVATED_SHARE * max(0, found - new))
        file.dropped_bytes = missing - found
        self._note_peak()
        misses = MISSES if self.board.swap is None else MISSES_WITH_SWAP
        again = max(0, found - new) + min(file.size_bytes - found, int(misses * (missing - found)))
        self.refaulted_bytes += again
        if self.board.swap is not None:  # room for each is made anew, and memory of processes is looked at for it, too
            seconds += again / _DROP_BYTES_S
        yield self.env.timeout(min(new, found) / self.board.read_bytes_s)
        yield from self._waiting(group, seconds + again / self.board.read_bytes_s)

    def map(self, group: Group, file: File) -> None:
        """Map a file, of which nothing is there yet unless another has mapped it."""
        group.files.append(file)

    def end(self, group: Group) -> None:
        """A process is over: its memory is free, its files are page cache that nobody uses."""
        before = self.files
        group.alive = False
        self.groups.remove(group)
        group.warm_bytes = group.cold_bytes = group.zero_bytes = 0
        group.warm_out_bytes = group.cold_out_bytes = group.zero_out_bytes = 0
        still = {id(file) for file in self.files}
        for file in before:
            if id(file) not in still:
                self.idle_file_bytes += file.resident_bytes
                file.resident_bytes = file.active_bytes = file.dropped_bytes = 0

    # -- what the kernel does ------------------------------------------------------------------------------------

    def _free_up(self, group: Group, n_bytes: int) -> float:
        """Have so much free, whoever has to go for it; the seconds that it takes.

        Raises:
            KilledError: this process had to.
        """
        seconds = 0.0
        while (missing := n_bytes + self._spare_bytes - self.free_bytes) > 0:
            freed, took_s = self._reclaim(missing)
            seconds += took_s
            if not freed:
                if n_bytes <= self.free_bytes:
                    break
                self._kill()
                if not group.alive:
                    raise KilledError(group.name)
        self.peak_bytes = max(self.peak_bytes, self.usage_bytes + n_bytes)
        return seconds

    def _reclaim(self, n_bytes: int, *, sparing: File | None = None) -> tuple[int, float]:
        """Free so much, as far as that can be done: the bytes, and the seconds that it takes."""
        before = self.free_bytes

        def left() -> int:
            return n_bytes - (self.free_bytes - before)

        dropped = min(n_bytes, self.idle_file_bytes)
        self.idle_file_bytes -= dropped
        zeros = swapped = 0
        if left() > 0:
            dropped += self._drop("inactive", left(), sparing)
            zeros = self._swap_out("zero", left())
            swapped = self._swap_out("cold", left())
            dropped += self._drop("active", int(self._file_share * left()), sparing)
            # a file that is read makes room of its own pages first, and of memory only as far as that is due
            swapped += self._swap_out("warm", int((1 - FILE_SHARE) * left()) if sparing else left())
            dropped += self._drop("active", left(), sparing)
        seconds = dropped / _DROP_BYTES_S
        if self.board.swap is not None:
            seconds += zeros / self.board.swap.zero_bytes_s + swapped / self.board.swap.write_bytes_s
        return self.free_bytes - before, seconds

    @property
    def _file_share(self) -> float:
        """What of the pages that go is of files, when all are in use: both are looked at in proportion to how many
        there are, weighted 140 to 60 (``get_scan_count`` in mm/vmscan.c)."""
        if not self._swap_free_bytes:
            return 1.0
        files = FILE_SHARE * sum(file.active_bytes for file in self.files)
        return files / max(1.0, files + (1 - FILE_SHARE) * sum(group.warm_bytes for group in self.groups))

    def _swap_out(self, kind: str, n_bytes: int) -> int:
        """Move memory of processes to swap until so much is free, of each in proportion; the bytes that were moved."""
        if n_bytes <= 0 or self.board.swap is None:
            return 0
        there = [int(getattr(group, f"{kind}_bytes")) for group in self.groups]
        freed_share = 1.0 if kind == "zero" else 1 - self.board.swap.ram_share
        wanted = min(sum(there), self._swap_free_bytes, int(n_bytes / freed_share) + 1)
        moved = 0
        for group, has in zip(self.groups, there, strict=True) if wanted > 0 else ():
            part = min(has, -(-wanted * has // sum(there)), wanted - moved)
            setattr(group, f"{kind}_bytes", has - part)
            setattr(group, f"{kind}_out_bytes", getattr(group, f"{kind}_out_bytes") + part)
            moved += part
        return moved

    def _drop(self, kind: str, n_bytes: int, sparing: File | None) -> int:
        """Drop pages of mapped files, of each in proportion; the bytes."""
        files = [file for file in self.files if file is not sparing]
        there = [int(getattr(file, f"{kind}_bytes")) for file in files]
        wanted = min(n_bytes, sum(there))
        dropped = 0
        for file, has in zip(files, there, strict=True) if wanted > 0 else ():
            part = min(has, -(-wanted * has // sum(there)), wanted - dropped)
            file.resident_bytes -= part
            file.dropped_bytes += part
            if kind == "active":
                file.active_bytes -= part
            dropped += part
        return dropped

    def _kill(self) -> None:
        """Kill the process that has most."""
        victim = max(self.groups, key=lambda group: group.resident_bytes + group.swapped_bytes)
        self.killed.append(victim.name)
        self.end(victim)
        if victim.process is not None and victim.process is not self.env.active_process and victim.process.is_alive:
            victim.process.interrupt(KilledError(victim.name))

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.usage_bytes)

    @contextlib.contextmanager
    def _stalled(self, group: Group) -> Iterator[None]:
        for counter in (self.stall, group.stall):
            counter.begin()
        try:
            yield
        finally:
            for counter in (self.stall, group.stall):
                counter.end()

    def _waiting(self, group: Group, seconds: float) -> Events:
        """Wait for memory."""
        if seconds > 0:
            with self._stalled(group):
                yield self.env.timeout(seconds)


def _parts(n_bytes: int, out_bytes: int, kept_bytes: int) -> tuple[int, int]:
    """Of so much, what lies in swap and what in memory, each in proportion."""
    n_bytes = min(n_bytes, out_bytes + kept_bytes)
    from_swap = n_bytes * out_bytes // (out_bytes + kept_bytes) if n_bytes else 0
    return from_swap, n_bytes - from_swap
