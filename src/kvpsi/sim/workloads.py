"""Situations that a control law is compared in: boards of several sizes, with and without swap, and all neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpsi.hog import HogSettings
from kvpsi.sim.boards import BOARDS, GIB, MIB, TOUCH_BYTES_S, Board, Swap
from kvpsi.sim.conversation import Talk
from kvpsi.sim.llms import LLMS, Llm
from kvpsi.sim.situation import Situation

_SMALL = Llm("135m", 94 * MIB, 23040, 384, runtime_bytes=97 * MIB)
_LONG = Talk(first_tokens=2000)
_SECONDS = 400.0
_QUICK = Talk(n_conversations=3, first_tokens=1500, think_s=1.0)


def _leak(most_bytes: int, grows_s: float, until_s: float) -> HogSettings:
    """A process that grows steadily, and is restarted when it has so much."""
    n_steps = 40
    points = [
        (began_s + grows_s * step / n_steps, most_bytes * step // n_steps)
        for began_s in range(0, int(until_s), int(grows_s) + 1)
        for step in range(n_steps)
    ]
    return HogSettings(most_bytes, shape="trace", trace=tuple(points), rate_bytes_s=TOUCH_BYTES_S, hold_s=until_s)


def _always(size_bytes: int, until_s: float) -> HogSettings:
    """A process that has the same all the time."""
    return HogSettings(
        size_bytes, shape="trace", trace=((0.0, size_bytes),), rate_bytes_s=TOUCH_BYTES_S, hold_s=until_s
    )


def _on(board: Board, llm: Llm, talk: Talk, **others: Any) -> Situation:
    return Situation(board, llm, 16384, talk=talk, seconds=_SECONDS, learning_s=_SECONDS / 4, **others)


WORKLOADS: Mapping[str, Situation] = {
    "camera": _on(BOARDS["vps-4gb"], LLMS["3b"], _LONG, neighbours=(("camera", 1000 * MIB),)),
    "bursts": _on(
        Board("600M", 600 * MIB, swap=Swap(300 * MIB), scope="cgroup:board"),
        _SMALL,
        _QUICK,
        neighbours=(("bursts", 250 * MIB),),
    ),
    "browser": _on(BOARDS["pi5-8gb"], LLMS["3b"], _LONG, neighbours=(("browser", 5 * GIB),)),
    "second_model": _on(BOARDS["orin-nano-8gb"], LLMS["3b"], _LONG, neighbours=(("model", 4 * GIB),)),
    "mixed": _on(
        BOARDS["laptop-16gb"],
        LLMS["8b"],
        _LONG,
        neighbours=(("camera", 1 * GIB), ("browser", 7 * GIB), ("bursts", 2 * GIB)),
    ),
    "leak": _on(Board("2G", 2 * GIB, scope="cgroup:board"), LLMS["1b"], _QUICK, trace=_leak(950 * MIB, 40.0, _SECONDS)),
    "noise": _on(BOARDS["vps-4gb"], LLMS["1b"], _QUICK, trace=_always(2000 * MIB, _SECONDS), elsewhere_share=0.15),
}
"""By name; each seed draws other neighbours and conversations of them, and the first quarter is for learning. In
``noise`` others wait for memory of their own all the time, and nothing of that is the cache's fault."""
