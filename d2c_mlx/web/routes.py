"""The addresses of the server, each with its answer."""

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from d2c_mlx.serve.requests import ChatRequest, LoadRequest, RequestError, TextRequest, read_request
from d2c_mlx.serve.service import PackService
from d2c_mlx.serve.text import Answer

_log = logging.getLogger(__name__)


async def _page(_service: PackService, _request: Request) -> Response:
    """The chat page: its browser runs no other script, and loads nothing from elsewhere."""
    page = (Path(__file__).parent / "static/chat.html").read_bytes()
    own = {}
    for kind in (b"style", b"script"):
        (inline,) = re.findall(b"<%s>(.*?)</%s>" % (kind, kind), page, re.DOTALL)
        own[kind] = base64.b64encode(hashlib.sha256(inline).digest()).decode()
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action"
        f" 'none'; frame-ancestors 'none'; style-src 'sha256-{own[b'style']}'; script-src"
        f" 'sha256-{own[b'script']}'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(page, headers=headers, media_type="text/html")


async def _health(service: PackService, _request: Request) -> Response:
    """Whether requests are taken, those that are open, and adapters that came into memory."""
    accepts, adapters = service.scheduler.accepts, service.adapters
    content = {"status": "ok" if accepts else "unavailable", "open": service.scheduler.n_open}
    content |= {"adapters_loaded": adapters.n_loaded, "adapters_evicted": adapters.n_evicted}
    return JSONResponse(content, 200 if accepts else 503)


async def _models(service: PackService, request: Request) -> Response:
    """All models, or the one that the path names; `root` and `parent` are vLLM's."""

    def describe(name: str) -> dict[str, Any]:
        entry, base = service.adapters.names.get(name), service.base_name
        about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "d2c-mlx"}
        root, parent = (str(entry.path), base) if entry else (name, None)
        return {**about, "root": root, "parent": parent}

    if name := request.path_params.get("name"):
        if name not in service.names:
            raise service.no_model(name)
        return JSONResponse(describe(name))
    return JSONResponse({"object": "list", "data": [describe(name) for name in service.names]})


async def _change(service: PackService, request: Request, change: str) -> Response:
    asked = read_request(await _body(service, request), LoadRequest)
    begin = service.load_adapter if change == "added" else service.unload_adapter
    await asyncio.wrap_future(begin(asked))
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' {change} successfully.")


async def _body(service: PackService, request: Request) -> bytes:
    """Read the body of a request; raises RequestError (413) if it is too large."""
    most, body = service.limits.body_nbytes, bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise RequestError(413, f"the body is too large; this server takes {most:,} bytes")
    return bytes(body)


async def _complete(
    service: PackService, request: Request, kind: type[ChatRequest | TextRequest]
) -> Response:
    """Answer a chat or a text, whole or streamed, until its client leaves."""
    asked, state = read_request(await _body(service, request), kind), request.scope["state"]
    state["asked"] = {"model": asked.model[:80], "stream": asked.stream}
    answer, events = await _while_connected(request, _begin(service, asked, state))
    headers = {"X-D2C-Route": json.dumps(answer.job.route)} if answer.job.route else {}
    if not asked.stream:
        return JSONResponse({**answer.take(), "usage": answer.usage}, headers=headers)
    headers |= {"Cache-Control": "no-cache"}
    content = _stream(answer, events, asked.stream_options.get("include_usage") is True)
    return StreamingResponse(content, headers=headers, media_type="text/event-stream")


async def _while_connected(request: Request, work: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
    """Do some work; raises ClientDisconnect as soon as the client has left."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _begin(
    service: PackService, request: ChatRequest | TextRequest, state: dict[str, Any]
) -> tuple[Answer, AsyncIterator[object]]:
    """Queue the job of a request, and wait until its stream begins, or its answer is whole.

    Returns:
        The answer, and what happens to its job, which is added to it; either may raise
        RequestError.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def emit(event: object) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, event)

    async def happen() -> AsyncIterator[object]:
        while not answer.finish_reason:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event:
                answer.add(*event)
            yield event

    if request.schema_text:
        await service.grammars.check(request.schema_text)
    answer = state["answer"] = await run_in_threadpool(service.answer, request, emit)
    service.scheduler.submit(answer.job)
    events = happen()
    await anext(events)
    while not request.stream and not answer.finish_reason:
        await anext(events)
    return answer, events


async def _stream(
    answer: Answer, events: AsyncIterator[object], include_usage: bool
) -> AsyncIterator[bytes]:
    """The answer piece by piece, as events."""

    def data(event: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"

    try:
        async for event in events:
            if event is None:
                yield b": keepalive\n\n"
            elif answer.has_news or answer.finish_reason:
                yield data(answer.take())
        if include_usage:
            yield data({**answer.take(), "choices": [], "usage": answer.usage})
        yield b"data: [DONE]\n\n"
    except Exception as error:  # a model's words may be anything
        if not isinstance(error, RequestError):
            _log.exception("a reply failed")
            error = RequestError(500, f"the reply failed ({type(error).__name__})")
        yield data(error.body)


# Method, path and answer: a function of the service and a request.
ADDRESSES = (
    ("GET", "/", _page),
    ("GET", "/health", _health),
    ("GET", "/v1/models", _models),
    ("GET", "/v1/models/{name:path}", _models),
    ("POST", "/v1/chat/completions", partial(_complete, kind=ChatRequest)),
    ("POST", "/chat/completions", partial(_complete, kind=ChatRequest)),
    ("POST", "/v1/completions", partial(_complete, kind=TextRequest)),
)
CHANGES = (
    ("POST", "/v1/load_lora_adapter", partial(_change, change="added")),
    ("POST", "/v1/unload_lora_adapter", partial(_change, change="removed")),
)
