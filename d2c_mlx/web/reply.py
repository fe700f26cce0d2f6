"""The reply to a request as its jobs run, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Message as HttpMessage
from starlette.types import Send

from d2c_mlx.serve.changes import find_adapter
from d2c_mlx.serve.jobs import STARTED, Job, Piece
from d2c_mlx.serve.requests import ChatRequest, Request
from d2c_mlx.serve.service import PackService
from d2c_mlx.serve.text import Answer, Encoder, Message

__all__ = ["Reply"]


class _Usage(BaseModel):
    """Tokens of a prompt and its answer."""

    prompt_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens: int
    total_tokens: int


class _Choice(BaseModel):
    """An answer, or a piece of it: `message` in a chat, `delta` in its stream, else `text`."""

    index: int
    finish_reason: str | None
    message: Message | None = None
    delta: Message | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None


class _Completion(BaseModel):
    """A reply, or an event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    system_fingerprint: str
    usage: _Usage | None = None

    def text(self) -> bytes:
        """The reply as JSON, without what was not given."""
        return self.model_dump_json(exclude_unset=True).encode()


class _RunningChoice:
    """One of the answers that a request asks for, as its job runs."""

    def __init__(self, index: int, job: Job, answer: Answer) -> None:
        self.index, self.job, self.answer = index, job, answer
        self.n_tokens, self._pieces = 0, list[Piece]()

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self.n_tokens += 1
        self.answer.add(piece.text, piece.finish_reason)

    def take(self, request: Request, encoder: Encoder) -> _Choice:
        """The part of the answer that was not sent yet."""
        fields: dict[str, Any] = {"index": self.index, "finish_reason": self.answer.finish_reason}
        whole = not request.stream
        if isinstance(request, ChatRequest):
            fields["message" if whole else "delta"] = self.answer.take(whole)
        else:
            fields["text"] = self.answer.take_text()
        pieces, self._pieces = self._pieces, []
        if request.logprobs:
            content = encoder.logprobs(pieces)
            fields["logprobs"] = {"content": content} if content else None
        return _Choice(**fields)


class Reply:
    """The reply to a request, as its jobs run."""

    def __init__(self, service: PackService, request: Request) -> None:
        self._service, self._request = service, request
        chat = isinstance(request, ChatRequest)
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4()}"
        self._kind = "chat.completion" if chat else "text_completion"
        if chat and request.stream:
            self._kind += ".chunk"
        self._created = int(time.time())
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._choices: list[_RunningChoice] = []

    async def start(self) -> None:
        """Queue the jobs, and wait until one is in the batch; raises RequestError."""
        loop, request = asyncio.get_running_loop(), self._request

        def emit(index: int, event: object) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        loading = find_adapter(self._service, request.model)
        if loading:
            await asyncio.wrap_future(loading)
        emits = [partial(emit, i) for i in range(request.n)]
        jobs = await run_in_threadpool(self._service.jobs, request, emits)
        self._service.scheduler.submit(*jobs)
        answers = (self._service.answer(request, job.prompt) for job in jobs)
        self._choices = [_RunningChoice(i, *both) for i, both in enumerate(zip(jobs, answers))]
        while (await self._next())[1] != STARTED:
            pass

    def cancel(self) -> None:
        """End the jobs, as their client has left or has its answer."""
        for one in self._choices:
            one.job.cancelled = True

    async def _next(self) -> tuple[int, Any]:
        index, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return index, event

    async def _news(self) -> AsyncIterator[tuple[_RunningChoice, Any]]:
        """Fill the answers until all have ended; yields each with what happened, see `Job.emit`."""
        left = len(self._choices)
        while left:
            index, event = await self._next()
            if isinstance(event, Piece):
                self._choices[index].add(event)
            left -= event is None
            yield self._choices[index], event

    async def whole(self, send: Send) -> None:
        """Send the answers when they are whole."""
        async for _ in self._news():
            pass
        content = self._event(self._choices, with_usage=True).text()
        reply = Response(content, headers=self._route(), media_type="application/json")
        await reply({"type": "http"}, _never, send)

    async def stream(self, send: Send) -> None:
        """Send the answers piece by piece."""
        headers = {"Cache-Control": "no-cache", **self._route()}
        start = Response(headers=headers, media_type="text/event-stream")
        del start.headers["Content-Length"]
        await send({"type": "http.response.start", "status": 200, "headers": start.raw_headers})

        async def say(content: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": more})

        async for choice, event in self._news():
            if isinstance(event, tuple):
                await say(b": keepalive %d/%d\n\n" % event)
            elif event is None or (choice.answer.has_news and not choice.answer.finish_reason):
                await say(_data(self._event([choice])))
        if self._request.stream_options.get("include_usage"):
            await say(_data(self._event([], with_usage=True)))
        await say(b"data: [DONE]\n\n", more=False)

    def _route(self) -> dict[str, str]:
        """The header with the router's finding, empty where no router was asked."""
        route = self._choices[0].job.route
        return {"X-D2C-Route": json.dumps(route)} if route else {}

    def _usage(self) -> _Usage:
        job = self._choices[0].job
        n, m = len(job.prompt), sum(one.n_tokens for one in self._choices)
        return _Usage(prompt_tokens=n, prompt_tokens_details={"cached_tokens": job.n_cached},
                     completion_tokens=m, total_tokens=n + m)  # fmt: skip

    def _event(self, choices: list[_RunningChoice], with_usage: bool = False) -> _Completion:
        usage = {"usage": self._usage()} if with_usage else {}
        taken = [one.take(self._request, self._service.encoder) for one in choices]
        return _Completion(
            id=self._id, object=self._kind, created=self._created, choices=taken,
            model=self._service.metrics.name(self._choices[0].job.task),
            system_fingerprint="d2c-mlx", **usage,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Numbers and names of the reply for the log, no text of it."""
        facts: dict[str, Any] = {"id": self._id, "model": self._request.model[:80],
                                 "stream": self._request.stream}  # fmt: skip
        if self._choices:
            usage = self._usage()
            facts["task"] = self._service.metrics.name(self._choices[0].job.task)
            facts |= {"prompt_tokens": usage.prompt_tokens, "tokens": usage.completion_tokens,
                      **usage.prompt_tokens_details}  # fmt: skip
            facts["finish_reasons"] = [one.answer.finish_reason for one in self._choices]
        return facts


def _data(event: _Completion) -> bytes:
    return b"data: " + event.text() + b"\n\n"


async def _never() -> HttpMessage:
    raise AssertionError
