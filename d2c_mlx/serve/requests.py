"""Requests of OpenAI's API as pydantic models, and what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from d2c_mlx.serve import fields
from d2c_mlx.utils.parsing import parse_json
from d2c_mlx.utils.validation import problems_of, refused

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
    stream_options: fields.StreamOptions = {}
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: fields.StopWords = []
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=-1, le=20)
    n: int = Field(1, ge=1, le=16)
    response_format: fields.Schema = None
    temperature: Annotated[float, fields.number(float, 0, 100)] = 0.0
    top_p: Annotated[float, fields.number(float, 1e-6, 1)] = 1.0
    min_p: Annotated[float, fields.number(float, 0, 1)] = 0.0
    top_k: Annotated[int, fields.number(int, 0, 2**31 - 1)] = 0
    xtc_probability: Annotated[float, fields.number(float, 0, 1)] = 0.0
    xtc_threshold: Annotated[float, fields.number(float, 0, 0.5)] = 0.1
    presence_penalty: Annotated[float, fields.number(float, -2, 2)] = 0.0
    presence_context_size: Annotated[int, fields.number(int, 0, 1_000_000)] = 20
    frequency_penalty: Annotated[float, fields.number(float, -2, 2)] = 0.0
    frequency_context_size: Annotated[int, fields.number(int, 0, 1_000_000)] = 20
    repetition_penalty: Annotated[float, fields.number(float, 0.01, 100)] = 0.0
    repetition_context_size: Annotated[int, fields.number(int, 0, 1_000_000)] = 20
    logit_bias: fields.Bias = {}
    lora: fields.Lora = None
    seed: Annotated[int | None, fields.number(int, -(2**63), 2**63 - 1)] = None

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

    scales: fields.Scales


class ChatRequest(Request):
    """A request to `/v1/chat/completions`."""

    messages: fields.Messages = Field(
        json_schema_extra={"missing": "missing, expected a list that is not empty"}
    )
    tools: list[Any] = []
    tool_choice: fields.ToolChoice = "auto"
    chat_template_kwargs: dict[str, Any] = {}


class TextRequest(Request):
    """A request to `/v1/completions`."""

    prompt: str = Field(min_length=1)


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
        field, line = next(iter(problems_of(error, kind, body).items()))
        raise RequestError(400, line, field) from None


def _same(value: object, harmless: object) -> bool:
    return type(value) is type(harmless) and value == harmless
