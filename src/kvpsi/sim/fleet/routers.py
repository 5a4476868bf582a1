"""Who sends a request to which board, knowing no more than a balancer can.

All know whether a board said at the last poll that it is ready (``GET /ready``), as every balancer's health check does,
and how many requests they have sent there that have not ended. Only `Pressure` looks at what else the board says of
itself (``GET /v1/kvpsi/status``, or ``/metrics``).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from kvpsi.errors import UsageError
from kvpsi.sim.fleet.situation import Request

_TRIES = 8
_USUAL_ANSWER_TOKENS = 128
_LEAST_SHARE = 0.05


class View:
    """What a router knows.

    Args:
        n_boards: in the fleet.
        parallel: answers that each of them gives at once.

    Attributes:
        in_flight: requests that were sent to each board and have not ended.
        is_ready, limit_tokens, pressure: what each said at the last poll: ``/ready``, and ``limit_bytes`` (in tokens)
            and ``memory_pressure`` of the status.
    """

    def __init__(self, n_boards: int, parallel: int) -> None:
        self.n_boards, self.parallel = n_boards, parallel
        self.in_flight = [0] * n_boards
        self.is_ready = [True] * n_boards
        self.limit_tokens = np.full(n_boards, np.inf)
        self.pressure = np.zeros(n_boards)


class Router(ABC):
    """One way to choose. ``rng`` is all its chance."""

    name: ClassVar[str]

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    @abstractmethod
    def choose(self, request: Request, view: View, avoided: int = -1) -> int:
        """A board; not the one that refused it just now."""

    def _any(self, view: View, avoided: int) -> int:
        """A random board that was ready, if a few tries find one."""
        board = avoided
        for _ in range(_TRIES):
            while (board := self._rng.randrange(view.n_boards)) == avoided:
                pass
            if view.is_ready[board]:
                break
        return board


class Random(Router):
    """Any board."""

    name = "random"

    def choose(self, request: Request, view: View, avoided: int = -1) -> int:  # noqa: ARG002 - all are alike to it
        """See `Router`."""
        return self._any(view, avoided)


class RoundRobin(Router):
    """One after the other."""

    name = "round-robin"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self._last = -1

    def choose(self, request: Request, view: View, avoided: int = -1) -> int:  # noqa: ARG002 - all are alike to it
        """See `Router`."""
        for _ in range(_TRIES):
            self._last = (self._last + 1) % view.n_boards
            if self._last != avoided and view.is_ready[self._last]:
                break
        else:
            return self._any(view, avoided)
        return self._last


class LeastLoaded(Router):
    """Of two random boards the one that has less to do (Mitzenmacher, "The Power of Two Choices in Randomized Load
    Balancing", IEEE Transactions on Parallel and Distributed Systems 12(10), 2001)."""

    name = "least-loaded"

    def choose(self, request: Request, view: View, avoided: int = -1) -> int:
        """See `Router`."""
        one, other = self._any(view, avoided), self._any(view, avoided)
        return other if self._cost(request, view, other) < self._cost(request, view, one) else one

    def _cost(self, request: Request, view: View, board: int) -> tuple[float, float]:  # noqa: ARG002 - the load is all
        return float(view.in_flight[board]), 0.0


class Pressure(LeastLoaded):
    """The same two choices, but what a board has to do counts for more where its cache has no room for so many answers
    just now, so that they wait for each other, and the more of the time it waits for memory. Of two alike the one with
    more room."""

    name = "pressure"

    def _cost(self, request: Request, view: View, board: int) -> tuple[float, float]:
        at_once = view.in_flight[board] + 1
        limit = view.limit_tokens.item(board)
        fit = max(_LEAST_SHARE, limit / (request.n_prompt + _USUAL_ANSWER_TOKENS))
        awake = max(_LEAST_SHARE, 1 - view.pressure.item(board))
        return at_once * max(1.0, at_once / fit) / awake, -limit


_ALL: tuple[type[Router], ...] = (Random, RoundRobin, LeastLoaded, Pressure)
ROUTERS: Mapping[str, type[Router]] = {each.name: each for each in _ALL}


def router_named(name: str, seed: int) -> Router:
    """A new one; the same choices for a seed.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in ROUTERS:
        raise UsageError(f"Routers are {', '.join(ROUTERS)}, not {name!r}.")
    return ROUTERS[name](random.Random(f"{name} {seed}"))
