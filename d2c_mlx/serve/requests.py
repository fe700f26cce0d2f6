"""Requests of OpenAI's API as pydantic models, and what is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from d2c_mlx.utils.parsing import parse_json

__all__ = [
    "ChatRequest",
    "LoadRequest",
    "Request",
    "RequestError",
    "TextRequest",
    "field_error",
    "read_fields",
    "read_object",
    "read_request",
    "read_scales",
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
        error = {"message": self.message, "type": self.kind or kind, "param": self.field}
        return {"error": {**error, "code": code}}


def field_error(name: str, value: object, expected: str) -> RequestError:
    """The error (400) of a field whose value is not what was expected."""
    return RequestError(400, f"{name}: found {str(value)[:80]!r}, expected {expected}", name)


def _zero_or(least: float) -> AfterValidator:
    """A number that is 0 or at least this: one between would make numbers infinite."""

    def check(value: float) -> float:
        if value and value < least:
            raise ValueError(f"Input should be 0, or at least {least}")
        return value

    return AfterValidator(check)


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _StreamOptions(_Fields):
    include_usage: bool = False


class _JsonSchema(_Fields):
    model_config = ConfigDict(protected_namespaces=())
    content: dict[str, Any] = Field(alias="schema")


class _ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> _ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema: missing")
        return self


class _Scale(_Fields):
    # Far beyond 16, the row would be no number.
    id: int
    scale: float = Field(ge=-16, le=16)


def _one_adapter(scales: list[_Scale]) -> list[_Scale]:
    if sum(entry.scale != 0 for entry in scales) > 1:
        raise ValueError("Only one scale may not be 0: a row has one adapter")
    return scales


class _Part(_Fields):
    # Nothing is fetched, not even an image from its address.
    type: Literal["text"]
    text: str


class _Message(_Fields):
    model_config = ConfigDict(extra="allow")
    role: str
    content: Annotated[
        list[_Part],
        BeforeValidator(lambda x: [{"type": "text", "text": x}] if isinstance(x, str) else x),
    ] = []
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_content(cls, message: Any) -> Any:  # noqa: ANN401  before it is checked
        """Only a message with calls of tools may have no content."""
        if isinstance(message, dict) and message.get("content") is None:
            if not message.get("tool_calls"):
                raise ValueError("content: missing")
            message = {key: value for key, value in message.items() if key != "content"}
        return message

    def plain(self) -> dict[str, Any]:
        """The message as chat templates read it: a string, arguments of calls as objects."""
        fields = self.model_dump(exclude_none=True)
        fields["content"] = "".join(part.text for part in self.content)
        for call in fields.get("tool_calls", ()):
            function = call.get("function") or {}
            if isinstance(function.get("arguments"), str) and function["arguments"]:
                function["arguments"] = json.loads(function["arguments"])
        return fields


# float16 holds 10,000, and no logit comes near.
_Bias = Annotated[float, Field(ge=-10_000, le=10_000)]
_TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_StopWord = Annotated[str, Field(min_length=1, max_length=256)]
_Window = Annotated[int, Field(ge=0, le=1_000_000)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class Request(_Fields):
    """The fields that chats and texts have in common; unknown ones are passed over.

    A number beyond its range would fail the batch, and with it the requests of others.

    Attributes:
        model: the task that is asked, see `PackService.models`.
    """

    model: str
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[
        list[_StopWord],
        Field(max_length=16),
        BeforeValidator(lambda x: [x] if isinstance(x, str) else x),
    ] = []
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=-1, le=20)
    n: int = Field(1, ge=1, le=16)
    response_format: _ResponseFormat | None = None
    temperature: float = Field(0.0, ge=0, le=100)
    top_p: Annotated[float, Field(ge=0, le=1), _zero_or(1e-6)] = 1.0
    min_p: float = Field(0.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    xtc_probability: float = Field(0.0, ge=0, le=1)
    xtc_threshold: float = Field(0.1, ge=0, le=0.5)
    presence_penalty: _Penalty = 0.0
    presence_context_size: _Window = 20
    frequency_penalty: _Penalty = 0.0
    frequency_context_size: _Window = 20
    repetition_penalty: Annotated[float, Field(ge=0, le=100), _zero_or(0.01)] = 0.0
    repetition_context_size: _Window = 20
    logit_bias: dict[_TokenId, _Bias] = {}
    lora: Annotated[list[_Scale], AfterValidator(_one_adapter)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer; None if the request leaves it open."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def schema_text(self) -> str | None:
        """The JSON schema of the answer; None is any text."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.json_schema is None or asked.type == "json_object":
            return '{"type": "object"}'
        return json.dumps(asked.json_schema.content)


class ChatRequest(Request):
    """A request to `/v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    tools: list[Any] = []
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, Any] = {}


class TextRequest(Request):
    """A request to `/v1/completions`."""

    prompt: str = Field(min_length=1)


class LoadRequest(_Fields):
    """A request to load an adapter or unload it, as vLLM has it; `pinned` is SGLang's."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    pinned: bool = False
    is_3d_lora_weight: Literal[False] = False


def read_request(raw: bytes, chat: bool) -> ChatRequest | TextRequest:
    """Parse and check the body of a completion request.

    Args:
        raw: the body, JSON in UTF-8.
        chat: the request has `messages`; if not, a `prompt`.

    Raises:
        RequestError: (400) not a JSON object, or the first field that is missing, of a wrong type,
            out of its range, or not supported.
    """
    body = read_object(raw)
    for name, harmless in _UNSUPPORTED.items():
        values = [value for value in harmless if type(value) is type(body.get(name))]
        if name in body and body[name] not in values:
            advice = "leave it out (in a chat program, clear that setting)"
            raise RequestError(400, f"{name}: not supported; {advice}", name)
    request = read_fields(ChatRequest, body) if chat else read_fields(TextRequest, body)
    if request.seed is not None and request.xtc_probability:
        why = "XTC draws from the numbers of the whole batch; leave out one of the two"
        raise RequestError(400, f"seed: {why}", "seed")
    if request.top_logprobs > 0 and not request.logprobs:
        raise RequestError(400, "top_logprobs: needs logprobs true", "top_logprobs")
    return request


def read_object(raw: bytes) -> dict[str, Any]:
    """Parse a body; raises RequestError (400) if it is no JSON object.

    Null means that a field was left out.
    """
    body = _parse(raw)
    if not isinstance(body, dict):
        raise RequestError(400, f"the body is a {type(body).__name__}, expected a JSON object")
    return {key: value for key, value in body.items() if value is not None}


def read_fields(kind: type[T], body: dict[str, Any]) -> T:
    """Make a model of a body; raises RequestError (400) for the first field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error) from None


def read_scales(raw: bytes) -> dict[int, float]:
    """Read the body of llama.cpp's `/lora-adapters`: id of an adapter -> its scale.

    Raises:
        RequestError: (400) not a list of ids and scales.
    """
    try:
        scales = TypeAdapter(list[_Scale]).validate_python(_parse(raw))
    except ValidationError as error:
        raise _refusal(error) from None
    return {entry.id: entry.scale for entry in scales}


def _parse(raw: bytes) -> Any:  # noqa: ANN401  JSON is any
    try:
        return parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({error})") from None


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors()[0]
    place = ".".join(str(part)[:80] for part in first["loc"])
    field = str(first["loc"][0]) if first["loc"] else None
    message = first["msg"].removeprefix("Value error, ")
    return RequestError(400, f"{place or 'the body'}: {message}", field)
