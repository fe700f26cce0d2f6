"""A connection to the server: checks a request, queues it, and replies as mlx-lm's handler does."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import socket
import socketserver
import time
from collections.abc import Callable
from email.message import Message
from http import HTTPStatus
from typing import Any, BinaryIO
from urllib.parse import unquote

import mlx.core as mx
from mlx_lm.generate import make_stop_sequences
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.server import APIHandler, CompletionRequest

from d2c_mlx.serve.connections import RequestReader, is_readable
from d2c_mlx.serve.requests import (
    RequestError,
    check_sampling,
    read_body,
    read_request,
    read_tool_calls,
)
from d2c_mlx.serve.scheduler import Job
from d2c_mlx.serve.service import PackService
from d2c_mlx.utils.errors import printable

__all__ = ["Handler"]

_log = logging.getLogger(__name__)
_CHAT = ("/v1/chat/completions", "/chat/completions")
_PATHS = (*_CHAT, "/v1/completions")
# Lower temperatures are greedy: a float16 logit divided by them would be infinite.
_LOWEST_TEMPERATURE = 0.01


class Handler(APIHandler):
    """One connection, on a thread of its own; mlx-lm's handler parses options and writes replies.

    Attributes:
        service: what it serves.
        job: the request in the scheduler; None before it is queued.
        begun: whether headers of the reply were sent.
    """

    max_tokens: int
    path: str
    rfile: BinaryIO

    def __init__(
        self,
        service: PackService,
        request: Any,  # noqa: ANN401  as http.server has them
        client_address: Any,  # noqa: ANN401
        server: socketserver.BaseServer,
    ) -> None:
        """Serve the connection until it ends; the last three are those of any request handler."""
        self.service = service
        self.timeout = service.limits.seconds
        self.job: Job | None = None
        self.begun = False
        # Tool calls of the model that could be parsed, and the text of those that could not.
        self._n_calls, self._unparsed_calls = 0, ""
        super().__init__(service, request, client_address, server, system_fingerprint="d2c-mlx")

    def setup(self) -> None:
        """Give the whole request a deadline."""
        super().setup()
        self.rfile = io.BufferedReader(RequestReader(self.connection, self.service.limits.seconds))

    def handle_one_request(self) -> None:
        """Serve the request; one that is late is refused."""
        self.requestline = self.request_version = self.command = ""
        try:
            super().handle_one_request()
        except RequestError as error:
            self.send_error(error.status, error.message)

    def parse_request(self) -> bool:
        """Parse the request line and headers as http.server does; a query is dropped."""
        good = super().parse_request()
        if good:
            self.path = self.path.partition("?")[0]
        return good

    def do_GET(self) -> None:
        """Answer `/health`, `/v1/models`, `/v1/models/NAME` and `/metrics`."""
        self.server.places.received(self.connection)
        try:
            self.service.access.check(self.headers)
            if self.path == "/health":
                self.handle_health_check()
            elif self.path == "/metrics":
                self._reply(200, self.service.metrics.render(), "text/plain; version=0.0.4")
            elif self.path == "/v1/models":
                models = [_describe(name) for name in self.service.names]
                self._json(200, {"object": "list", "data": models})
            elif self.path.startswith("/v1/models/"):
                name = unquote(self.path.removeprefix("/v1/models/"))
                self.service.check_model(name)
                self._json(200, _describe(name))
            else:
                raise RequestError(404, f"{self.path}: no such address; there is /v1/models")
        except RequestError as error:
            self._json(error.status, error.body)

    def do_OPTIONS(self) -> None:
        """Answer a browser's preflight request."""
        try:
            self.service.access.check(self.headers, is_preflight=True)
            super().do_OPTIONS()
        except RequestError as error:
            self._json(error.status, error.body)

    def do_POST(self) -> None:
        """Check the request, then let mlx-lm's handler read the checked body."""
        try:
            self.service.access.check(self.headers)
            if self.path not in _PATHS:
                raise RequestError(404, f"{self.path}: no such address; there is {_PATHS[0]}")
            raw = read_body(self.headers, self.rfile, self.service.limits.body_nbytes)
            self.server.places.received(self.connection)
            body = read_request(raw, self.path in _CHAT)
            self.service.check_model(body["model"])
            check_sampling(body, self.service.vocabulary)
            raw = json.dumps(body).encode()
            self.headers.replace_header("Content-Length", str(len(raw)))
            self.rfile = io.BytesIO(raw)
            self._answer()
        except RequestError as error:
            self._json(error.status, error.body)
        except OSError:
            self.service.metrics.disconnected.inc()
            self.close_connection = True

    def _answer(self) -> None:
        try:
            super().do_POST()
        except (OSError, RequestError):
            raise
        except Exception as error:  # mlx-lm's handler works on what a model wrote
            _log.exception("a reply failed")
            self._fail(f"the reply failed ({type(error).__name__})")

    def validate_model_parameters(self) -> None:
        """Run mlx-lm's own checks; raises RequestError (400) for what they refuse."""
        try:
            super().validate_model_parameters()
        except ValueError as error:
            raise RequestError(400, str(error)) from None

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]) -> None:
        """Queue the request, then reply as mlx-lm does while it is generated."""
        self.job = job = self._job(request, stop_words)
        self.service.scheduler.submit(job)
        try:
            if job.routing_prompt:
                job.wait_for_task(self._check_alive)
            self.requested_model = self.service.base_name if job.task is None else job.task
            context = self.service.generation_context(job.prompt, self._read_tool_calls)
            request.job = job, context, self._check_alive
            super().handle_completion(request, stop_words)
            self.service.metrics.replies.labels("200").inc()
        except RuntimeError as error:
            self._fail(str(error))
        finally:
            job.cancelled = True

    def generate_response(
        self,
        text: str,
        finish_reason: str | None,
        *counts: int | None,
        **more: Any,  # noqa: ANN401
    ) -> dict[str, Any]:
        """A reply, or a piece of a stream, with what mlx-lm lacks.

        mlx-lm counts pieces of text (see `scheduler`) instead of tokens, and has log-probabilities
        in no stream.
        """
        assert self.job
        # mlx-lm leaves out a tool call that cannot be parsed, and says that there is one.
        text, self._unparsed_calls = text + self._unparsed_calls, ""
        if finish_reason == "tool_calls" and not self._n_calls:
            finish_reason = "stop"
        if counts:
            counts = (counts[0], self.job.n_tokens, *counts[2:])
        reply = super().generate_response(text, finish_reason, *counts, **more)
        tokens, self.job.unsent = self.job.unsent, []
        if self.logprobs:
            content = self.service.logprobs(tokens)
            reply["choices"][0]["logprobs"] = {"content": content} if content else None
        return reply

    def completion_usage_response(self, *counts: int | None) -> dict[str, Any]:
        """The end of a stream, with tokens counted instead of pieces of text."""
        assert self.job
        return super().completion_usage_response(counts[0], self.job.n_tokens, *counts[2:])

    def _job(self, request: CompletionRequest, stop_words: list[str]) -> Job:
        options = self.chat_template_kwargs or {}
        service, name = self.service, self.requested_model
        routing_prompt: list[int] | None = None
        prompts: dict[str | None, list[int]] = {}
        if name in service.models:
            task = service.models[name]
            prompt = service.encode(request, options, service.systems.get(task))
        else:
            task = None
            routing_prompt, prompts = service.encode_to_route(request, options)
            prompt = max(prompts.values(), key=len)
        given = {"max_tokens", "max_completion_tokens"} & self.body.keys()
        self.max_tokens = service.fit_answer(len(prompt), self.max_tokens, bool(given))
        processors = make_logits_processors(
            self.logit_bias, self.repetition_penalty, self.repetition_context_size,
            self.presence_penalty, self.presence_context_size, self.frequency_penalty,
            self.frequency_context_size,
        )  # fmt: skip
        return Job(
            prompt, task, routing_prompt, self.max_tokens, self._sampler(), processors,
            make_stop_sequences(service.tokenizer), stop_words, prompts,
        )  # fmt: skip

    def _sampler(self) -> Callable[[mx.array], mx.array] | None:
        if self.temperature < _LOWEST_TEMPERATURE:
            return None
        # mlx-lm's sampler wants a top_k below the vocabulary; more are all tokens, which is 0.
        top_k = self.top_k if self.top_k < self.service.vocabulary else 0
        return make_sampler(
            self.temperature, self.top_p, self.min_p, top_k=top_k,
            xtc_probability=self.xtc_probability, xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=self.service.xtc_special_tokens,
        )  # fmt: skip

    def _read_tool_calls(self, text: str, tools: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        try:
            found = read_tool_calls(self.service.tokenizer.tool_parser, text, tools)
        except ValueError:
            self._unparsed_calls += text
            raise
        self._n_calls += len(found)
        return found

    def _check_alive(self) -> None:
        """Raises OSError if the client has left, RuntimeError if nothing more will come."""
        if not self.service.scheduler.alive:
            raise RuntimeError("the server stops")
        if is_readable(self.connection) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError

    def _fail(self, message: str) -> None:
        """Tell the client that the answer failed: in its stream if that began, else as a reply."""
        body = RequestError(500, message).body
        if self.begun:
            self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
            return
        # Drop the headers of the reply that failed.
        self._headers_buffer: list[bytes] = []
        self._json(500, body)

    def end_headers(self) -> None:
        """Send the headers."""
        super().end_headers()
        self.begun = True

    def send_error(self, code: int, message: str | None = None, _: str | None = None) -> None:
        """Reply in JSON to what http.server itself refuses, maybe before it has read headers."""
        self.headers = getattr(self, "headers", None) or Message()
        words = (message or HTTPStatus(code).phrase)[:200]
        if code == HTTPStatus.NOT_IMPLEMENTED:
            words = f"{self.command}: not supported, expected GET, POST or OPTIONS"
        self.close_connection = True
        self._json(code, RequestError(code, words).body)

    def _json(self, status: int, content: dict[str, Any]) -> None:
        self._reply(status, json.dumps(content, ensure_ascii=False).encode(), "application/json")

    def _reply(self, status: int, content: bytes, kind: str) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self._set_cors_headers()
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        self.service.metrics.replies.labels(str(status)).inc()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401  http.server's
        """Log address and status, never a prompt or an answer."""
        _log.info("%s", printable(format % args))


def _describe(name: str) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "d2c-mlx"}
