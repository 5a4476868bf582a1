"""Clumsy and hostile clients: each gets the right status and body, and the server answers the next one."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from support.servers import Served

pytestmark = pytest.mark.engine
CHAT = "/v1/chat/completions"
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def address(served: Served) -> tuple[str, int]:
    parts = urlsplit(served.url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


def send(
    served: Served, path: str, body: bytes | dict[str, Any] | None, method: str = "POST", **headers: str
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*address(served), timeout=60)
    try:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


@pytest.fixture(autouse=True)
def healthy(served: Served) -> Any:
    yield
    status, answer = send(served, CHAT, ASK)
    assert status == 200 and answer["choices"][0]["message"]["content"] is not None
    assert served.get("/v1/kvpsi/status")["running"] == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (CHAT, b"{not json", 400, "not valid"),
        (CHAT, b"", 400, "required"),
        (CHAT, b"\xff\xfe", 400, "not valid"),
        (CHAT, b"[]", 400, "dictionary"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": "Hello"}, 400, "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "Hello"}]}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, 400, "messages"),
        (
            CHAT,
            {"messages": [IMAGE]},
            400,
            "text only",
        ),
        (CHAT, {**ASK, "max_tokens": -1}, 400, "max_tokens"),
        (CHAT, {**ASK, "max_tokens": "many"}, 400, "max_tokens"),
        (CHAT, {**ASK, "temperature": -0.5}, 400, "temperature"),
        (CHAT, {**ASK, "top_p": 2}, 400, "top_p"),
        (CHAT, {**ASK, "n": 1000}, 400, "n"),
        (CHAT, {**ASK, "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
        (CHAT, {**ASK, "model": "another"}, 404, "another"),
        (CHAT, {**ASK, "tool_choice": "required"}, 400, "tools"),
        (CHAT, {**ASK, "functions": [{"name": "look", "parameters": {"type": "object"}}]}, 400, "send `tools`"),
        (CHAT, {**ASK, "function_call": {"name": "look"}}, 400, "send `tool_choice`"),
        (CHAT, {**ASK, "grammar": "root ::= ("}, 400, "GBNF"),
        (CHAT, {**ASK, "grammar": "root ::= <[4294967295]>", "temperature": 0}, 400, "grammar"),
        (CHAT, {**ASK, "grammar": "root ::= " + "(" * 10_000}, 400, "simpler"),
        (CHAT, {**ASK, "logit_bias": {"²": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo"),
        ("/v1/completions", {"prompt": ["x"] * 100, "n": 16}, 400, "answers"),
        (CHAT, {**ASK, "response_format": {"type": "json_schema"}}, 400, "schema"),
        (CHAT, {**ASK, "response_format": {"type": "xml"}}, 400, "response_format"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 6000}]}, 400, "shorten"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": [1, -5]}, 400, "prompt"),
        ("/v1/completions", {"prompt": {"a": 1}}, 400, "prompt"),
        ("/v1/embeddings", {"input": ""}, 400, "empty"),
        ("/v1/embeddings", {"input": "x", "dimensions": 3}, 400, "dimensions"),
        ("/tokenize", {}, 400, "content"),
        ("/detokenize", {"tokens": [1 << 40]}, 400, "token"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_what_makes_no_sense_is_refused_in_openais_form(
    served: Served, path: str, body: Any, status: int, said: str
) -> None:
    got, answer = send(served, path, body)
    assert got == status, answer
    error = answer["error"]
    assert said.lower() in f"{error['message']} {error['param']}".lower() and set(error) == {
        "message",
        "type",
        "param",
        "code",
    }


def test_null_means_the_default(served: Served) -> None:
    names = ["temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream", "tools", "response_format", "user"]
    status, _ = send(served, CHAT, {**ASK, **dict.fromkeys(names)})
    assert status == 200


def test_bodies_that_are_too_large(served: Served) -> None:
    status, answer = send(served, CHAT, {"messages": [{"role": "user", "content": "x" * (10 << 20)}]})
    assert status == 413 and "bytes" in answer["error"]["message"]
    connection = socket.create_connection(address(served), timeout=30)
    with connection:  # without saying how much will come
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        try:
            for _ in range(12):
                connection.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            return
        assert b" 413 " in connection.recv(64)


def test_a_length_that_is_not_the_bodys_does_not_open_the_door(served: Served) -> None:
    with socket.create_connection(address(served), timeout=30) as connection:
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        try:
            for _ in range(12):
                connection.sendall(b"100000\r\n" + b"x" * 0x100000 + b"\r\n")
        except (BrokenPipeError, ConnectionResetError):
            return
        assert connection.recv(64).split()[1] in (b"400", b"413")


def test_text_may_come_in_parts_in_any_message(served: Served) -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "Hello"}]
    assert send(served, CHAT, {**ASK, "messages": messages})[0] == 200


def test_other_methods(served: Served) -> None:
    status, answer = send(served, CHAT, None, "GET")
    assert status == 405 and answer["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_a_monitor_may_ask_for_the_head_only(served: Served, path: str) -> None:
    assert send(served, path, None, "HEAD") == (200, None)


def test_a_body_that_does_not_say_what_it_is(served: Served) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    status, answer = send(served, CHAT, ASK, **form)
    assert status == 400 and "Content-Type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize(("origin", "may"), [("http://page.example", True), ("http://other.example", False)])
def test_only_pages_that_were_named_may_ask(served: Served, origin: str, may: bool) -> None:
    connection = http.client.HTTPConnection(*address(served), timeout=60)
    asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    connection.request("OPTIONS", CHAT, headers=asks)
    response = connection.getresponse()
    assert (response.getheader("access-control-allow-origin") == origin) is may
    connection.close()


def test_a_request_has_an_id_and_a_line_in_the_log(served: Served) -> None:
    connection = http.client.HTTPConnection(*address(served), timeout=60)
    connection.request(
        "POST", CHAT, json.dumps(ASK), {"Content-Type": "application/json", "X-Request-Id": "the-one-i-look-for"}
    )
    response = connection.getresponse()
    response.read()
    connection.close()
    assert response.getheader("x-request-id") == "the-one-i-look-for"
    deadline = time.monotonic() + 10
    while "the-one-i-look-for" not in served.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    (line,) = [line for line in served.log.read_text().splitlines() if "the-one-i-look-for" in line]
    assert f"POST {CHAT} 200 " in line and "broken off" not in line


def test_all_tokens_may_be_chosen_from_and_more_than_fit_be_asked_for(served: Served) -> None:
    status, answer = send(served, CHAT, {**ASK, "top_k": -1, "max_tokens": 10**9, "stop": ["e"]})
    assert status == 200 and answer["choices"][0]["finish_reason"] == "stop", answer


def test_half_open_sockets_and_slow_readers_stop_nobody(served: Served) -> None:
    half = [socket.create_connection(address(served), timeout=30) for _ in range(20)]
    for each in half:
        each.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    slow = socket.create_connection(address(served), timeout=30)
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wordy = {"stream": True, "max_tokens": 300, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    body = json.dumps({**ASK, **wordy})
    slow.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    began = time.monotonic()
    status, _ = send(served, CHAT, ASK)
    assert status == 200 and time.monotonic() - began < 60
    for each in [*half, slow]:
        each.close()
    deadline = time.monotonic() + 60
    while served.get("/v1/kvpsi/status")["running"] and time.monotonic() < deadline:
        time.sleep(0.1)


def test_garbage_instead_of_http(served: Served) -> None:
    with socket.create_connection(address(served), timeout=30) as connection:
        connection.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 400")


def test_health_metrics_and_status(served: Served) -> None:
    assert served.get("/health") == {"status": "ok"} and served.get("/ready") == {"status": "ready"}
    connection = http.client.HTTPConnection(*address(served), timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    for name in ("llamacpp:tokens_predicted_total", "vllm:num_requests_running", "kvpsi_kv_resident_bytes"):
        assert f"\n{name}" in text
    assert "vllm:time_to_first_token_seconds_bucket" in text
    assert 'vllm:request_success_total{finished_reason="length",model_name="small"}' in text
    assert 'vllm:kv_cache_usage_perc{model_name="small"}' in text and "process_resident_memory_bytes" in text
    assert 'kvpsi_given_bytes_total{rung="parked"}' in text
    status = served.get("/v1/kvpsi/status")
    assert status["governed"] and status["capacity_bytes"] > status["resident_bytes"] >= 0
    assert status["headroom_bytes"] > 0 and status["finished"] > 0


def test_tokens(served: Served) -> None:
    status, told = send(served, "/tokenize", {"content": "Hello world"})
    assert status == 200 and told["count"] == len(told["tokens"]) > 1
    status, back = send(served, "/detokenize", {"tokens": told["tokens"]})
    assert status == 200 and back["content"] == "Hello world"
