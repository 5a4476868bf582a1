"""What every request has to pass: the key, and the size of its body. Plain ASGI, so that streams pass untouched."""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvpsi.serving.api.errors import ApiError, response_to

_OPEN = ("/health", "/v1/health", "/ready", "/metrics", "/", "/favicon.ico")
_PAGE = "/page/"
_NEED_NO_MODEL = (*_OPEN, "/openapi.json")


class Guard:
    """Refuses requests without a key, bodies that are too large, and what needs a model that is not there yet.

    Args:
        app: what is guarded.
        api_keys: any of them will do; none: everybody may come in.
        most_body_bytes: of one request.
        is_loaded: whether the model is there.
    """

    def __init__(
        self, app: ASGIApp, api_keys: Sequence[str], most_body_bytes: int, is_loaded: Callable[[], bool]
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._most_body_bytes = most_body_bytes
        self._is_loaded = is_loaded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            self._check_key(scope["path"], headers)
            self._check_length(headers)
            if b"content-length" not in headers or b"transfer-encoding" in headers:
                receive = await self._read_ahead(receive)
            if not self._is_loaded() and scope["path"] not in _NEED_NO_MODEL and not scope["path"].startswith(_PAGE):
                raise ApiError(503, "The model is being loaded; try again in a moment.")
        except ApiError as error:
            await response_to(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._keys or path in _OPEN or path.startswith(_PAGE):
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if not any(hmac.compare_digest(given, known) for known in self._keys):
            raise ApiError(
                401,
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )

    def _check_length(self, headers: dict[bytes, bytes]) -> None:
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most_body_bytes:
            raise self._too_large()

    async def _read_ahead(self, receive: Receive) -> Receive:
        """A body that does not say how long it is, read as far as it may go; the same messages again."""
        messages: deque[Message] = deque()
        n_read = 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            n_read += len(messages[-1].get("body", b""))
            if n_read > self._most_body_bytes:
                raise self._too_large()

        async def again() -> Message:
            return messages.popleft() if messages else await receive()

        return again

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body has more than {self._most_body_bytes} bytes; send less.")
