"""The memory of all boards of a fleet, a tick at a time; arrays have a row for each board.

The same order as in `kvpsi.sim.memory`, but as a balance that holds at every tick: what does not fit goes to swap or,
as far as it is the weights, is dropped; whoever uses it waits for it each time. Where even that is not enough, the
process with most is killed.
"""

from __future__ import annotations

import numpy as np

from kvpsi.hog.worker import TOUCH_EVERY_S
from kvpsi.sim.boards import TOUCH_BYTES_S, Board
from kvpsi.sim.fleet.situation import Floats, Traces
from kvpsi.sim.llms import Llm
from kvpsi.sim.memory import ACTIVATED_SHARE, FILE_SHARE, MISSES, MISSES_WITH_SWAP, SPARE_SHARE

MODEL = -1
"""Stands for the model where a neighbour's number is meant."""


class Memories:
    """All boards are alike, but for their neighbours.

    Args:
        board: each of them.
        llm: the model on each.
        n_boards: how many.
        n_neighbours: on each.
        traces: what these want.

    Attributes:
        neighbour_bytes: what each has, shape [boards, neighbours].
        is_up: whether the model runs, shape [boards], as are all others.
        available_bytes: headroom, as a cgroup's files tell it (`kvpsi.sim.sensing`).
        swapped_bytes: of all processes.
        wait_s: for memory, each time that the model uses all that it has.
        missing_bytes: of the weights, for which there is room, but which have not been read again yet.
        stall_share: of the tick, in which a neighbour waited.
        n_changes: sizes that neighbours wanted so far.
    """

    def __init__(self, board: Board, llm: Llm, n_boards: int, n_neighbours: int, traces: Traces) -> None:
        self.board, self.llm = board, llm
        self.neighbour_bytes = np.zeros((n_boards, n_neighbours))
        self._wanted_bytes = np.zeros((n_boards, n_neighbours))
        self._is_alive = np.ones((n_boards, n_neighbours), dtype=bool)
        self.is_up = np.ones(n_boards, dtype=bool)
        self.available_bytes = np.zeros(n_boards)
        self.swapped_bytes = np.zeros(n_boards)
        self.wait_s = np.zeros(n_boards)
        self.missing_bytes = np.zeros(n_boards)
        self.stall_share = np.zeros(n_boards)
        self.n_changes = 0
        self._weights_bytes = np.full(n_boards, float(llm.weights_bytes))  # in memory, as far as they were used
        self._touched_bytes = np.zeros(n_boards)
        self._active_bytes = np.zeros(n_boards)  # of the weights, known to the kernel to be in use
        self._idle_out_bytes = np.zeros(n_boards)
        self._dropped_bytes = np.zeros(n_boards)
        self._written_s = np.zeros(n_boards)
        self._traces = traces

    def advance(self, now_s: float, tick_s: float, used_bytes: Floats, cache_bytes: Floats) -> list[tuple[int, int]]:
        """One tick.

        Args:
            now_s: at its end.
            tick_s: its length.
            used_bytes: of the cache, what tokens occupy.
            cache_bytes: what the cache holds; more than is used where it gives nothing back.

        Returns:
            who was killed: boards, and the neighbour's number or `MODEL`.
        """
        self._grow(now_s, tick_s)
        written_before_s = self._written_s
        model_out, short = self._balance(used_bytes, cache_bytes)
        room = np.where(self.is_up, self.llm.weights_bytes, 0.0) - self._dropped_bytes
        self._weights_bytes = np.minimum(self._weights_bytes, room)
        self.missing_bytes = room - self._weights_bytes
        misses = MISSES if self.board.swap is None else MISSES_WITH_SWAP
        refault_s = np.minimum(self.llm.weights_bytes, misses * self._dropped_bytes) / self.board.read_bytes_s
        self.wait_s = np.where(self.is_up, refault_s + self._there_and_back_s(model_out), 0.0)
        others_out = self.swapped_bytes - self._idle_out_bytes - model_out
        share = self._there_and_back_s(others_out) / TOUCH_EVERY_S
        share += np.maximum(0.0, self._written_s - written_before_s) / tick_s
        self.stall_share = np.minimum(1.0, share)
        return [(int(board), self._kill(int(board), float(used_bytes[board]))) for board in np.flatnonzero(short > 0)]

    def take_in(self, n_bytes: Floats) -> None:
        """So much of the weights was read again, and stays."""
        self._weights_bytes += n_bytes
        self.missing_bytes -= n_bytes
        self._note_read_again(n_bytes)

    def note_uses(self, times: Floats) -> None:
        """So often the model used all weights; some of what was dropped took the place of processes' memory then."""
        if self.board.swap is not None:
            self._note_read_again((1 - FILE_SHARE) * self._dropped_bytes * times)

    def _note_read_again(self, n_bytes: Floats) -> None:
        self._active_bytes = np.minimum(self.llm.weights_bytes, self._active_bytes + ACTIVATED_SHARE * n_bytes)

    def start(self, board: int) -> None:
        """The model runs again, with its weights read as far as there is room."""
        self.is_up[board] = True
        self._weights_bytes[board] = self.llm.weights_bytes
        self._touched_bytes[board] = self._active_bytes[board] = 0.0

    def _grow(self, now_s: float, tick_s: float) -> None:
        """Have neighbours what they want, no faster than memory can be touched."""
        traces = self._traces
        end = int(np.searchsorted(traces.time_s, now_s, side="right"))
        new = slice(self.n_changes, end)
        # of several for the same neighbour the last one counts, as NumPy has it for repeated indices
        self._wanted_bytes[traces.board[new], traces.neighbour[new]] = traces.size_bytes[new]
        self.n_changes = end
        wanted = np.where(self._is_alive, self._wanted_bytes, 0.0)
        self.neighbour_bytes = np.minimum(wanted, self.neighbour_bytes + TOUCH_BYTES_S * tick_s)

    def _balance(self, used_bytes: Floats, cache_bytes: Floats) -> tuple[Floats, Floats]:
        """Who has to go: of the model's own memory so much, and what is missing even then."""
        board, swap, llm = self.board, self.board.swap, self.llm
        weights = np.where(self.is_up, float(llm.weights_bytes), 0.0)
        active = np.minimum(self._active_bytes, weights)
        own = np.where(self.is_up, used_bytes + llm.runtime_bytes, 0.0)
        warm = own + self.neighbour_bytes.sum(axis=1)
        self._touched_bytes = np.minimum(np.maximum(self._touched_bytes, used_bytes), cache_bytes)
        cold, zero = self._touched_bytes - used_bytes, cache_bytes - self._touched_bytes
        total = board.system_bytes + warm + cold + zero
        spare_bytes = 0.0 if swap is None else SPARE_SHARE * board.memory_bytes
        short = np.maximum(0.0, total + weights + spare_bytes - board.memory_bytes)
        # the same order as `kvpsi.sim.memory.Memory` has
        dropped = np.minimum(short, weights - active)
        short = short - dropped
        zero_out = cold_out = warm_out = np.zeros_like(short)
        ram_share = 0.0 if swap is None else swap.ram_share
        if swap is not None:
            zero_out = np.minimum(np.minimum(zero, short), swap.size_bytes)
            short, left = short - zero_out, swap.size_bytes - zero_out
            cold_out = np.minimum(np.minimum(cold, left), short / (1 - ram_share))
            short, left = short - (1 - ram_share) * cold_out, left - cold_out
            files = FILE_SHARE * active
            due = np.where(left > 0, files / np.maximum(1.0, files + (1 - FILE_SHARE) * warm), 1.0) * short
            warm_out = np.minimum(np.minimum(warm, left), (short - np.minimum(active, due)) / (1 - ram_share))
            short = short - (1 - ram_share) * warm_out
            self._written_s = zero_out / swap.zero_bytes_s + (cold_out + warm_out) / swap.write_bytes_s
        dropped_active = np.minimum(short, active)
        self._dropped_bytes = dropped + dropped_active
        self._idle_out_bytes = zero_out + cold_out
        self.swapped_bytes = self._idle_out_bytes + warm_out
        in_memory = total - self.swapped_bytes + ram_share * (cold_out + warm_out)
        self.available_bytes = board.memory_bytes - in_memory - weights
        missing = short - dropped_active - spare_bytes
        return warm_out * own / np.maximum(1.0, warm), np.where(missing < 1.0, 0.0, missing)

    def _there_and_back_s(self, swapped_bytes: Floats) -> Floats:
        """To have so much from swap, and as much of others written there instead."""
        swap = self.board.swap
        if swap is None:
            return np.zeros_like(swapped_bytes)
        return swapped_bytes * (1 / swap.read_bytes_s + 1 / swap.write_bytes_s)

    def _kill(self, board: int, used_bytes: float) -> int:
        """Kill the process that has most on a board; its number."""
        own = used_bytes + self.llm.runtime_bytes + float(self._weights_bytes[board]) if self.is_up[board] else 0.0
        others = self.neighbour_bytes[board]
        largest = int(np.argmax(others)) if len(others) else MODEL
        if largest == MODEL or own >= others[largest]:
            self.is_up[board] = False
            return MODEL
        self._is_alive[board, largest] = False
        return largest
