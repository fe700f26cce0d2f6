"""Requests of OpenAI's API as pydantic models, and what is refused by name."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from d2c_mlx.utils.parsing import parse_json
from d2c_mlx.utils.validation import expects, problems_of, refused

__all__ = [
    "ChatRequest",
    "Request",
    "RequestError",
    "ScalesRequest",
    "TextRequest",
    "LoadRequest",
    "field_error",
    "read_fields",
    "read_object",
    "read_json",
    "read_request",
]

T = TypeVar("T", bound=BaseModel)

# Fields that would be ignored silently, or give the client something else than it expects. The
# values listed have no effect, so they pass: client libraries send them unasked.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "functions": ([],),
    "function_call": ("none",), "adapters": (), "draft_model": ("default_model",), "audio": (),
    "modalities": (["text"],), "prediction": (), "role_mapping": (),
    "parallel_tool_calls": (True,), "reasoning_effort": (), "ignore_eos": (False,),
    "min_tokens": (0,), "num_draft_tokens": (0,), "continue_final_message": (False,),
    # Ollama's, which Open WebUI's settings have beside OpenAI's.
    "repeat_penalty": (1, 1.0), "mirostat": (0,), "tfs_z": (1, 1.0), "typical_p": (1, 1.0),
    "num_predict": (), "format": ("",), "think": (),
}  # fmt: skip
# Most that is added to a logit: float16 holds it, and no logit comes near.
_MAX_BIAS = 10_000
# Most that an update is multiplied by: far beyond, its row would be no number.
_MAX_SCALE = 16


class RequestError(Exception):
    """A request that the server refuses, or an answer that failed.

    Attributes:
        status: HTTP status code.
        message: what is wrong and what to do.
        field: name of the request's field at fault; None if it is no single field.
        kind: type of the error in vLLM's API, which has the status as its code; None in OpenAI's.
    """

    def __init__(
        self, status: int, message: str, field: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.kind = status, message, field, kind

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the reply, in the form of OpenAI's API."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        codes = {401: "invalid_api_key", 404: "not_found", 503: "overloaded"}
        code = self.status if self.kind else codes.get(self.status)
        return {"error": {"message": self.message, "type": self.kind or kind,
                          "param": self.field, "code": code}}  # fmt: skip


def field_error(name: str, found: object, expected: str) -> RequestError:
    """The error (400) of a field whose value is not what was expected."""
    return RequestError(400, f"{name}: found {str(found)[:80]!r}, expected {expected}", name)


def _in_range(value: object, kind: type, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return value == 0 or low <= value <= high


def _number(kind: type, low: float, high: float) -> PlainValidator:
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


_Penalty = Annotated[float, _number(float, -2, 2)]
_Window = Annotated[int, _number(int, 0, 1_000_000)]


class Request(BaseModel):
    """The fields that chats and texts have in common; unknown ones are passed over.

    Attributes:
        model: the task that is asked, see `PackService.models`.
        max_tokens: most tokens of the answer; None is the default.
        response_format: JSON schema of the answer, as JSON; None is any text.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    model: str = Field(json_schema_extra={"missing": "missing, expected the name of a task"})
    stream: bool = False
    stream_options: Annotated[dict[str, Any], PlainValidator(_stream_options)] = {}
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[str], PlainValidator(_stop_words)] = []
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=-1, le=20)
    n: int = Field(1, ge=1, le=16)
    response_format: Annotated[str | None, PlainValidator(_schema)] = None
    temperature: Annotated[float, _number(float, 0, 100)] = 0.0
    top_p: Annotated[float, _number(float, 1e-6, 1)] = 1.0
    min_p: Annotated[float, _number(float, 0, 1)] = 0.0
    top_k: Annotated[int, _number(int, 0, 2**31 - 1)] = 0
    xtc_probability: Annotated[float, _number(float, 0, 1)] = 0.0
    xtc_threshold: Annotated[float, _number(float, 0, 0.5)] = 0.1
    presence_penalty: _Penalty = 0.0
    presence_context_size: _Window = 20
    frequency_penalty: _Penalty = 0.0
    frequency_context_size: _Window = 20
    repetition_penalty: Annotated[float, _number(float, 0.01, 100)] = 0.0
    repetition_context_size: _Window = 20
    logit_bias: Annotated[dict[int, float], PlainValidator(_bias)] = {}
    lora: Annotated[dict[int, float] | None, PlainValidator(_lora)] = None
    seed: Annotated[int | None, _number(int, -(2**63), 2**63 - 1)] = None

    @field_validator("seed", mode="after")
    @classmethod
    def _is_its_own(cls, seed: int | None, info: ValidationInfo) -> int | None:
        if seed is not None and info.data.get("xtc_probability"):
            raise refused("XTC draws from the numbers of the whole batch; leave out one of the two")
        return seed

    @field_validator("top_logprobs", mode="after")
    @classmethod
    def _has_logprobs(cls, number: int, info: ValidationInfo) -> int:
        if number > 0 and not info.data.get("logprobs"):
            raise refused("needs logprobs true")
        return number

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer; None if the request leaves it open."""
        return self.max_completion_tokens or self.max_tokens


class LoadRequest(BaseModel):
    """A request to load an adapter or unload it, as vLLM has it; `pinned` is SGLang's."""

    model_config = ConfigDict(strict=True, frozen=True)

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    pinned: bool = False


class ScalesRequest(BaseModel):
    """A request to `/lora-adapters`, as llama.cpp has it: id of an adapter -> its scale."""

    scales: Annotated[dict[int, float], PlainValidator(_scales)]


class ChatRequest(Request):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], PlainValidator(_messages)] = Field(
        json_schema_extra={"missing": "missing, expected a list that is not empty"}
    )
    tools: list[Any] = []
    tool_choice: Annotated[str, PlainValidator(_tool_choice)] = "auto"
    chat_template_kwargs: dict[str, Any] = {}


class TextRequest(Request):
    """A request to `/v1/completions`."""

    prompt: str = Field(min_length=1, json_schema_extra={"expected": "a string that is not empty"})


def read_request(raw: bytes, chat: bool, vocabulary: int = 1 << 31) -> ChatRequest | TextRequest:
    """Parse and check the body of a completion request.

    Args:
        raw: the body, JSON in UTF-8.
        chat: the request has `messages`; if not, a `prompt`.
        vocabulary: number of token ids that the model knows.

    Raises:
        RequestError: (400) not a JSON object, or the first field that is missing, of a wrong type,
            out of its range, or not supported.
    """
    body = read_object(raw)
    for name, harmless in _UNSUPPORTED.items():
        if name in body and not any(_same(body[name], one) for one in harmless):
            raise RequestError(400, f"{name}: not supported; leave it out (in a chat program, clear"
                                    " that setting)", name)  # fmt: skip
    if not chat:
        return read_fields(TextRequest, body, vocabulary=vocabulary)
    found = read_fields(ChatRequest, body, vocabulary=vocabulary)
    return found.model_copy(update={"tools": []}) if found.tool_choice == "none" else found


def read_json(raw: bytes) -> Any:  # noqa: ANN401  JSON is any
    """Parse a body; raises RequestError (400) if it is no JSON."""
    try:
        return parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({error})") from None


def read_object(raw: bytes) -> dict[str, Any]:
    """Parse a body; raises RequestError (400) if it is no JSON object.

    Null means that a field was left out.
    """
    body = read_json(raw)
    if not isinstance(body, dict):
        raise RequestError(400, f"the body is a {type(body).__name__}, expected a JSON object")
    return {key: value for key, value in body.items() if value is not None}


def read_fields(kind: type[T], body: dict[str, Any], **context: object) -> T:
    """Make a model of a body; raises RequestError (400) for the first field that is wrong."""
    try:
        return kind.model_validate(body, context=context)
    except ValidationError as error:
        first = problems_of(error, kind, body)[0]
        raise RequestError(400, str(first), first.field) from None


def _same(value: object, harmless: object) -> bool:
    return type(value) is type(harmless) and value == harmless
