"""``kvpsi bench …``: the measurements behind every claim, one file each."""

from __future__ import annotations

import typer

from kvpsi.cli.bench import admission, answers, elastic, oom, pressure, quality, react, sessions, throughput, vllm

app = typer.Typer(help="Measure what kvpsi claims, on this machine.", no_args_is_help=True)
app.command()(admission.admission)
app.command()(answers.answers)
app.command()(elastic.elastic)
app.command()(oom.oom)
app.command()(pressure.pressure)
app.command()(quality.quality)
app.command()(react.react)
app.command()(sessions.sessions)
app.command()(throughput.throughput)
app.command()(vllm.vllm)


@app.callback()
def _group() -> None:
    pass
