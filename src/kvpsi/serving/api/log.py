"""One line for each request, when it has ended."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvpsi.serving.api.errors import ApiError, response_to

log = logging.getLogger("kvpsi")
_NAME = b"x-request-id"
_LONGEST_ID = 100


class RequestLog:
    """Gives every answer the id of its request, and tells of requests.

    Args:
        app: what answers them.
        say: takes a line for each; None: nobody wants to know. Successful looks (GET) are not told.
    """

    def __init__(self, app: ASGIApp, say: Callable[[str], None] | None) -> None:
        self._app = app
        self._say = say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        given = dict(scope["headers"]).get(_NAME, b"")
        usable = given.isascii() and given.decode("ascii", "replace").isprintable() and len(given) <= _LONGEST_ID
        request_id = given if given and usable else uuid.uuid4().hex.encode()
        status = 0
        whole = False

        async def sent(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (_NAME, request_id)]}
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, sent)
        except Exception as error:  # here, so that it has an id and a line like any other
            log.exception("A request failed")
            if not status:
                told = ApiError(500, f"kvpsi failed ({type(error).__name__}); its log says more.")
                await response_to(told)(scope, receive, sent)
        finally:
            if self._say is not None and not (scope["method"] in ("GET", "HEAD") and status == 200):
                took_s = time.monotonic() - began
                at = time.strftime("%Y-%m-%dT%H:%M:%S%z")
                end = str(status) if whole else f"{status or '-'} broken off"
                path = quote(scope["path"])
                with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                    self._say(f"{at} {scope['method']} {path} {end} {took_s:.2f} s {request_id.decode()}")
