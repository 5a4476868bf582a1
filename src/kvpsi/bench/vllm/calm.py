"""Tokens a second of a governed server beside a stock one, by turns, while nobody needs memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvpsi.bench.client import load
from kvpsi.bench.prompts import draw
from kvpsi.bench.vllm.server import Server

N_PREDICT = 64


@dataclass(frozen=True, slots=True)
class Played:
    """One server's half of a round; ``part`` is 0 to 3."""

    server: str
    round: int
    part: int
    tokens: int
    seconds: float


def play_round(
    servers: Mapping[str, Server], number: int, n_clients: int, n_requests: int, seed: int
) -> Iterator[Played]:
    """Each server twice, in the order a, b, b, a; every second round begins with the other one. Both answer the same
    prompts, and hear none twice.

    Raises:
        EnvironmentProblem: a server failed a client.
    """
    first, second = sorted(servers, reverse=number % 2 == 1)
    for part, name in enumerate((first, second, second, first)):
        prompts = draw(n_clients * n_requests, hash((seed, number, part // 2)))
        made = load(servers[name].url, prompts, n_clients, N_PREDICT)
        yield Played(name, number, part, sum(a.n_tokens for a in made.asked), made.seconds)
