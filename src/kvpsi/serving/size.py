"""How large a cache a server begins with."""

from __future__ import annotations

from kvpsi.engines.loading import LoadSettings, Preview, cache_bytes_per_token
from kvpsi.errors import EnvironmentProblem
from kvpsi.governor import LawSettings
from kvpsi.pressure import Headroom
from kvpsi.units import format_bytes

_STEP_CELLS = 256
_LEAST_CELLS = 512
DEFAULT_CELLS = 16384


def fitting_cells(known: Preview, load: LoadSettings, room: Headroom, law: LawSettings) -> tuple[int, str | None]:
    """Cells to begin with, and a sentence if they are fewer than wanted.

    llama.cpp writes over the whole cache when a context is made, so all of it has to fit into the headroom once, though
    it goes back right after.

    Raises:
        EnvironmentProblem: not even a small one fits.
    """
    wanted = wanted_cells(known, load)
    per_cell = max(1, cache_bytes_per_token(known.metadata, load.kv_type))
    spare = max(0, room.available_bytes - law.low_for(room.limit_bytes))
    fits = spare // per_cell // _STEP_CELLS * _STEP_CELLS
    if fits >= wanted:
        raised = f"the cache has room for {wanted} tokens, the next multiple of {_STEP_CELLS} above -c {load.n_ctx}"
        return wanted, raised if 0 < load.n_ctx < wanted else None
    if fits < _LEAST_CELLS:
        raise EnvironmentProblem(
            f"A cache of {_LEAST_CELLS} tokens takes {format_bytes(_LEAST_CELLS * per_cell)}, but only "
            f"{format_bytes(spare)} can be spared beside the reserve of {format_bytes(law.low_for(room.limit_bytes))}; "
            "free memory, lower --reserve, or use --kv-type q8_0."
        )
    return fits, (
        f"the cache has room for {fits} instead of {wanted} tokens at first, as only {format_bytes(spare)} of memory "
        "can be spared; it grows when more are wanted and there is room"
    )


def wanted_cells(known: Preview, load: LoadSettings) -> int:
    """Cells that the cache is to have in the end, in whole steps."""
    wanted = load.n_ctx or max(known.n_ctx_train, DEFAULT_CELLS)
    return -(-wanted // _STEP_CELLS) * _STEP_CELLS
