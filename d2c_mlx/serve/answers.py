"""What a model generates, in the form of OpenAI's API: text, thoughts and calls of tools."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from pydantic import BaseModel

__all__ = ["Answer", "Choice", "Completion", "Message", "Usage", "read_tool_calls"]

_log = logging.getLogger(__name__)


class Usage(BaseModel):
    """Tokens of a prompt and its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Message(BaseModel):
    """What the model said, or a piece of it."""

    role: str
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Choice(BaseModel):
    """An answer, or a piece of it: `message` in a chat, `delta` in its stream, else `text`."""

    index: int
    finish_reason: str | None
    message: Message | None = None
    delta: Message | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None


class Completion(BaseModel):
    """A reply, or an event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    system_fingerprint: str
    usage: Usage | None = None

    def text(self) -> bytes:
        """The reply as JSON, without what was not given."""
        return self.model_dump_json(exclude_unset=True).encode()


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
    # mlx-lm 0.32.0 has no such attribute.
    known = getattr(tokenizer, "response_initial_state", None)
    return known or ("reasoning" if thinks else "normal")
