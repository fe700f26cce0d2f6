"""From messages to tokens by the chat template, and from generated text to messages."""

from __future__ import annotations

import inspect
import json
import logging
import uuid
from collections.abc import Callable, Sequence
from copy import deepcopy
from threading import Lock
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from d2c_mlx.serve.jobs import Piece
from d2c_mlx.serve.requests import ChatRequest, Request, RequestError, TextRequest, field_error

__all__ = ["Answer", "Encoder", "Message", "read_tool_calls"]

_log = logging.getLogger(__name__)
# Arguments that transformers would take for itself instead of passing them to the template: another
# template, or another form of the result.
_RESERVED = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "documents", "kwargs",
}  # fmt: skip


class Encoder:
    """A tokenizer that several threads may use, one at a time.

    Attributes:
        tokenizer: mlx-lm's.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        """Use mlx-lm's tokenizer."""
        self.tokenizer, self._lock = tokenizer, Lock()

    def logprobs(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """Log-probabilities in the form of OpenAI's API, with the token's `id` besides."""
        return [
            {**self._entry(one.token, one.logprob),
             "top_logprobs": [self._entry(*other) for other in one.top]}
            for one in pieces
        ]  # fmt: skip

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        with self._lock:
            text = self.tokenizer.decode([token])
        # A partial UTF-8 character has no bytes yet.
        content = None if "\ufffd" in text else list(text.encode())
        return {"id": token, "token": text, "logprob": logprob, "bytes": content}

    def encode(self, request: Request, system: str | None = None) -> list[int]:
        """Token ids of a request's prompt, the chat template applied.

        Args:
            request: a chat or a text.
            system: system message of a conversation that has none; None leaves it to the template.

        Raises:
            RequestError: (400) the template fails on these messages, or an option is none of its
                variables.
        """
        if isinstance(request, TextRequest):
            # As `mlx_lm.generate`: a prompt that was made by the template has it already.
            bos = self.tokenizer.bos_token
            special = bos is None or not request.prompt.startswith(bos)
            with self._lock:
                return self.tokenizer.encode(request.prompt, add_special_tokens=special)
        assert isinstance(request, ChatRequest)
        for name in request.chat_template_kwargs:
            if name in _RESERVED:
                raise field_error(
                    "chat_template_kwargs", name, "variables of the model's own template"
                )
        if not self.tokenizer.has_chat_template:
            raise RequestError(400, "the model has no chat template; ask /v1/completions")
        try:
            messages = [_plain_message(one) for one in request.messages]
            if system is not None and not any(one["role"] == "system" for one in messages):
                messages = [{"role": "system", "content": system}, *messages]
            with self._lock:
                return self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True,
                    tools=request.tools or None, **request.chat_template_kwargs,
                )  # fmt: skip
        except Exception as error:  # a template is a program of the model's authors
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            words = f"messages: the chat template fails ({why})"
            raise RequestError(400, words, "messages") from None


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates read it: content is a string, arguments of calls are objects."""
    plain, content = deepcopy(message), message.get("content")
    parts = content if isinstance(content, list) else []
    plain["content"] = "".join(part["text"] for part in parts) if parts else content or ""
    for call in plain.get("tool_calls") or ():
        function = call.get("function") or {}
        if isinstance(function.get("arguments"), str) and function["arguments"]:
            function["arguments"] = json.loads(function["arguments"])
    return plain


class Message(BaseModel):
    """What the model said, or a piece of it."""

    role: str
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Answer:
    """One answer as it is generated.

    Attributes:
        finish_reason: "stop", "length" or "tool_calls"; None while it goes on.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], tools: Any) -> None:  # noqa: ANN401
        """Begin an answer.

        Args:
            tokenizer: mlx-lm's, whose markers of thoughts and tools are looked for.
            prompt: token ids; a thought may begin in it.
            tools: those of the request.
        """
        self._parser, self._tools = tokenizer.tool_parser, tools
        self._where = _initial_state(tokenizer, prompt)
        self._state = make_text_state_machine(tokenizer).make_state(self._where)
        self._text = self._reasoning = self._call = ""
        self._calls: list[dict[str, Any]] = []
        self._n_calls = 0
        self.finish_reason: str | None = None

    def add(self, text: str, finish_reason: str | None) -> None:
        """Add generated text; with a reason it was the last."""
        self._state, segments = TextStateMachine.split(self._state, text)
        if finish_reason:
            # What only seemed to begin a marker is text.
            self._state, rest, where = TextStateMachine.flush(self._state)
            segments.append((where, rest))
        for where, part in segments:
            if self._where == "tool" and where == "normal":
                self._end_call()
            if where == "reasoning":
                self._reasoning += part
            elif where == "tool":
                self._call += part
            elif where == "normal":
                self._text += part
            self._where = where
        if finish_reason:
            self._end_call()
            stopped = finish_reason == "stop" and self._n_calls > 0
            self.finish_reason = "tool_calls" if stopped else finish_reason

    @property
    def has_news(self) -> bool:
        """True if `take` would give something to send now; a call is sent when it is whole."""
        return self._where != "tool" and bool(self._text or self._reasoning or self._calls)

    def take(self, whole: bool) -> Message:
        """What was added since the last `take`, as a message.

        Args:
            whole: it is a message of its own, not a piece of a stream: its content may be null, and
                its calls have no numbers.
        """
        fields: dict[str, Any] = {"role": "assistant"}
        if whole or self._text:
            fields["content"] = self._text or None
        if self._reasoning:
            fields["reasoning"] = self._reasoning
        if self._calls:
            if not whole:
                first = self._n_calls - len(self._calls)
                self._calls = [{**one, "index": first + i} for i, one in enumerate(self._calls)]
            fields["tool_calls"] = self._calls
        self._text, self._reasoning, self._calls = "", "", []
        return Message(**fields)

    def take_text(self) -> str:
        """What was added since the last time, as text alone."""
        text, self._text, self._reasoning, self._calls = self._text, "", "", []
        return text

    def _end_call(self) -> None:
        text, self._call = self._call, ""
        if not text:
            return
        try:
            found = read_tool_calls(self._parser, text, self._tools)
        except ValueError as error:
            _log.warning("a call of a tool is left as text: %s", error)
            self._text += text
            return
        self._n_calls += len(found)
        self._calls += [_call_of(one) for one in found]


def read_tool_calls(parser: Callable[..., Any], text: str, tools: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Parse a tool call that the model wrote, and check it.

    Args:
        parser: mlx-lm's for this model.
        text: of the call.
        tools: those of the request.

    Returns:
        Calls with a name and arguments.

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


def _call_of(found: dict[str, Any]) -> dict[str, Any]:
    """A call in the form of OpenAI's API."""
    function = {**found, "arguments": json.dumps(found["arguments"], ensure_ascii=False)}
    name = function.pop("id", None) or str(uuid.uuid4())
    return {"function": function, "type": "function", "id": name}


def _initial_state(tokenizer: Any, prompt: Sequence[int]) -> str:  # noqa: ANN401
    """Where an answer begins: in a thought, if the prompt opens one."""
    thinks = tokenizer.has_thinking and (
        tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
    )
    return tokenizer.response_initial_state or ("reasoning" if thinks else "normal")
