"""Checks of what clients send, and of tool calls that the model writes, before either is used."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from email.message import Message
from typing import Any, BinaryIO

from d2c_mlx.utils.parsing import parse_json

__all__ = [
    "RequestError",
    "check_request",
    "check_sampling",
    "field_error",
    "read_body",
    "read_request",
    "read_tool_calls",
]

# Most bytes of a body beyond the limit that are read and dropped.
_MAX_DRAIN = 16_000_000

# Fields that would be ignored silently, or give the client something else than it expects. The
# values listed have no effect, so they pass: client libraries send them unasked.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "response_format": ({"type": "text"},), "top_logprobs": (0, -1), "functions": ([],),
    "function_call": ("none",), "adapters": (), "draft_model": ("default_model",), "audio": (),
    "modalities": (["text"],), "prediction": (), "role_mapping": (),
    "parallel_tool_calls": (True,), "reasoning_effort": (), "ignore_eos": (False,),
    "min_tokens": (0,), "num_draft_tokens": (0,), "continue_final_message": (False,),
}  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,), "stream": (bool,), "tools": (list,), "chat_template_kwargs": (dict,),
    "max_tokens": (int,), "max_completion_tokens": (int,), "seed": (int,),
}  # fmt: skip
_PENALTY, _WINDOW = (float, -2, 2), (int, 0, 1_000_000)
# Type, lowest and highest value; 0 always passes. A value beyond would fail the batch, and with it
# the requests of others.
_RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 100), "top_p": (float, 1e-6, 1), "min_p": (float, 0, 1),
    "xtc_probability": (float, 0, 1), "xtc_threshold": (float, 0, 0.5),
    "top_k": (int, 0, 2**31 - 1), "presence_penalty": _PENALTY, "presence_context_size": _WINDOW,
    "frequency_penalty": _PENALTY, "frequency_context_size": _WINDOW,
    "repetition_penalty": (float, 0.01, 100), "repetition_context_size": _WINDOW,
    "seed": (int, -(2**63), 2**63 - 1),
}  # fmt: skip
# Most that is added to a logit: float16 holds it, and no logit comes near.
_MAX_BIAS = 10_000


class RequestError(Exception):
    """A request that the server refuses, or an answer that failed.

    Attributes:
        status: HTTP status code.
        message: what is wrong and what to do.
        field: name of the request's field at fault; None if it is no single field.
    """

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the reply, in the form of OpenAI's API."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        codes = {401: "invalid_api_key", 404: "not_found", 503: "overloaded"}
        return {"error": {"message": self.message, "type": kind, "param": self.field,
                          "code": codes.get(self.status)}}  # fmt: skip


def field_error(name: str, found: object, expected: str) -> RequestError:
    """The error (400) of a field whose value is not what was expected."""
    return RequestError(400, f"{name}: found {str(found)[:80]!r}, expected {expected}", name)


def read_body(headers: Message, file: BinaryIO, max_nbytes: int) -> bytes:
    """Read the body of a request, of at most `max_nbytes` bytes.

    Raises:
        RequestError: Content-Length is missing (411), not a number (400), or too large (413).
        RequestError: (408) it does not come in time.
        ConnectionAbortedError: the body ends before.
    """
    text = headers.get("Content-Length")
    if text is None:
        raise RequestError(411, "Content-Length: missing")
    if not text.isascii() or not text.isdigit():
        raise RequestError(400, f"Content-Length: found {text[:20]!r}, expected a number")
    if len(text) > 12 or int(text) > max_nbytes:
        # Unread bytes would reset the connection before the client has read the reply.
        left = min(int(text[:12]), _MAX_DRAIN)
        with contextlib.suppress(OSError, RequestError):
            while left > 0 and (chunk := file.read(min(left, 1 << 16))):
                left -= len(chunk)
        raise RequestError(413, f"the body has {text[:20]} bytes, this server takes {max_nbytes:,}")
    raw = file.read(int(text))
    if len(raw) < int(text):
        raise ConnectionAbortedError
    return raw


def read_request(raw: bytes, chat: bool) -> dict[str, Any]:
    """Parse and check the body of a completion request.

    Args:
        raw: the body, JSON in UTF-8.
        chat: the request has `messages`; if not, a `prompt`.

    Returns:
        The fields, without those that are null, in the form that mlx-lm's handler reads. Numbers of
        sampling are not checked yet, see `check_sampling`.

    Raises:
        RequestError: (400) not a JSON object, or the first field that is missing, of a wrong type,
            or not supported.
    """
    try:
        body = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise RequestError(400, f"the body is a {type(body).__name__}, expected a JSON object")
    # Null means that the field was left out.
    body = {key: value for key, value in body.items() if value is not None}
    check_request(body, chat)
    if body.pop("tool_choice", "auto") == "none":
        body.pop("tools", None)
    if "stream_options" in body:
        body["stream_options"] = {"include_usage": False, **body["stream_options"]}
    return body


def check_request(body: Mapping[str, Any], chat: bool) -> None:
    """Check the fields of a completion request; see `read_request`.

    Raises:
        RequestError: (400) the first field that is wrong.
    """
    for name, harmless in _UNSUPPORTED.items():
        if name in body and not any(_same(body[name], one) for one in harmless):
            raise RequestError(400, f"{name}: not supported; leave it out", name)
    for name, types in _TYPES.items():
        good = isinstance(body.get(name), types)
        if name in body and (not good or (isinstance(body[name], bool) and bool not in types)):
            raise field_error(name, body[name], types[0].__name__)
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name, 1) < 1:
            raise field_error(name, body[name], "1 or more")
    if body.get("tool_choice", "auto") not in ("auto", "none"):
        raise field_error("tool_choice", body["tool_choice"], "auto or none")
    if "model" not in body:
        raise RequestError(400, "model: missing, expected the name of a task", "model")
    if "seed" in body and body.get("temperature", 0) != 0:
        raise RequestError(
            400, "seed: a batch has one stream of random numbers; leave it out", "seed"
        )
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise field_error("stream_options", options, '{"include_usage": bool}')
    _check_stop(body.get("stop", []))
    if chat:
        _check_messages(body.get("messages"))
    elif not isinstance(body.get("prompt"), str) or not body["prompt"]:
        raise field_error("prompt", body.get("prompt"), "a string that is not empty")


def check_sampling(body: dict[str, Any], vocabulary: int) -> None:
    """Check the numbers of sampling: temperature, penalties, `logit_bias` and the like.

    Args:
        body: of a request; whole numbers become floats in place, where mlx-lm asks for floats.
        vocabulary: number of token ids that the model knows.

    Raises:
        RequestError: (400) the first number out of range.
    """
    for name, (kind, low, high) in _RANGES.items():
        if name not in body:
            continue
        if not _in_range(body[name], kind, low, high):
            zero = "0, or " if low > 0 else ""
            what = "a whole number" if kind is int else "a number"
            raise field_error(name, body[name], f"{zero}{what} from {low} to {high}")
        body[name] = kind(body[name])
    bias = body.get("logit_bias", {})
    if not isinstance(bias, dict):
        raise field_error("logit_bias", bias, "an object: token id -> number")
    for token, value in bias.items():
        # int() accepts more than digits.
        if not re.fullmatch("[0-9]{1,9}", token) or int(token) >= vocabulary:
            raise field_error("logit_bias", token, f"token ids below {vocabulary}")
        if not _in_range(value, float, -_MAX_BIAS, _MAX_BIAS):
            raise field_error("logit_bias", value, f"numbers from {-_MAX_BIAS} to {_MAX_BIAS}")


def read_tool_calls(parser: Callable[..., Any], text: str, tools: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Parse a tool call that the model wrote, and check it.

    Args:
        parser: mlx-lm's for this model.
        text: of the call.
        tools: those of the request.

    Returns:
        Calls with a name and arguments, as mlx-lm's handler needs them.

    Raises:
        ValueError: not a call. It is logged, so the message holds nothing of the text.
    """
    try:
        found = parser(text, tools)
    except Exception as error:  # parsers trust what they read
        raise ValueError(f"the parser fails, {type(error).__name__}") from None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise ValueError("expected an object with a name")
    for one in calls:
        one.setdefault("arguments", {})
    return calls


def _same(value: object, harmless: object) -> bool:
    return type(value) is type(harmless) and value == harmless


def _in_range(value: object, kind: type, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return value == 0 or low <= value <= high


def _check_stop(stop: object) -> None:
    words = [stop] if isinstance(stop, str) else stop
    if not (
        isinstance(words, list) and len(words) <= 16
        and all(isinstance(one, str) and 0 < len(one) <= 256 for one in words)
    ):  # fmt: skip
        raise field_error("stop", stop, "a string, or a list of 16 at most, of 1 to 256 characters")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise field_error("messages", messages, "a list that is not empty")
    for i, one in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise field_error(where, one, "an object with role and content")
        content = one.get("content")
        parts = content if isinstance(content, list) else []
        # mlx-lm would fetch an image from its address.
        if not all(
            isinstance(part, dict) and part.get("type") == "text"
            and isinstance(part.get("text"), str) for part in parts
        ):  # fmt: skip
            raise RequestError(
                400, f"{where}.content: only parts of text are supported", "messages"
            )
        if not isinstance(content, str | list) and "tool_calls" not in one:
            raise field_error(f"{where}.content", content, "a string or a list of parts of text")
