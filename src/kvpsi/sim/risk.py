"""What `kvpsi plan` says of a reserve, tried out: how often somebody is killed as a neighbour grows as is assumed.

The case that is planned for, and nothing better: the cache has taken all but the reserve, nothing can be swapped, the
weights are locked, and the model is at work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from kvpsi.governor.law import LawSettings
from kvpsi.sim import neighbours
from kvpsi.sim.boards import MIB, Board
from kvpsi.sim.controllers import Law
from kvpsi.sim.conversation import Turn
from kvpsi.sim.llms import Llm, Speed
from kvpsi.sim.planning import DELAY_S, rate_exceeded_with
from kvpsi.sim.play import Setup, play

_BOARD = Board("board", 600 * MIB, scope="cgroup:board")
_LLM = Llm("small", 94 * MIB, 23040, 384)
_LOCKED = dataclasses.replace(_LLM, weights_bytes=1, runtime_bytes=_LLM.runtime_bytes + _LLM.weights_bytes)
_GROWN_BYTES = 150 * MIB
_WRITING = (Turn(0.0, "one", 9000, 3000, at_once=True),), 12.0
_READING = (Turn(0.0, "one", 6000, 1, at_once=True), Turn(1.0, "one", 9000, 10)), 30.0


def killed_share(p_kill: float, seeds: Iterable[int], *, reading: bool = False, reserve_share: float = 1.0) -> float:
    """Share of the seeds with a kill where the reserve is so much of what is planned for this probability.

    Args:
        p_kill: as for `kvpsi plan`.
        seeds: one growth each.
        reading: the model reads a prompt meanwhile, else it writes.
        reserve_share: of the planned reserve.
    """
    reserve_bytes = int(reserve_share * rate_exceeded_with(p_kill, 1) * DELAY_S)
    law = LawSettings(low_bytes=reserve_bytes)
    turns, seconds = _READING if reading else _WRITING
    killed = []
    for seed in seeds:
        growth = neighbours.draw("growth", _GROWN_BYTES, seconds, seed)
        setup = Setup(_BOARD, _LOCKED, 16384, turns, [("growth", growth)], seconds, Speed.on(_BOARD, _LLM))
        killed.append(bool(play(setup, Law(law)).killed))
    return sum(killed) / len(killed)
