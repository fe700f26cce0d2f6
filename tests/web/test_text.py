"""The text of an answer reaches the client whole: its ends, and calls of tools."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import ADAPTERS, pack_of
from helpers.served import client, serving
from helpers.tiny import CHAT_TEMPLATE, edit_json, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from d2c_mlx.models.model import Model

BOS = "<|endoftext|>"
NO_CALLS = ("[1]", '"x"', "{}", "[]", '{"name": 1}', "nonsense", "null")
CALLS = {
    '{"name": "f", "arguments": {"x": 1}}': [("f", '{"x": 1}')],
    '{"name": "f"}': [("f", "{}")],
    '[{"name": "f"}, {"name": "g"}]': [("f", "{}"), ("g", "{}")],
}
# Said whole, as one token each, and then the answer ends.
SAID = ["5 <", "a < b <tool_cal", "see <#b", "before <tool_call>[1]</tool_call>",
        *(f"<tool_call>{call}</tool_call>" for call in (*CALLS, *NO_CALLS))]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def speaking_model(directory):
    """It ends its answer after whatever `SAID` has; a bias says which of them comes first."""
    tiny_model(directory)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": BOS})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE + "{# <tool_call> tool_call.name #}"
    assert tokenizer.add_tokens([text.replace(" ", "Ġ") for text in SAID]) == len(SAID)
    tokenizer.save_pretrained(directory)
    edit_json(directory / "config.json", vocab_size=len(tokenizer))
    weights = mx.load(str(directory / "model.safetensors"))
    # Nothing but the last token counts.
    weights |= {key: mx.zeros_like(x) for key, x in weights.items()
                if key.endswith(("o_proj.weight", "down_proj.weight"))}  # fmt: skip
    rows = np.array(weights["model.embed_tokens.weight"])
    rows[:, 0] = 0
    rows = np.concatenate([rows, np.zeros((len(SAID), rows.shape[1]), rows.dtype)])
    rows[-len(SAID) :, 0] = 0.1
    rows[tokenizer.eos_token_id, 0] = 100
    weights["model.embed_tokens.weight"] = mx.array(rows)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    root = tmp_path_factory.mktemp("said")
    base = Model(str(speaking_model(root / "model")))
    with serving(pack_of(base, ADAPTERS, root / "pack"), base) as running:
        yield running


def say(server, words, stream=False, **options):
    """The answer's text, reason, calls of tools, usage and logprobs, as OpenAI's client reads."""
    token = server.service.encoder.tokenizer.convert_tokens_to_ids(words.replace(" ", "Ġ"))
    body = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9,
            "logit_bias": {str(token): 100}, "stream": stream, **options}  # fmt: skip
    with client(server) as api:
        if stream:
            body["stream_options"] = {"include_usage": True}
            *parts, last = api.chat.completions.create(**body)
        else:
            last = api.chat.completions.create(**body)
            parts = [last]
    choices = [part.choices[0] for part in parts]
    messages = [choice.delta if stream else choice.message for choice in choices]
    calls = [call.function for message in messages for call in message.tool_calls or []]
    logprobs = [x for choice in choices if choice.logprobs for x in choice.logprobs.content]
    return ("".join(message.content or "" for message in messages), choices[-1].finish_reason,
            [(call.name, call.arguments) for call in calls],
            last.usage.completion_tokens, len(logprobs))  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_ends_of_text_and_calls_of_tools(speaker, stream):
    """An end that may begin a marker is said; what is no call is text."""
    for words in SAID[:2]:
        # The text and the end of the answer.
        assert say(speaker, words, stream) == (words, "stop", [], 2, 0)
        logprobs = {"extra_body": {"logprobs": True}}
        assert say(speaker, words, stream, **logprobs) == (words, "stop", [], 2, 2)
        assert say(speaker, words, stream, max_tokens=1) == (words, "length", [], 1, 0)
    assert say(speaker, "see <#b", stream, stop="#") == ("see <", "stop", [], 1, 0)
    for words in (*CALLS, *NO_CALLS):
        answer = say(speaker, f"<tool_call>{words}</tool_call>", stream)
        expected = ("", "tool_calls", CALLS[words]) if words in CALLS else (words, "stop", [])
        assert answer[:3] == expected, words
    before = say(speaker, "before <tool_call>[1]</tool_call>", stream)
    assert before[:3] == ("before [1]", "stop", [])


def test_what_a_prompt_becomes(speaker, monkeypatch):
    """A first token that the template gave is not doubled; no tools where none is to be called."""
    tokenizer = speaker.service.encoder.tokenizer
    chat = {"model": "model", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 1}
    ready = tokenizer.apply_chat_template(
        chat["messages"], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True)
    assert ready.startswith(BOS) and ids[0] == 0 != ids[1]
    with client(speaker) as api:
        for prompt, n in ((ready, len(ids)), ("the fox", len(tokenizer.encode("the fox")))):
            reply = api.completions.create(model="model", prompt=prompt, max_tokens=1)
            assert reply.usage.prompt_tokens == n
        template = "{{ tools }}" + tokenizer.chat_template
        monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
        plain, tools, none, auto = (
            api.chat.completions.create(**chat, **options).usage.prompt_tokens
            for options in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"},
                            {"tools": TOOLS, "tool_choice": "auto"})
        )  # fmt: skip
    assert plain == none < tools == auto
