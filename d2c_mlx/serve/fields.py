"""Types of fields of requests, each with its check: what it takes, in the words of its message."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import PlainValidator, ValidationInfo

from d2c_mlx.utils.validation import expects, refused

__all__ = [
    "Bias",
    "Lora",
    "Messages",
    "Scales",
    "Schema",
    "StopWords",
    "StreamOptions",
    "ToolChoice",
    "number",
]

# Most that is added to a logit: float16 holds it, and no logit comes near.
_MAX_BIAS = 10_000
# Most that an update is multiplied by: far beyond, its row would be no number.
_MAX_SCALE = 16


def _in_range(value: object, kind: type, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return value == 0 or low <= value <= high


def number(kind: type, low: float, high: float) -> PlainValidator:
    """A number in a range; 0 always passes.

    A value beyond would fail the batch, and with it the requests of others.
    """
    zero, what = "0, or " if low > 0 else "", "a whole number" if kind is int else "a number"

    def check(value: object) -> Any:  # noqa: ANN401  an int or a float
        if not _in_range(value, kind, low, high):
            raise expects(f"{zero}{what} from {low} to {high}")
        return kind(value)

    return PlainValidator(check)


def _stop_words(stop: object) -> list[str]:
    words = [stop] if isinstance(stop, str) else stop
    if not (
        isinstance(words, list) and len(words) <= 16
        and all(isinstance(one, str) and 0 < len(one) <= 256 for one in words)
    ):  # fmt: skip
        raise expects("a string, or a list of 16 at most, of 1 to 256 characters")
    return words


def _stream_options(options: object) -> dict[str, Any]:
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise expects('{"include_usage": bool}')
    return options


def _tool_choice(choice: object) -> str:
    if choice not in ("auto", "none"):
        raise expects("auto or none")
    return str(choice)


def _bias(bias: object, info: ValidationInfo) -> dict[int, float]:
    if not isinstance(bias, dict):
        raise expects("an object: token id -> number")
    vocabulary = (info.context or {}).get("vocabulary", 1 << 31)
    for token, value in bias.items():
        # int() accepts more than digits.
        if not re.fullmatch("[0-9]{1,9}", token) or int(token) >= vocabulary:
            raise refused(f"found {token[:80]!r}, expected token ids below {vocabulary}")
        if not _in_range(value, float, -_MAX_BIAS, _MAX_BIAS):
            raise refused(
                f"found {str(value)[:80]!r}, expected numbers from {-_MAX_BIAS} to {_MAX_BIAS}"
            )
    return {int(token): float(value) for token, value in bias.items()}


def _schema(about: object) -> str | None:
    """The JSON schema of a `response_format`, as JSON; None is any text."""
    about = about if isinstance(about, dict) else {}
    inner = about.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if about.get("type") == "json_schema" and isinstance(schema, dict):
        return json.dumps(schema)
    if about.get("type") == "json_object":
        return '{"type": "object"}'
    if about.get("type") != "text":
        raise expects('{"type": "text"}, "json_object", or "json_schema" with a schema')
    return None


def _lora(scales: object) -> dict[int, float]:
    found = _scales(scales)
    if sum(scale != 0 for scale in found.values()) > 1:
        raise refused("found several adapters, expected one whose scale is not 0: a row has one")
    return found


def _scales(scales: object) -> dict[int, float]:
    if not isinstance(scales, list) or not all(
        isinstance(one, dict) and type(one.get("id")) is int
        and _in_range(one.get("scale"), float, -_MAX_SCALE, _MAX_SCALE) for one in scales
    ):  # fmt: skip
        raise expects(
            f'a list of {{"id": int, "scale": number from -{_MAX_SCALE} to {_MAX_SCALE}}}'
        )
    return {one["id"]: float(one["scale"]) for one in scales}


def _messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise expects("a list that is not empty")
    for i, one in enumerate(messages):
        where = f"in message {i} "
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise refused(f"{where}found {str(one)[:80]!r}, expected an object with role, content")
        content = one.get("content")
        parts = content if isinstance(content, list) else []
        # Nothing is fetched, not even an image from its address.
        if not all(
            isinstance(part, dict) and part.get("type") == "text"
            and isinstance(part.get("text"), str) for part in parts
        ):  # fmt: skip
            raise refused(f"{where}content: only parts of text are supported")
        if not isinstance(content, str | list) and "tool_calls" not in one:
            raise refused(
                f"{where}content: found {str(content)[:80]!r}, expected a string or a list of"
                " parts of text"
            )
    return messages


Bias = Annotated[dict[int, float], PlainValidator(_bias)]
Lora = Annotated[dict[int, float] | None, PlainValidator(_lora)]
Messages = Annotated[list[dict[str, Any]], PlainValidator(_messages)]
Scales = Annotated[dict[int, float], PlainValidator(_scales)]
Schema = Annotated[str | None, PlainValidator(_schema)]
StopWords = Annotated[list[str], PlainValidator(_stop_words)]
StreamOptions = Annotated[dict[str, Any], PlainValidator(_stream_options)]
ToolChoice = Annotated[str, PlainValidator(_tool_choice)]
