"""The header of a model on the hub: what of the file is fetched for it, on a hub on loopback that counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support.gguf_files import DEFAULT_KEYS, gguf_bytes, tensor

pytest.importorskip("huggingface_hub")

MIB = 1 << 20
TENSORS_BYTES = 64 * MIB
KEYS = {
    **DEFAULT_KEYS,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.embedding_length": 64,
    "tokenizer.ggml.tokens": [f"token number {number}" for number in range(120_000)],
}
HEADER = gguf_bytes(KEYS, (tensor("weights", (TENSORS_BYTES // 4,)),), data_bytes=0)
MODEL = "owner/repo:folder/m.gguf"


@dataclass
class Hub:
    """What was asked of it; ``sent_bytes`` are those of the model."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    sent_bytes: int = 0


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    n_bytes = len(HEADER) + TENSORS_BYTES
    commit = "c" * 40

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            if self.path == "/owner/repo/resolve/main/folder/m.gguf":
                self.model()
            elif self.path == "/api/models/owner/repo/revision/main":
                self.answer(200, {"id": "owner/repo", "sha": commit})
            elif self.path.startswith("/api/models/owner/repo/tree/main/folder?"):
                entry = {"type": "file", "oid": "0" * 40, "size": n_bytes, "path": "folder/m.gguf"}
                self.answer(200, [entry])
            else:
                known = self.path.startswith(("/owner/repo/", "/api/models/owner/repo/"))
                self.answer(404, {}, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

        def model(self) -> None:
            first, last = 0, n_bytes - 1
            asked = self.headers.get("Range")
            if asked:
                first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
            body = HEADER[first : last + 1]
            body += bytes(last + 1 - first - len(body))
            self.send_response(206 if asked else 200)
            self.send_header("ETag", '"e"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                hub.sent_bytes += len(body)
                self.wfile.write(body)

        def answer(self, status: int, what: object, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(what).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def kvpsi(url: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The hub's package reads where the hub is as it is imported, so in a process of its own."""
    environ = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "kvpsi", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90)


def test_of_a_model_on_the_hub_only_the_header_is_fetched(hub: Hub, tmp_path: Path) -> None:
    done = kvpsi(hub.url, tmp_path, "plan", MODEL, "--json")
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert model["bytes_per_token"] == 2 * 2 * 2 * 16 * 2, "2 layers, 2 KV heads of 16, K and V, 2 bytes each"
    assert model["weights_bytes"] == len(HEADER) + TENSORS_BYTES
    assert len(HEADER) > 2 * MIB, "more than one block"
    assert len(HEADER) <= hub.sent_bytes <= len(HEADER) + MIB, hub.asked


def test_what_was_pulled_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    pulled = kvpsi(hub.url, tmp_path, "pull", MODEL)
    assert pulled.returncode == 0, pulled.stderr
    n_asked = len(hub.asked)
    here = kvpsi(hub.url, tmp_path, "plan", MODEL, "--json")
    assert here.returncode == 0 and len(hub.asked) == n_asked, here.stderr
    model = json.loads(here.stdout)["model"]
    assert (model["weights_bytes"], model["bytes_per_token"]) == (len(HEADER) + TENSORS_BYTES, 256)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        ("owner/other:m.gguf", "owner/other was not found on the hub"),
        ("owner/repo:folder/n.gguf", "owner/repo has no file folder/n.gguf on the hub"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(hub: Hub, tmp_path: Path, model: str, complaint: str) -> None:
    done = kvpsi(hub.url, tmp_path, "plan", model)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"kvpsi: {complaint}")


def test_a_hub_that_is_not_there_is_one_sentence_soon(tmp_path: Path) -> None:
    began_s = time.monotonic()
    done = kvpsi("http://127.0.0.1:9", tmp_path, "plan", MODEL)
    assert time.monotonic() - began_s < 15
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "check the network connection" in done.stderr
