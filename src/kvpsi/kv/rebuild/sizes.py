"""Which size a rebuilt context should have: pure functions of numbers, no llama.cpp and no clock."""

from __future__ import annotations

from dataclasses import dataclass

from kvpsi.errors import UsageError

CELLS_STEP = 256
"""llama.cpp rounds the size of a context up to a multiple of this, in cells."""


@dataclass(frozen=True, slots=True)
class RebuildSettings:
    """How often and in which steps a context may be rebuilt.

    Attributes:
        min_interval_s: least time from one rebuild to the next that shrinks for the governor's sake. What the user
            asks for, and growing for tokens that would otherwise be forgotten, does not wait.
        min_step_share: least share of the capacity by which the size changes. Less only where a whole step would
            make tokens be forgotten that the limit leaves room for, and at either end.
    """

    min_interval_s: float = 2.0
    min_step_share: float = 0.25

    def __post_init__(self) -> None:
        if self.min_interval_s < 0:
            raise UsageError(f"min_interval_s is {self.min_interval_s}, but a time is not negative; use 0 or more.")
        if not 0 < self.min_step_share <= 1:
            raise UsageError(f"min_step_share is {self.min_step_share}; give a share above 0 and at most 1.")

    def step_cells(self, n_cells: int) -> int:
        """Cells of the least step, for a context that had ``n_cells`` cells at first."""
        return round_up(int(self.min_step_share * n_cells))


@dataclass(frozen=True, slots=True)
class Sizes:
    """A context as it is and what it may become, all in cells.

    Attributes:
        n_cells: size at first, never exceeded.
        floor_cells: the least size.
        step_cells: least change of the size that is worth a rebuild.
        committed_cells: size now.
        used_cells: cells that hold a token.
        limit_cells: the governor's limit.
        cap_cells: the user's limit.
    """

    n_cells: int
    floor_cells: int
    step_cells: int
    committed_cells: int
    used_cells: int
    limit_cells: int
    cap_cells: int

    @property
    def allowed_cells(self) -> int:
        """The tighter of the two limits, never below the floor."""
        return max(min(self.limit_cells, self.cap_cells), self.floor_cells)

    @property
    def user_wants_less(self) -> bool:
        """Whether the user's limit alone asks for a smaller context."""
        return self.committed_cells > max(self.cap_cells, self.floor_cells)

    def fitting(self, cells: int) -> int:
        """The largest size of a context that has at most so many cells, but not less than the floor."""
        if cells >= self.n_cells:
            return self.n_cells
        return max(cells // CELLS_STEP * CELLS_STEP, self.floor_cells)


def round_up(cells: int) -> int:
    """The smallest size of a context that has at least so many cells."""
    return -(-cells // CELLS_STEP) * CELLS_STEP


def smaller_cells(sizes: Sizes, *, too_soon: bool) -> int | None:
    """The size in cells to shrink to now; None if that is not due.

    Args:
        too_soon: the last rebuild was so recently that only the user may ask for another one.
    """
    if sizes.committed_cells <= sizes.allowed_cells:
        return None
    target = sizes.fitting(sizes.allowed_cells)
    if sizes.user_wants_less:
        return target
    return None if too_soon else min(target, _whole_step_down(sizes, target))


def _whole_step_down(sizes: Sizes, target: int) -> int:
    """The size after a whole step, or a larger one that forgets nothing that ``target`` has room for."""
    stepped = sizes.fitting(max(0, sizes.committed_cells - sizes.step_cells))
    if round_up(sizes.used_cells) <= target:  # nothing need be forgotten now, nor for a while
        return max(stepped, round_up(sizes.used_cells + CELLS_STEP))
    return stepped


def reachable_cells(sizes: Sizes) -> int:
    """The size in cells to which the context could grow, with the copy of its tokens beside it for a moment.

    The size as it is where there is no room for a worthwhile step.
    """
    by_memory = sizes.n_cells if sizes.limit_cells >= sizes.n_cells else sizes.limit_cells - sizes.used_cells
    user_limit = sizes.fitting(sizes.cap_cells)
    reachable = min(sizes.fitting(by_memory), user_limit)
    step = min(sizes.step_cells, user_limit - sizes.committed_cells)
    worthwhile = reachable > sizes.committed_cells and reachable - sizes.committed_cells >= step
    return reachable if worthwhile else sizes.committed_cells


def larger_cells(sizes: Sizes, wanted: int) -> int:
    """The size in cells to grow to, a step at least, so that ``wanted`` cells fit if that can be reached."""
    return min(reachable_cells(sizes), round_up(max(wanted, sizes.committed_cells + sizes.step_cells)))
