"""From messages to tokens by the chat template, and from generated tokens to messages."""

import inspect
import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine
from transformers import PreTrainedTokenizerBase

from d2c_mlx.serve.requests import ChatRequest, Request, RequestError, TextRequest, field_error
from d2c_mlx.serve.scheduler import Job

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
    """`tokenizer`, mlx-lm's, which several threads may use, one at a time."""

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
            field, text, bos = "prompt", request.prompt, self.tokenizer.bos_token
            special = bos is None or not text.startswith(bos)
        else:
            assert isinstance(request, ChatRequest)
            field, text, special = "messages", self._template(request, system), False
        nbytes = len(text.encode())
        if nbytes > self._max_bytes:
            most = f"the model's context has room for {self._max_bytes} at most"
            raise RequestError(400, f"{field}: found {nbytes} bytes, {most}", field)
        with self._lock:
            return self.tokenizer.encode(text, add_special_tokens=special)

    def _template(self, request: ChatRequest, system: str | None) -> str:
        """The text of a conversation."""
        for name in _RESERVED & request.chat_template_kwargs.keys():
            raise field_error("chat_template_kwargs", name, "variables of the model's own template")
        try:
            messages = [message.plain() for message in request.messages]
            if system is not None and not any(m["role"] == "system" for m in messages):
                messages = [{"role": "system", "content": system}, *messages]
            with self._lock:
                return self.tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=True,
                    tokenize=False,
                    tools=None if request.tool_choice == "none" else request.tools or None,
                    **request.chat_template_kwargs,
                )
        except Exception as error:  # a template is a program of the model's authors
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            words = f"messages: the chat template fails ({why})"
            raise RequestError(400, words, "messages") from None


class Answer:
    """One answer as it is generated, and in the form of OpenAI's API.

    It looks for stop words in the text: mlx-lm's generator finds one only if its tokens are those
    of the word alone.

    Attributes:
        job: the scheduler's, whose events are added.
        finish_reason: "stop", "length" or "tool_calls"; None while it goes on.
    """

    def __init__(self, tokenizer: Any, request: Request, job: Job, model: str) -> None:  # noqa: ANN401
        """Begin the answer of a model of this name; the prompt may begin a thought."""
        self.job, self._request, self._tokenizer = job, request, tokenizer
        self._chat = isinstance(request, ChatRequest)
        self._detokenizer = tokenizer.detokenizer
        words = TextStateMachine({"text": [(word, None) for word in request.stop]})
        self._words = words.make_state("text")
        thinks = tokenizer.has_thinking and (
            tokenizer.rfind_think_start(job.prompt) > tokenizer.rfind_think_end(job.prompt)
        )
        self._where = tokenizer.response_initial_state or ("reasoning" if thinks else "normal")
        self._state = make_text_state_machine(tokenizer).make_state(self._where)
        # State of the machine -> text of it that was not taken yet.
        self._texts = dict.fromkeys(("normal", "reasoning", "tool"), "")
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[Sequence[tuple[int, float]]] = []
        self._n_calls = self._n_tokens = 0
        self.finish_reason: str | None = None
        kind = "chat.completion" if self._chat else "text_completion"
        self._about = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4()}",
            "object": f"{kind}.chunk" if self._chat and request.stream else kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": "d2c-mlx",
        }

    def add(self, logprobs: Sequence[tuple[int, float]], reason: str | None) -> None:
        """Add what a token says; if `finish_reason` is there then, it was the last.

        Args:
            logprobs: ids and log-probabilities in nats: of the token, and of the likeliest ones.
            reason: "stop" or "length" with the last token.
        """
        self._n_tokens += 1
        self._logprobs.append(logprobs)
        if reason != "stop":
            self._detokenizer.add_token(logprobs[0][0])
        if reason:
            self._detokenizer.finalize()
        last = self._detokenizer.last_segment
        self._words, ((_, text), *stopped) = TextStateMachine.split(self._words, last)
        if stopped:
            reason = "stop"
        elif reason:
            # What only seemed to begin a stop word, or below a marker, is text.
            self._words, rest, _ = TextStateMachine.flush(self._words)
            text += rest
        self._state, segments = TextStateMachine.split(self._state, text)
        if reason:
            self._state, rest, where = TextStateMachine.flush(self._state)
            segments.append((where, rest))
        for where, part in segments:
            if self._where == "tool" and where == "normal":
                self._end_call()
            if where in self._texts:
                self._texts[where] += part
            self._where = where
        if reason:
            self._end_call()
            called = reason == "stop" and self._n_calls
            self.finish_reason = "tool_calls" if called else reason

    @property
    def has_news(self) -> bool:
        """True if `take` would give something to send now; a call is sent when it is whole."""
        texts = self._texts["normal"] or self._texts["reasoning"]
        return self._where != "tool" and bool(texts or self._calls)

    def take(self) -> dict[str, Any]:
        """The reply, or an event of a stream, with what was added since the last `take`.

        A piece of a stream has no content without text, and its calls have numbers.
        """
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason}
        message: dict[str, Any] = {"role": "assistant"}
        text, reasoning = self._texts["normal"], self._texts["reasoning"]
        stream = self._request.stream
        if text or not stream:
            message["content"] = text or None
        if reasoning:
            message["reasoning"] = reasoning
        if self._calls:
            first = self._n_calls - len(self._calls)
            numbered = [{**call, "index": first + i} for i, call in enumerate(self._calls)]
            message["tool_calls"] = numbered if stream else self._calls
        if self._chat:
            choice["delta" if stream else "message"] = message
        else:
            choice["text"] = text
        if self._request.logprobs:
            rows = [[self._logprob(*pair) for pair in pairs] for pairs in self._logprobs]
            content = [{**token, "top_logprobs": top} for token, *top in rows]
            choice["logprobs"] = {"content": content} if content else None
        self._texts |= {"normal": "", "reasoning": ""}
        self._calls, self._logprobs = [], []
        return {**self._about, "choices": [choice]}

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of prompt and answer, as OpenAI's API counts them."""
        n_prompt = len(self.job.prompt)
        return {
            "prompt_tokens": n_prompt,
            "prompt_tokens_details": {"cached_tokens": self.job.n_cached},
            "completion_tokens": self._n_tokens,
            "total_tokens": n_prompt + self._n_tokens,
        }

    def end(self) -> dict[str, Any]:
        """Cancel what is not there yet; numbers and names for the log, nothing of what was said."""
        self.job.cancel()
        names = {"id": self._about["id"], "task": self._about["model"]}
        return {**names, **self.usage, "finish_reason": self.finish_reason}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        # Without the lock of `Encoder`: decoding changes nothing, and the event loop never waits.
        text = self._tokenizer.decode([token])
        # A partial UTF-8 character has no bytes yet.
        content = None if "\ufffd" in text else list(text.encode())
        return {"id": token, "token": text, "logprob": logprob, "bytes": content}

    def _end_call(self) -> None:
        text, self._texts["tool"] = self._texts["tool"], ""
        if not text:
            return
        try:
            tools = self._request.tools if isinstance(self._request, ChatRequest) else None
            calls = read_tool_calls(self._tokenizer.tool_parser, text, tools or None)
        except ValueError as error:
            _log.warning("a call of a tool is left as text: %s", error)
            self._texts["normal"] += text
            return
        self._n_calls += len(calls)
        for call in calls:
            function = {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
            name = function.pop("id", None) or str(uuid.uuid4())
            self._calls.append({"function": function, "type": "function", "id": name})


def read_tool_calls(parser: Callable[..., Any], text: str, tools: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """The calls with name and arguments in what a model wrote, by its parser of mlx-lm.

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
