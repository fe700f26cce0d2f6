"""Requests of OpenAI's API as pydantic models, and what is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
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
    "read_request",
]

T = TypeVar("T", bound=BaseModel)

# Fields that would be ignored silently, or give the client something else than it expects. The
# values listed have no effect, so they pass: client libraries send them unasked.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "functions": ([],),
    "function_call": ("none",), "adapters": (), "draft_model": ("default_model",), "audio": (),
    "modalities": (["text"],), "prediction": (), "role_mapping": (),
    "parallel_tool_calls": (True,), "reasoning_effort": (), "ignore_eos": (False,),
    "min_tokens": (0,), "num_draft_tokens": (0,), "continue_final_message": (False,),
    "xtc_probability": (0, 0.0), "lora": (),
    # SGLang's and vLLM's, of adapters that are loaded.
    "pinned": (False,), "is_3d_lora_weight": (False,),
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
    """

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body of the reply, in the form of OpenAI's API."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        code = {401: "invalid_api_key", 404: "not_found", 503: "overloaded"}.get(self.status)
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": code}}


def field_error(name: str, value: object, expected: str) -> RequestError:
    """The error (400) of a field whose value is not what was expected."""
    return RequestError(400, f"{name}: found {str(value)[:80]!r}, expected {expected}", name)


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _StreamOptions(_Fields):
    include_usage: bool = False


class _JsonSchema(_Fields):
    model_config = ConfigDict(protected_namespaces=())
    content: dict[str, Any] = Field(alias="schema")


class _Format(_Fields):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: _JsonSchema | None = None


class _Part(_Fields):
    # Nothing is fetched, not even an image from its address.
    type: Literal["text"]
    text: str


class _Message(_Fields):
    model_config = ConfigDict(extra="allow")
    role: str
    content: Annotated[
        list[_Part] | None,
        BeforeValidator(lambda x: [{"type": "text", "text": x}] if isinstance(x, str) else x),
    ] = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> _Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: missing; only a message with calls of tools has none")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates read it: a string, arguments of calls as objects."""
        fields = self.model_dump(exclude_none=True)
        fields["content"] = "".join(part.text for part in self.content or ())
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
    max_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    stop: Annotated[
        list[_StopWord],
        Field(max_length=16),
        BeforeValidator(lambda x: [x] if isinstance(x, str) else x),
    ] = []
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=-1, le=20)
    response_format: _Format = _Format()
    temperature: float = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=1e-6, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    presence_penalty: _Penalty = 0.0
    presence_context_size: _Window = 20
    frequency_penalty: _Penalty = 0.0
    frequency_context_size: _Window = 20
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    repetition_context_size: _Window = 20
    logit_bias: dict[_TokenId, _Bias] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @property
    def schema_text(self) -> str | None:
        """The JSON schema of the answer; None is any text. Raises RequestError (400)."""
        asked = self.response_format
        if asked.type != "json_schema":
            return '{"type": "object"}' if asked.type == "json_object" else None
        if asked.json_schema is None:
            raise field_error("response_format", asked.type, "json_schema with the schema in it")
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
    """A request to load an adapter or unload it, as vLLM has it."""

    lora_name: str
    lora_path: str = ""
    load_inplace: bool = False


def read_request(raw: bytes, kind: type[T]) -> T:
    """Parse and check the body of a request; null means that a field was left out.

    Args:
        raw: the body, JSON in UTF-8.
        kind: the model of its fields.

    Raises:
        RequestError: (400) not a JSON object, or the first field that is missing, of a wrong type,
            out of its range, or not supported.
    """
    try:
        body = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON ({error})") from None
    if not isinstance(body, dict):
        raise RequestError(400, f"the body is a {type(body).__name__}, expected a JSON object")
    body = {key: value for key, value in body.items() if value is not None}
    for name, harmless in _UNSUPPORTED.items():
        values = [value for value in harmless if type(value) is type(body.get(name))]
        if name in body and body[name] not in values:
            advice = "leave it out (in a chat program, clear that setting)"
            raise RequestError(400, f"{name}: not supported; {advice}", name)
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:80] for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        field = str(first["loc"][0]) if first["loc"] else None
        raise RequestError(400, f"{place or 'the body'}: {message}", field) from None
    if isinstance(request, Request) and request.top_logprobs > 0 and not request.logprobs:
        raise field_error("top_logprobs", request.top_logprobs, "logprobs true beside it")
    return request
