"""What a request to the server may say, and a model that calls tools: checked before it is used."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Collection, Mapping
from email.message import Message
from typing import Any, BinaryIO

from d2c_mlx.utils.parsing import parse_json

__all__ = [
    "Refusal", "check_origin", "check_request", "check_token", "odd", "read_body", "read_request",
    "read_tool_calls",
]  # fmt: skip

# Bytes of a body that is too large that are read and forgotten.
_DRAIN = 16_000_000

# What would be silently ignored, or change what the client thinks it gets. Values that are the
# same as none are let through: libraries send them unasked.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",),
    "response_format": ({"type": "text"},), "top_logprobs": (0, -1), "functions": ([],),
    "function_call": ("none",), "adapters": (), "draft_model": ("default_model",), "audio": (),
    "modalities": (["text"],), "prediction": (), "role_mapping": (),
    "parallel_tool_calls": (True,), "reasoning_effort": (), "ignore_eos": (False,),
    "min_tokens": (0,), "num_draft_tokens": (0,), "continue_final_message": (False,),
}  # fmt: skip
_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,), "stream": (bool,), "tools": (list,), "chat_template_kwargs": (dict,),
    "max_tokens": (int,), "max_completion_tokens": (int,), "seed": (int,),
}  # fmt: skip


class Refusal(Exception):
    """A request that is not served.

    Attributes:
        status: of HTTP.
        message: what is wrong and what to do.
        field: of the request, if it is one.
    """

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API words errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        codes = {401: "invalid_api_key", 404: "not_found", 503: "overloaded"}
        return {"error": {"message": self.message, "type": kind, "param": self.field,
                          "code": codes.get(self.status)}}  # fmt: skip


def check_token(headers: Message, token: str | None) -> None:
    """Raises Refusal (401) for a request without the server's token, if there is one."""
    brought = headers.get("Authorization", "")
    # Schemes are the same in any case.
    if brought[:7].lower() == "bearer ":
        brought = brought[7:]
    if token is not None and not hmac.compare_digest(brought.encode(), token.encode()):
        raise Refusal(401, "Authorization: expected Bearer and this server's token")


def check_origin(headers: Message, allowed: Collection[str]) -> None:
    """Raises Refusal (403) for a web page that is not allowed.

    One that the user happens to look at must not talk to the model.
    """
    origin = headers.get("Origin")
    if origin is not None and origin not in allowed and "*" not in allowed:
        raise Refusal(403, f"Origin {origin}: not allowed; start with --allow-origin {origin}")


def read_body(headers: Message, file: BinaryIO, most: int) -> bytes:
    """A request's body of `most` bytes at most.

    Raises:
        Refusal: its length is not said (411), no number (400), or too large (413).
        ConnectionAbortedError: it ends before.
    """
    text = headers.get("Content-Length")
    if text is None:
        raise Refusal(411, "Content-Length: missing")
    if not text.isascii() or not text.isdigit():
        raise Refusal(400, f"Content-Length: found {text[:20]!r}, expected a number")
    if len(text) > 12 or int(text) > most:
        # Unread bytes would reset the connection before the client has read why.
        left = min(int(text[:12]), _DRAIN)
        with contextlib.suppress(OSError):
            while left > 0 and (some := file.read(min(left, 1 << 16))):
                left -= len(some)
        raise Refusal(413, f"the body has {text[:20]} bytes, this server takes {most:,}")
    raw = file.read(int(text))
    if len(raw) < int(text):
        raise ConnectionAbortedError
    return raw


def read_request(raw: bytes, chat: bool) -> dict[str, Any]:
    """A request's body, checked, and with what mlx-lm's handler expects to be there.

    Raises:
        Refusal: (400) it is no JSON object, or has fields that are missing, of another kind, or not
            supported.
    """
    try:
        body = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"the body is a {type(body).__name__}, expected a JSON object")
    # Null is what a field is that was left out.
    body = {key: value for key, value in body.items() if value is not None}
    check_request(body, chat)
    if body.pop("tool_choice", "auto") == "none":
        body.pop("tools", None)
    if "stream_options" in body:
        body["stream_options"] = {"include_usage": False, **body["stream_options"]}
    return body


def check_request(body: Mapping[str, Any], chat: bool) -> None:
    """Raises Refusal (400) for the first field that is wrong."""
    for name, harmless in _UNSUPPORTED.items():
        if name in body and not any(_same(body[name], one) for one in harmless):
            raise Refusal(400, f"{name}: not supported; leave it out", name)
    for name, kinds in _KINDS.items():
        good = isinstance(body.get(name), kinds)
        if name in body and (not good or (isinstance(body[name], bool) and bool not in kinds)):
            raise odd(name, body[name], kinds[0].__name__)
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name, 1) < 1:
            raise odd(name, body[name], "1 or more")
    if body.get("tool_choice", "auto") not in ("auto", "none"):
        raise odd("tool_choice", body["tool_choice"], "auto or none")
    if "model" not in body:
        raise Refusal(400, "model: missing, expected the name of a task", "model")
    if "seed" in body and body.get("temperature", 0) != 0:
        raise Refusal(400, "seed: a batch has one stream of random numbers; leave it out", "seed")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise odd("stream_options", options, '{"include_usage": bool}')
    _check_stop(body.get("stop", []))
    if chat:
        _check_messages(body.get("messages"))
    elif not isinstance(body.get("prompt"), str) or not body["prompt"]:
        raise odd("prompt", body.get("prompt"), "a string that is not empty")


def _same(value: object, harmless: object) -> bool:
    return type(value) is type(harmless) and value == harmless


def odd(name: str, found: object, expected: str) -> Refusal:
    """A field of a request is not what was expected."""
    return Refusal(400, f"{name}: found {str(found)[:80]!r}, expected {expected}", name)


def read_tool_calls(parser: Callable[..., Any], text: str, tools: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """What mlx-lm's parser finds in a model's call of tools, with what mlx-lm's handler expects.

    Raises:
        ValueError: it is no call. That is logged, so the message has nothing of the text.
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


def _check_stop(stop: object) -> None:
    words = [stop] if isinstance(stop, str) else stop
    if not (
        isinstance(words, list) and len(words) <= 16
        and all(isinstance(one, str) and 0 < len(one) <= 256 for one in words)
    ):  # fmt: skip
        raise odd("stop", stop, "a string, or a list of 16 at most, of 1 to 256 characters")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise odd("messages", messages, "a list that is not empty")
    for i, one in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise odd(where, one, "an object with role and content")
        content = one.get("content")
        parts = content if isinstance(content, list) else []
        # mlx-lm would fetch the address of an image.
        if not all(
            isinstance(part, dict) and part.get("type") == "text"
            and isinstance(part.get("text"), str) for part in parts
        ):  # fmt: skip
            raise Refusal(400, f"{where}.content: only parts of text are supported", "messages")
        if not isinstance(content, str | list) and "tool_calls" not in one:
            raise odd(f"{where}.content", content, "a string or a list of parts of text")
