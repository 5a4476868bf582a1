"""Clients that ask one question after the other, and what each waits for."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
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


def ask(url: str, messages: Sequence[Message], n_predict: int) -> Asked:
    """Have a conversation gone on with once, and stream the answer.

    Raises:
        EnvironmentProblem: the server did not answer as it should.
    """
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    body = {
        "model": "default",
        "messages": messages,
        "max_tokens": n_predict,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.monotonic()
    first_s, n_told, n_cached = 0.0, 0, 0
    text: list[str] = []
    try:
        connection.request(
            "POST", f"{parts.path}/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise EnvironmentProblem(f"{url} answered with {response.status}: {response.read(500)!r}.")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            said = json.loads(line[6:])
            if "error" in said:
                raise EnvironmentProblem(f"{url} broke off: {said['error']}.")
            if usage := said.get("usage"):
                n_told = usage.get("completion_tokens", n_told)
                n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            for choice in said["choices"]:
                if shown := choice["delta"].get("content"):
                    first_s = first_s or time.monotonic() - began
                    text.append(shown)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EnvironmentProblem(f"{url} broke off ({error!r}).") from error
    finally:
        connection.close()
    if not text:
        raise EnvironmentProblem(f"{url} answered without any text.")
    return Asked(first_s, time.monotonic() - began, n_told or len(text), "".join(text), n_cached)


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
