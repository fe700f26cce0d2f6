"""From messages to tokens by the chat template, and from generated tokens to messages."""

from __future__ import annotations

import inspect
import json
import logging
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import mlx.core as mx
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from transformers import PreTrainedTokenizerBase

from d2c_mlx.serve.requests import ChatRequest, Request, RequestError, TextRequest, field_error

__all__ = ["Answer", "Encoder", "Piece", "TokenReader", "read_tool_calls"]

_log = logging.getLogger(__name__)
# Arguments that transformers would take for itself instead of passing them to the template: another
# template, or another form of the result.
_RESERVED = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {
    "documents",
    "kwargs",
}
# Bytes of text for each token of the context; longer prompts are refused before they are encoded.
_BYTES_PER_TOKEN = 16


class Encoder:
    """A tokenizer that several threads may use, one at a time.

    Attributes:
        tokenizer: mlx-lm's.
    """

    def __init__(self, tokenizer: Any, context: int | None) -> None:  # noqa: ANN401
        """Use mlx-lm's tokenizer, for prompts of at most so many tokens if that is known."""
        self.tokenizer, self._lock = tokenizer, Lock()
        self._max_bytes = (context or 1 << 31) * _BYTES_PER_TOKEN

    def encode(self, request: Request, system: str | None = None) -> list[int]:
        """Token ids of a request's prompt, the chat template applied.

        Args:
            request: a chat or a text.
            system: system message of a conversation that has none; None leaves it to the template.

        Raises:
            RequestError: (400) the template fails on these messages, an option is none of its
                variables, or the prompt is far longer than the context.
        """
        if isinstance(request, TextRequest):
            # As `mlx_lm.generate`: a prompt that was made by the template has it already.
            bos, text = self.tokenizer.bos_token, request.prompt
            return self._encode(text, "prompt", bos is None or not text.startswith(bos))
        assert isinstance(request, ChatRequest)
        for name in request.chat_template_kwargs:
            if name in _RESERVED:
                expected = "variables of the model's own template"
                raise field_error("chat_template_kwargs", name, expected)
        if not self.tokenizer.has_chat_template:
            raise RequestError(400, "the model has no chat template; ask /v1/completions")
        tools = None if request.tool_choice == "none" else request.tools or None
        try:
            messages = [message.plain() for message in request.messages]
            if system is not None and not any(m["role"] == "system" for m in messages):
                messages = [{"role": "system", "content": system}, *messages]
            with self._lock:
                text = self.tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    tokenize=False,
                    tools=tools,
                    **request.chat_template_kwargs,
                )
        except Exception as error:  # a template is a program of the model's authors
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            words = f"messages: the chat template fails ({why})"
            raise RequestError(400, words, "messages") from None
        return self._encode(text, "messages", False)

    def _encode(self, text: str, field: str, add_special_tokens: bool) -> list[int]:
        nbytes = len(text.encode())
        if nbytes > self._max_bytes:
            words = f"{field}: {nbytes} bytes are too long for the model's context"
            raise RequestError(400, f"{words}, which has room for {self._max_bytes} at most", field)
        with self._lock:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


@dataclass(frozen=True)
class Piece:
    """What one generated token adds to an answer.

    Attributes:
        text: that is certain now; "" while a stop word may have begun.
        token: its id.
        logprob: its log-probability in nats.
        top: ids and log-probabilities of the likeliest tokens, as many as were asked for, or fewer
            where a grammar allows no more.
        finish_reason: "stop" or "length" with the last one.
    """

    text: str
    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    finish_reason: str | None


class TokenReader:
    """The tokens of one answer as text, until one of its stop words.

    It looks for stop words in the text: mlx-lm's generator finds one only if its tokens are those
    of the word alone.

    Attributes:
        finish_reason: that of the last piece; None while it goes on.
    """

    def __init__(self, detokenizer: Any, stop_words: Sequence[str], n_top: int) -> None:  # noqa: ANN401
        """Begin with mlx-lm's detokenizer; `n_top` likeliest tokens are told with each."""
        self._detokenizer, self._stop_words, self._n_top = detokenizer, stop_words, n_top
        self.finish_reason: str | None = None
        # Text that is held back because a stop word may have begun in it.
        self._held = ""

    def add(self, generated: Any) -> Piece:  # noqa: ANN401  mlx-lm's
        """The piece that a generated token adds."""
        reason, words = generated.finish_reason, self._stop_words
        if reason != "stop":
            self._detokenizer.add_token(generated.token)
        if reason is not None:
            self._detokenizer.finalize()
        text = self._held + self._detokenizer.last_segment
        ends = [text.index(word) for word in words if word in text]
        if ends:
            reason, text = "stop", text[: min(ends)]
        n_held, longest = 0, max(map(len, words), default=1) - 1
        if not reason:
            starts = range(min(len(text), longest), 0, -1)
            n_held = next((n for n in starts if any(w.startswith(text[-n:]) for w in words)), 0)
        text, self._held = text[: len(text) - n_held], text[len(text) - n_held :]
        logprobs, n_top, top = generated.logprobs, self._n_top, list[tuple[int, float]]()
        if n_top > 0:
            likely = mx.argpartition(-logprobs, kth=n_top - 1)[:n_top]
            numbers: Any = likely.tolist(), logprobs[likely].tolist()
            # A token that a grammar forbids has -inf, and JSON has no such number.
            allowed = (pair for pair in zip(*numbers) if pair[1] > -math.inf)
            top = sorted(allowed, key=lambda pair: -pair[1])
        self.finish_reason = reason
        return Piece(text, generated.token, float(logprobs[generated.token].item()), top, reason)


class Answer:
    """One answer as it is generated.

    Attributes:
        n_tokens: that were generated.
        finish_reason: "stop", "length" or "tool_calls"; None while it goes on.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], tools: Any) -> None:  # noqa: ANN401
        """Begin an answer.

        Args:
            tokenizer: mlx-lm's, whose markers of thoughts and tools are looked for.
            prompt: token ids; a thought may begin in it.
            tools: those of the request.
        """
        self._tokenizer, self._tools = tokenizer, tools
        thinks = tokenizer.has_thinking and (
            tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)
        )
        self._where = tokenizer.response_initial_state or ("reasoning" if thinks else "normal")
        self._state = make_text_state_machine(tokenizer).make_state(self._where)
        self._text = self._reasoning = self._call = ""
        self._calls: list[dict[str, Any]] = []
        self._pieces: list[Piece] = []
        self._n_calls = self.n_tokens = 0
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Add what a token says; with a reason to finish it was the last."""
        self._pieces.append(piece)
        self.n_tokens += 1
        self._state, segments = TextStateMachine.split(self._state, piece.text)
        if piece.finish_reason:
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
        if piece.finish_reason:
            self._end_call()
            stopped = piece.finish_reason == "stop" and self._n_calls > 0
            self.finish_reason = "tool_calls" if stopped else piece.finish_reason

    @property
    def has_news(self) -> bool:
        """True if `take` would give something to send now; a call is sent when it is whole."""
        return self._where != "tool" and bool(self._text or self._reasoning or self._calls)

    def take(self, chat: bool, stream: bool, logprobs: bool) -> dict[str, Any]:
        """A choice of OpenAI's API: what was added since the last `take`.

        Args:
            chat: it is a message; if not, a text.
            stream: it is a piece of a stream: without text it has no content, and its calls have
                numbers.
            logprobs: tell the log-probabilities, each with the token's `id` besides.
        """
        choice: dict[str, Any] = {"finish_reason": self.finish_reason}
        message: dict[str, Any] = {"role": "assistant"}
        if self._text or not stream:
            message["content"] = self._text or None
        if self._reasoning:
            message["reasoning"] = self._reasoning
        if self._calls:
            first = self._n_calls - len(self._calls)
            numbered = [{**call, "index": first + i} for i, call in enumerate(self._calls)]
            message["tool_calls"] = numbered if stream else self._calls
        if chat:
            choice["delta" if stream else "message"] = message
        else:
            choice["text"] = self._text
        if logprobs:
            content = [
                {
                    **self._logprob(piece.token, piece.logprob),
                    "top_logprobs": [self._logprob(*pair) for pair in piece.top],
                }
                for piece in self._pieces
            ]
            choice["logprobs"] = {"content": content} if content else None
        self._text, self._reasoning, self._calls, self._pieces = "", "", [], []
        return choice

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        # Without the lock of `Encoder`: decoding changes nothing, and the event loop never waits.
        text = self._tokenizer.decode([token])
        # A partial UTF-8 character has no bytes yet.
        content = None if "\ufffd" in text else list(text.encode())
        return {"id": token, "token": text, "logprob": logprob, "bytes": content}

    def _end_call(self) -> None:
        text, self._call = self._call, ""
        if not text:
            return
        try:
            calls = read_tool_calls(self._tokenizer.tool_parser, text, self._tools)
        except ValueError as error:
            _log.warning("a call of a tool is left as text: %s", error)
            self._text += text
            return
        self._n_calls += len(calls)
        for call in calls:
            function = {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
            name = function.pop("id", None) or str(uuid.uuid4())
            self._calls.append({"function": function, "type": "function", "id": name})


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
        parsed = parser(text, tools)
    except Exception as error:  # parsers trust what they read
        raise ValueError(f"the parser fails, {type(error).__name__}") from None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise ValueError("expected an object with a name")
    return [{"arguments": {}, **call} for call in calls]
