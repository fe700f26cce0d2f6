"""The addresses of the server, each with its answer."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from d2c_mlx.serve.requests import (
    ChatRequest,
    LoadRequest,
    RequestError,
    TextRequest,
    read_request,
)
from d2c_mlx.serve.scheduler import STARTED, Job
from d2c_mlx.serve.service import PackService
from d2c_mlx.serve.text import Answer, Token

__all__ = ["ADDRESSES", "CHANGES", "Reply"]

T = TypeVar("T")
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
    content = {
        "status": "ok" if accepts else "unavailable",
        "open": service.scheduler.n_open,
        "adapters_loaded": adapters.n_loaded,
        "adapters_evicted": adapters.n_evicted,
    }
    return JSONResponse(content, 200 if accepts else 503)


async def _models(service: PackService, request: Request) -> Response:
    """All models, or the one that the path names; `root` and `parent` are vLLM's."""

    def describe(name: str) -> dict[str, Any]:
        entry, base = service.adapters.names.get(name), service.base_name
        about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "d2c-mlx"}
        root, parent = (str(entry.path), base) if entry else (name, None)
        return {**about, "root": root, "parent": parent}

    if name := request.path_params.get("name"):
        service.check_model(name)
        return JSONResponse(describe(name))
    return JSONResponse({"object": "list", "data": [describe(name) for name in service.names]})


async def _load(service: PackService, request: Request) -> Response:
    asked = read_request(await _body(service, request), LoadRequest)
    await asyncio.wrap_future(service.load_adapter(asked))
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


async def _unload(service: PackService, request: Request) -> Response:
    name = read_request(await _body(service, request), LoadRequest).lora_name
    await asyncio.wrap_future(service.unload_adapter(name))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _reload(service: PackService, _request: Request) -> Response:
    await run_in_threadpool(service.reload_pack)
    return JSONResponse({"success": True, "tasks": [*service.pack.tasks]})


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
    try:
        reply = await _while_connected(request, _begin(service, asked, state))
        if not asked.stream:
            content = await _while_connected(request, reply.whole())
            return JSONResponse(content, headers=reply.headers)
    except RuntimeError as error:
        raise RequestError(500, str(error)) from None
    headers = {"Cache-Control": "no-cache", **reply.headers}
    return StreamingResponse(reply.stream(), headers=headers, media_type="text/event-stream")


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
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
) -> Reply:
    """Queue the job of a request, and wait until it is in the batch; raises RequestError."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def emit(event: object) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    if request.schema_text:
        await service.grammars.check(request.schema_text)
    job, answer = await run_in_threadpool(service.job, request, emit)
    reply = state["reply"] = Reply(service, request, job, answer, events)
    service.scheduler.submit(job)
    while await reply.next() != STARTED:
        pass
    return reply


class Reply:
    """The reply to a request, as its job runs.

    Attributes:
        model: the task that answers, or the base model.
        headers: with what the router measured, empty where none was asked.
    """

    def __init__(
        self,
        service: PackService,
        request: ChatRequest | TextRequest,
        job: Job,
        answer: Answer,
        events: asyncio.Queue[Any],
    ) -> None:
        """Begin a reply of what the job emits into a queue."""
        self.model = service.base_name if job.task is None else job.task
        self._job, self._request, self._answer, self._events = job, request, answer, events
        self.headers = {"X-D2C-Route": json.dumps(job.route)} if job.route else {}
        self._chat, self._created = isinstance(request, ChatRequest), int(time.time())
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4()}"

    async def next(self) -> Any:  # noqa: ANN401  see `Job.emit`
        """The next event of the job; raises the error with which it has ended."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Token):
            self._answer.add(event)
        return event

    async def whole(self) -> dict[str, Any]:
        """The body of the reply, when the answer has ended."""
        while not self._answer.finish_reason:
            await self.next()
        return {**self._event(), "usage": self.usage}

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer piece by piece, as events."""

        def data(event: dict[str, Any]) -> bytes:
            return b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"

        try:
            while not self._answer.finish_reason:
                event = await self.next()
                if isinstance(event, tuple):
                    yield b": keepalive %d/%d\n\n" % event
                elif self._answer.has_news or self._answer.finish_reason:
                    yield data(self._event())
            if self._request.stream_options.include_usage:
                yield data({**self._event(), "choices": [], "usage": self.usage})
            yield b"data: [DONE]\n\n"
        except Exception as error:  # a model's words may be anything
            if not isinstance(error, RuntimeError | RequestError):
                _log.exception("a reply failed")
                error = RuntimeError(f"the reply failed ({type(error).__name__})")
            yield data(RequestError(500, str(error)).body)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of prompt and answer, as OpenAI's API counts them."""
        n_prompt, n_answer = len(self._job.prompt), self._answer.n_tokens
        return {
            "prompt_tokens": n_prompt,
            "prompt_tokens_details": {"cached_tokens": self._job.n_cached},
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
        }

    def _event(self) -> dict[str, Any]:
        """The reply, or an event of a stream, with what is new of the answer."""
        asked, kind = self._request, "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "choices": [self._answer.take(self._chat, asked.stream, asked.logprobs)],
            "model": self.model,
            "system_fingerprint": "d2c-mlx",
        }

    def end(self) -> dict[str, Any]:
        """Cancel what is not there yet; numbers and names for the log, nothing of what was said."""
        self._job.cancelled = True
        reason = self._answer.finish_reason
        return {"id": self._id, "task": self.model, **self.usage, "finish_reason": reason}


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
# Where adapters may be loaded and unloaded.
CHANGES = (
    ("POST", "/v1/load_lora_adapter", _load),
    ("POST", "/v1/unload_lora_adapter", _unload),
    ("POST", "/v1/reload", _reload),
)
