"""Many clients beside a neighbour on a small board: every stream ends as it should, nobody dies, memory comes back."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from kvpsi.board import Board, BoardPlaces, BoardSettings, open_board
from kvpsi.hog import Hog, HogSettings
from support.boards import left_behind

pytestmark = [pytest.mark.engine, pytest.mark.pressure]
MIB = 1 << 20
FULL = os.environ.get("KVPSI_LONG_TESTS") == "1"
N_CLIENTS, SECONDS = (64, 60) if FULL else (16, 15)
WORDS = ["boat", "lamp", "river", "stone", "cloud", "bread", "wheel", "garden", "letter", "bridge", "winter", "music"]


def start(board: Board, model: Path, log: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "kvpsi", "serve", "-m", str(model), "--port", "0", "-t", "1", *options]
    with log.open("w") as stderr:
        process = board.start(command, group="model", stdout=stderr, stderr=stderr)
    deadline = time.monotonic() + 120
    while not (found := re.search(r"is served at (http://\S+)/v1", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return process, found.group(1)


def stream(url: str, prompt: str, n_predict: int) -> str:
    """Ask, and what came of it: ``stop``, ``length`` or a status; raises where an answer is not whole."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300)
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": n_predict,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
    }
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            error = json.loads(response.read())["error"]
            assert response.status in (429, 503) and error["message"], error
            return str(response.status)
        text, tokens, reason, usage, done = "", [], "", None, False
        for line in response:
            if line.strip() == b"data: [DONE]":
                done = True
            elif line.startswith(b"data: "):
                said = json.loads(line[6:])
                if "error" in said:
                    assert said["error"]["message"]
                    return "error"
                usage = said["usage"] or usage
                for choice in said["choices"]:
                    text += choice["delta"].get("content") or ""
                    tokens += [t["bytes"] for t in (choice["logprobs"] or {}).get("content") or []]
                    reason = choice["finish_reason"] or reason
        assert done and reason in ("stop", "length") and usage, (done, reason, usage)
        assert b"".join(map(bytes, tokens)).decode("utf-8", "replace") == text, "a token is lost or told twice"
        assert usage["completion_tokens"] == len(tokens) + (reason == "stop")
        return reason
    finally:
        connection.close()


def test_many_clients_beside_a_sawtooth(board_places: BoardPlaces, default_model: Path, tmp_path: Path) -> None:
    ends: Counter[str] = Counter()
    wrong: list[BaseException] = []
    with open_board(BoardSettings(700 * MIB)) as board:
        log = tmp_path / "server.log"
        process, url = start(board, default_model, log, "-c", "12288", "--queue", "48", "--queue-timeout-s", "30")
        server = psutil.Process(process.pid)
        stream(url, "Hello", 4)
        idle_bytes = server.memory_info().rss
        until = time.monotonic() + SECONDS

        def client(number: int) -> None:
            rng = random.Random(number)
            try:
                while time.monotonic() < until:
                    prompt = " ".join(rng.choices(WORDS, k=rng.randrange(5, 150))) + ". Go on."
                    ends[stream(url, prompt, rng.randrange(4, 48))] += 1
            except BaseException as error:
                wrong.append(error)

        hog = Hog(
            HogSettings(300 * MIB, rate_bytes_s=150 * MIB, hold_s=SECONDS + 30, shape="sawtooth", period_s=4),
            lambda command: board.start(command, group="hog", stdout=subprocess.PIPE),
        )
        threads = [threading.Thread(target=client, args=(number,)) for number in range(N_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hog.end()
        fared = hog.wait()
        assert not wrong, wrong[0]
        assert process.poll() is None and fared.killed_by is None and board.figures().kills == 0
        assert ends["stop"] + ends["length"] >= 3 and not ends["error"], ends
        for _ in range(20):
            with urllib.request.urlopen(f"{url}/v1/kvpsi/status", timeout=30) as answer:
                status = json.load(answer)
            after_bytes, saved_bytes = server.memory_info().rss, status["sessions_bytes"]
            if after_bytes - saved_bytes < idle_bytes + 60 * MIB:
                break
            time.sleep(0.5)
        print(
            ends, f"idle {idle_bytes / MIB:.0f}, afterwards {after_bytes / MIB:.0f}, saved {saved_bytes / MIB:.0f} MiB"
        )
        assert status["running"] == status["waiting"] == 0
        assert after_bytes - saved_bytes < idle_bytes + 60 * MIB, "conversations are kept, nothing else"
        process.terminate()
        process.wait(30)
        assert "Traceback" not in log.read_text(), log.read_text()
    assert not left_behind(board_places, os.getpid())


def test_memory_is_bounded_and_falls_when_a_neighbour_grows(
    board_places: BoardPlaces, default_model: Path, tmp_path: Path
) -> None:
    n_requests = 200 if FULL else 40
    with open_board(BoardSettings(600 * MIB)) as board:
        log = tmp_path / "server.log"
        process, url = start(board, default_model, log, "-c", "8192")
        server = psutil.Process(process.pid)
        rng = random.Random(1)
        for number in range(n_requests):
            prompt = f"{number} " + " ".join(rng.choices(WORDS, k=250))
            assert stream(url, prompt, 2) in ("stop", "length")
        full_bytes = server.memory_info().rss
        settings = HogSettings(380 * MIB, rate_bytes_s=100 * MIB, hold_s=3)
        fared = Hog(settings, lambda command: board.start(command, group="hog", stdout=subprocess.PIPE)).wait()
        after_bytes = server.memory_info().rss
        print(f"{full_bytes / MIB:.0f} MiB after {n_requests} requests, {after_bytes / MIB:.0f} MiB beside a neighbour")
        assert fared.killed_by is None and board.figures().kills == 0 and process.poll() is None
        assert after_bytes < full_bytes - 50 * MIB
        process.terminate()
        process.wait(30)
    assert not left_behind(board_places, os.getpid())
