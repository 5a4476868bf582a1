"""Server-sent events, and answers that are given up when the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from kvpsi.errors import KvpsiError
from kvpsi.serving.api.errors import ApiError, as_api_error, error_body

R = TypeVar("R")
_CLIENT_GONE = 499  # nginx's number for it
_DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


async def streamed(http: Request, chunks: AsyncIterator[object]) -> StreamingResponse:
    """A response that sends each chunk when it is there.

    The first one is waited for, so that what cannot be answered has a status of its own; what fails later is told by an
    event.

    Raises:
        KvpsiError: the first chunk could not be had, or the client is gone.
    """
    first = await unless_gone(http, _first(chunks))

    async def body() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield event(first)
            async for chunk in chunks:
                yield event(chunk)
        except KvpsiError as error:
            told = as_api_error(error)
            yield event(error_body(told.status, str(told), code=told.code, param=told.param))
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]
        yield _DONE

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


async def _first(chunks: AsyncIterator[object]) -> object:
    return await anext(chunks, None)


async def unless_gone(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """The result of some work, which is cancelled when the client goes away.

    Raises:
        ApiError: it did; nobody will read this.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        if gone.done() and not gone.cancelled():
            raise ApiError(_CLIENT_GONE, "The client is gone.") from None
        raise


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(streams: list[AsyncIterator[R]]) -> AsyncIterator[tuple[int, R]]:
    """What several streams give, with the number of each, in the order in which it comes.

    Raises:
        BaseException: what one of them raised; the others are closed.
    """
    if len(streams) == 1:  # without a task and a queue for each token
        async for item in streams[0]:
            yield 0, item
        return
    items: asyncio.Queue[tuple[int, R] | BaseException | None] = asyncio.Queue()

    async def forward(number: int, stream: AsyncIterator[R]) -> None:
        try:
            async for item in stream:
                items.put_nowait((number, item))
            items.put_nowait(None)
        except BaseException as error:
            items.put_nowait(error)
            raise

    tasks = [asyncio.ensure_future(forward(n, s)) for n, s in enumerate(streams)]
    left = len(tasks)
    try:
        while left:
            got = await items.get()
            if got is None:
                left -= 1
            elif isinstance(got, BaseException):
                raise got
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
