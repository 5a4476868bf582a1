"""Real memory pressure on a small board: a neighbour gets the cache's memory, and vLLM answers all the same."""

from __future__ import annotations

import os
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest

from asked import N_TOKENS, PROMPTS, Stock
from kvpsi.bench.vllm.server import GOVERNED, Setting
from kvpsi.board import Board, BoardPlaces, BoardSettings, open_board
from kvpsi.hog import Hog, HogSettings
from served import Served, serving
from support.boards import left_behind
from test_balloon_in_vllm import MIB, until

pytestmark = [pytest.mark.timeout(1800), pytest.mark.pressure]
# vLLM has 1.9 GiB without its cache of 1 GiB; both fit on the board, and not a neighbour beside them
BOARD, NEIGHBOUR = BoardSettings(3200 * MIB), HogSettings(1000 * MIB, rate_bytes_s=100 * MIB, hold_s=20)


def fill(served: Served) -> None:
    """Cached prefixes in many blocks."""
    served.answers([f"Page {i}. " + f"The town wrote down what was said on page {i}. " * 28 for i in range(60)], 1)


def a_neighbour(board: Board) -> Hog:
    return Hog(NEIGHBOUR, lambda command: board.start(command, group="hog", stdout=subprocess.PIPE))


def test_governed_vllm_and_its_neighbour_live_and_blocks_come_back(
    board_places: BoardPlaces, setting: Setting, stock: Stock, tmp_path: Path
) -> None:
    with open_board(BOARD) as board:
        start = partial(board.start, group="model")
        with serving(setting, tmp_path, GOVERNED, start) as served:
            fill(served)
            before, least_bytes, wrong = served.status(), [1 << 62], []
            neighbour, ended = a_neighbour(board), threading.Event()

            def watch() -> None:
                while not ended.wait(0.2):
                    least_bytes[0] = min(least_bytes[0], served.status()["committed_bytes"])

            def ask() -> None:
                while not ended.is_set():
                    texts = served.answers(PROMPTS[:8], N_TOKENS)
                    wrong.extend(p for p, text in zip(PROMPTS[:8], texts, strict=True) if text != stock.texts[p])

            threads = [threading.Thread(target=watch), threading.Thread(target=ask)]
            for thread in threads:
                thread.start()
            fared = neighbour.wait()
            ended.set()
            for thread in threads:
                thread.join()
            given = served.status()["returned_bytes"] - before["returned_bytes"]
            print(
                f"{before['committed_bytes'] / MIB:.0f} MiB of blocks before, {least_bytes[0] / MIB:.0f} MiB beside "
                f"the neighbour, {given / MIB:.0f} MiB given, {board.stall_s('hog') or 0:.2f} s of its stall"
            )
            assert fared.completed and fared.killed_by is None
            assert board.figures().kills == 0 and served.process.poll() is None
            assert least_bytes[0] < before["committed_bytes"] - 100 * MIB
            assert not wrong
            until(lambda: served.status()["limit_bytes"] > 600 * MIB, 60)  # not all: the law leaves room for others
    assert not left_behind(board_places, os.getpid())


def test_stock_vllm_or_its_neighbour_is_killed_there(
    board_places: BoardPlaces, setting: Setting, tmp_path: Path
) -> None:
    with open_board(BOARD) as board, serving(setting, tmp_path, start=partial(board.start, group="model")) as served:
        served.answers(PROMPTS[:8], 20)
        fared = a_neighbour(board).wait()
        print(f"stock vLLM: {board.figures().kills} killed, the neighbour by {fared.killed_by or 'nobody'}")
        assert fared.killed_by is not None or board.figures().kills > 0
    assert not left_behind(board_places, os.getpid())
