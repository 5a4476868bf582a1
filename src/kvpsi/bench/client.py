"""Clients that ask one question after the other, and what each waits for."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from kvpsi.errors import EnvironmentProblem

Message = dict[str, str]
_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as its client saw it; times in seconds. The server says that it did not read ``n_cached`` tokens."""

    first_token_s: float
    latency_s: float
    n_tokens: int
    text: str = ""
    n_cached: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What so many clients got from one server at once."""

    n_clients: int
    seconds: float
    asked: tuple[Asked, ...]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all of them together, from the first request to the end of the last."""
        return sum(a.n_tokens for a in self.asked) / self.seconds


def said_by(role: str, text: str) -> Message:
    """A message of a conversation."""
    return {"role": role, "content": text}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One HTTP request, whatever came of it; times in seconds from its beginning.

    Attributes:
        seconds: to its end.
        status: of the response, 0 if there was none.
        text_s: when each piece of the answer came.
        n_tokens: of the answer, as the server says.
        retry_after_s: after which it says that one may come again.
        problem: why there is no whole answer; empty if there is one.
        cut: whether that is because it was not waited for any longer.
    """

    seconds: float
    status: int = 0
    text_s: tuple[float, ...] = ()
    n_tokens: int = 0
    text: str = ""
    n_cached: int = 0
    retry_after_s: float | None = None
    problem: str = ""
    cut: bool = False


def attempt(
    url: str,
    messages: Sequence[Message],
    n_predict: int,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = _TIMEOUT_S,
    ended: threading.Event | None = None,
    on_text: Callable[[float], None] = lambda _: None,
    **options: object,
) -> Attempt:
    """Have a conversation gone on with once, and stream the answer, until it or something else has ``ended``.

    ``on_text`` is told when text comes (CLOCK_MONOTONIC); ``options`` go into the body.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    body = {
        "model": "default",
        "messages": messages,
        "max_tokens": n_predict,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    began = time.monotonic()
    status, n_told, n_cached, problem, cut = 0, 0, 0, "", False
    retry_after_s: float | None = None
    text: list[str] = []
    text_s: list[float] = []
    try:
        connection.connect()
        channel = connection.sock
        connection.request(
            "POST",
            f"{parts.path}/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json", **(headers or {})},
        )
        response = connection.getresponse()
        status = response.status
        if status != 200:
            told = response.getheader("retry-after-ms") or "nan"
            retry_after_s = float(told) / 1000 if told != "nan" else None
            problem = f"{url} answered with {status}: {response.read(500)!r}."
        for line in response if status == 200 else ():
            channel.settimeout(max(0.001, began + timeout_s - time.monotonic()))
            if ended is not None and ended.is_set():
                break
            if not line.startswith(b"data: {"):
                continue
            said = json.loads(line[6:])
            if "error" in said:
                problem = f"{url} broke off: {said['error']}."
                break
            if usage := said.get("usage"):
                n_told = usage.get("completion_tokens", n_told)
                n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            for choice in said["choices"]:
                if shown := choice["delta"].get("content"):
                    now_s = time.monotonic()
                    on_text(now_s)
                    text_s.append(now_s - began)
                    text.append(shown)
    except (OSError, http.client.HTTPException, ValueError) as error:
        problem, cut = f"{url} broke off ({error!r}).", isinstance(error, TimeoutError)
    finally:
        connection.close()
    if not text and not problem:
        problem = f"{url} answered without any text."
    return Attempt(
        time.monotonic() - began,
        status,
        tuple(text_s),
        n_told or len(text),
        "".join(text),
        n_cached,
        retry_after_s,
        problem,
        cut,
    )


def ask(url: str, messages: Sequence[Message], n_predict: int) -> Asked:
    """Have a conversation gone on with once.

    Raises:
        EnvironmentProblem: the server did not answer as it should.
    """
    made = attempt(url, messages, n_predict)
    if made.problem:
        raise EnvironmentProblem(made.problem)
    return Asked(made.text_s[0], made.seconds, made.n_tokens, made.text, made.n_cached)


def load(url: str, prompts: Sequence[str], n_clients: int, n_predict: int) -> Load:
    """Have so many clients ask at once, each its share of the prompts one after the other.

    Raises:
        EnvironmentProblem: the server failed one of them.
    """
    asked: list[Asked] = []
    failed: list[Exception] = []

    def client(number: int) -> None:
        try:
            for prompt in prompts[number::n_clients]:
                asked.append(ask(url, [said_by("user", prompt)], n_predict))
        except Exception as error:  # told by the thread that waits for all of them
            failed.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(n_clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return Load(n_clients, time.monotonic() - began, tuple(asked))
