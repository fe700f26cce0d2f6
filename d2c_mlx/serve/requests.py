"""Requests of OpenAI's API: fields, what is refused by name, and how tokens are chosen for them."""

import asyncio
import json
import random
import secrets
from collections.abc import Callable
from functools import cached_property, lru_cache
from subprocess import DEVNULL, PIPE
from typing import Annotated, Any, Literal, Self, TypeVar

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from d2c_mlx.utils.child import bounded
from d2c_mlx.utils.parsing import parse_json

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
    "presence_context_size": (20,), "frequency_context_size": (20,),
    "repetition_context_size": (20,),
    "pinned": (False,), "is_3d_lora_weight": (False,),
    "repeat_penalty": (1, 1.0), "mirostat": (0,), "tfs_z": (1, 1.0), "typical_p": (1, 1.0),
    "num_predict": (), "format": ("",), "think": (),
}  # fmt: skip
# One sampler for all requests with the same options: their rows are sampled at once.
_shared_sampler = lru_cache(maxsize=64)(make_sampler)
# Lower temperatures are greedy: a float16 logit divided by them would be infinite.
_LOWEST_TEMPERATURE = 0.01
# Between the values of a schema there is one space or none: models that are lost would go on with
# white space for ever.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# Bytes of a schema; seconds of a processor and bytes in which a child compiles it, and of the stack
# on which that recurses: less than the server's threads have. Beyond them the child is ended, or
# ends itself: a chain of 3,000 references is a segmentation fault, and every pattern of a string
# doubles time and memory.
_MAX_BYTES, _SECONDS, _MEMORY, _STACK = 64_000, 3, 2 << 30, 1 << 20
_CHILD = f"""
import threading
from llguidance import LLMatcher, LLTokenizer
def compile(schema):
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema)
        problem = LLMatcher.validate_grammar(grammar, LLTokenizer("byte"))
    except ValueError as error:
        problem = str(error)
    sys.stdout.write(problem)
threading.stack_size({_STACK})
thread = threading.Thread(target=compile, args=(sys.stdin.read(),))
thread.start()
thread.join()
"""


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


class _Format(_Fields):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] = {}


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
    def _has_content(self) -> Self:
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
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class Request(_Fields):
    """The fields that chats and texts have in common; unknown ones are passed over.

    A number beyond its range would fail the batch, and with it the requests of others. `model` is
    the task that is asked, see `PackService.names`.
    """

    model: str
    stream: bool = False
    stream_options: dict[str, bool] = {}
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
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[_TokenId, _Bias] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @property
    def schema_text(self) -> str | None:
        """The JSON schema of the answer; None is any text. Raises RequestError (400)."""
        asked = self.response_format
        if asked.type != "json_schema":
            return '{"type": "object"}' if asked.type == "json_object" else None
        schema = asked.json_schema.get("schema")
        if not isinstance(schema, dict):
            raise field_error("response_format", asked.json_schema, "json_schema with a schema")
        return json.dumps(schema)


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
    """Parse and check the body of a request, JSON in UTF-8; null is a field that was left out.

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


def sampler_of(request: Request, vocabulary: int) -> Callable[[mx.array], mx.array] | None:
    """The sampler of a request, of a model that knows so many tokens; None is greedy."""
    if request.temperature < _LOWEST_TEMPERATURE:
        return None
    # mlx-lm's sampler wants a top_k below the vocabulary; more are all tokens, which is 0.
    top_k = request.top_k if request.top_k < vocabulary else 0
    if request.seed is None:
        return _shared_sampler(request.temperature, request.top_p, request.min_p, top_k=top_k)
    draws = random.Random(request.seed)
    sampler = make_sampler(request.temperature, request.top_p, request.min_p, top_k=top_k)

    def sample(logprobs: mx.array) -> mx.array:
        mx.random.seed(draws.getrandbits(64))
        token = sampler(logprobs)
        # Requests without a seed share the thread's numbers, which nobody may know.
        mx.random.seed(secrets.randbits(64))
        return token

    return sample


def processors_of(request: Request, vocabulary: int) -> list[Any]:
    """mlx-lm's logits processors for penalties and biases.

    Raises:
        RequestError: (400) a bias of a token that the model does not know.
    """
    bias = {int(token): value for token, value in request.logit_bias.items()}
    if bias and max(bias) >= vocabulary:
        raise field_error("logit_bias", max(bias), f"token ids below {vocabulary}")
    return make_logits_processors(
        bias,
        # 1 changes nothing, and 0 makes none.
        request.repetition_penalty if request.repetition_penalty != 1 else 0,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
    )


class Grammars:
    """Logits processors that keep answers to JSON schemas, by llguidance."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:  # noqa: ANN401  mlx-lm's
        """For a tokenizer; the first schema prepares it, which takes about a second."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._checked: set[int] = set()
        # More children at once would fill the memory together.
        self._children = asyncio.Semaphore(2)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        text = self._tokenizer.backend_tokenizer.to_str()
        return LLTokenizer(text, self._vocabulary, list(self._tokenizer.eos_token_ids))

    async def check(self, schema: str) -> None:
        """Compile a schema in a child process first, which ends when this task is cancelled.

        Raises:
            RequestError: (400) it is no schema, or too large, or takes too long.
        """
        if hash(schema) in self._checked:
            return
        if len(schema) > _MAX_BYTES:
            raise _refusal(f"it has {len(schema)} bytes, at most {_MAX_BYTES} are read")
        command = bounded(_CHILD, _SECONDS, _MEMORY)
        async with self._children:
            child = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
            )
            try:
                output, _ = await asyncio.wait_for(child.communicate(schema.encode()), 5 * _SECONDS)
            except asyncio.TimeoutError:
                output = b""
            finally:
                if child.returncode is None:
                    child.kill()
                    await child.wait()
        if child.returncode:
            bounds = f"{_SECONDS} s, {_MEMORY >> 30} GB or too deep a stack"
            raise _refusal(f"to compile it takes more than {bounds}")
        if output:
            raise _refusal(output.decode(errors="replace"))
        self._checked.add(hash(schema))

    def processor(self, schema: str) -> Callable[[mx.array, mx.array], mx.array]:
        """A processor for one answer, of a schema that was checked.

        Raises:
            RequestError: (400) the tokenizer has no tokens for it.
        """
        ends = list(self._tokenizer.eos_token_ids)
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT)
        matcher, begun = LLMatcher(self._tokens, grammar, log_level=0), list[bool]()
        if matcher.is_error():
            raise _refusal(matcher.get_error())

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            if begun:
                matcher.consume_token(int(np.array(tokens[-1])))
            begun.append(True)
            allowed = np.zeros(logits.shape[-1], bool)
            if matcher.is_error():
                # It ends here, and the others of its batch go on.
                allowed[ends] = True
            else:
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                bits = np.unpackbits(bits, bitorder="little")[: len(allowed)]
                allowed[: len(bits)] = bits
            return mx.where(mx.array(allowed), logits, -mx.inf)

        return process


def _refusal(problem: str) -> RequestError:
    words = f"response_format: the schema is refused ({' '.join(problem.split())[:200]})"
    return RequestError(400, words, "response_format")
