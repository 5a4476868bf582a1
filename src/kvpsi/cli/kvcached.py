"""``kvpsi kvcached``: governs the limit of kvcached, for vLLM and SGLang on GPUs."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpsi.instrument import Instrument
from kvpsi.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from kvpsi.pressure import PressureSource

_LOOK_S = 0.5


def kvcached(
    name: Annotated[str, typer.Argument(help="Of the cache, as `kvctl list` has it.")],
    floor: Annotated[str, typer.Option("--floor", help="Least that it keeps: what one request needs, 1G.")],
    most: Annotated[str, typer.Option("--most", help="Its limit while nobody needs memory; what it is now.")] = "",
    device: Annotated[int, typer.Option("--device", help="GPU whose free memory counts.")] = 0,
    unified: Annotated[
        bool, typer.Option("--unified", help="The GPU has no memory of its own: PSI and headroom of the system count.")
    ] = False,
    reserve: Annotated[str, typer.Option("--reserve", help="Memory that is kept free: 512M; auto.")] = "auto",
    regrow_above: Annotated[str, typer.Option("--regrow-above", help="Free memory to grow back from.")] = "auto",
    law: Annotated[str, typer.Option("--law", help="Other constants of the law: calm_hold_s=1.")] = "",
    adapt: Annotated[bool, typer.Option("--adapt/--no-adapt", help="Have the law learn from this machine.")] = False,
) -> None:
    """Lower kvcached's limit while others need the memory, and raise it again, until Ctrl-C."""
    from kvpsi.engines.kvcached import KvcachedCache, Kvctl
    from kvpsi.governor import Governor
    from kvpsi.governor.options import adapt_settings, law_settings

    settings = law_settings(reserve, regrow_above, law=law)
    cache = KvcachedCache(Kvctl(name), floor_bytes=parse_bytes(floor), most_bytes=parse_bytes(most) if most else None)
    governor = Governor(
        cache, _source(device, unified), settings=settings, adapt=adapt_settings(adapt, law), instrument=_Told()
    )
    with contextlib.closing(cache), governor:
        print(f"{name}: {format_bytes(cache.most_bytes)} at most; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(_LOOK_S)
            if governor.monitor.last_error is not None:
                raise governor.monitor.last_error


class _Told(Instrument):
    """Says what is given."""

    def event(self, name: str, value: Any) -> None:
        if name == "decision":
            print(f"limit {format_bytes(value.limit_bytes)}: {value.reason}", flush=True)


def _source(device: int, unified: bool) -> PressureSource:
    if unified:
        from kvpsi.pressure import open_source

        return open_source()
    from kvpsi.pressure.vram import VramSource

    return VramSource(device)
