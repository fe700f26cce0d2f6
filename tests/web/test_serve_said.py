"""What a model says goes to the client whole: ends of text, calls of tools, and failures."""

import json
import os
import resource

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import ABOUT, ADAPTERS
from helpers.served import GOOD, client, post, raw, serving
from helpers.tiny import CHAT_TEMPLATE, task, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.serve.adapters import Adapters
from d2c_mlx.serve.router import fit_router, load_router, save_router
from d2c_mlx.serve.text import Encoder

BOS = "<|endoftext|>"
# Said whole, as one token each, and then the answer ends.
SAID = [
    "5 <", "a < b <tool_cal", "<tool_call>", "see <#b",
    '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>',
    *(f"<tool_call>{one}</tool_call>" for one in (
        '{"name": "f"}', "[1]", '"x"', "{}", "[]", '{"name": 1}', "nonsense", "null",
        '[{"name": "f"}, {"name": "g"}]')),
    "before <tool_call>[1]</tool_call>",
]  # fmt: skip


def speaking_model(directory):
    """It ends its answer after whatever `SAID` has; a bias says which of them comes first."""
    tiny_model(directory)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": BOS})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE + "{# <tool_call> tool_call.name #}"
    first = len(tokenizer)
    assert tokenizer.add_tokens([one.replace(" ", "Ġ") for one in SAID]) == len(SAID)
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["vocab_size"] = len(tokenizer)
    (directory / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(directory / "model.safetensors"))
    # Nothing but the last token counts.
    weights |= {key: mx.zeros_like(x) for key, x in weights.items()
                if key.endswith(("o_proj.weight", "down_proj.weight"))}  # fmt: skip
    rows = np.array(weights["model.embed_tokens.weight"])
    rows[:, 0] = 0
    rows = np.concatenate([rows, np.zeros((len(SAID), rows.shape[1]), rows.dtype)])
    rows[first:, 0] = 0.1
    rows[tokenizer.eos_token_id, 0] = 100
    weights["model.embed_tokens.weight"] = mx.array(rows)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pack with a router, and it on that model."""
    root = tmp_path_factory.mktemp("said")
    base = BaseModel(str(speaking_model(root / "model")))
    about = ABOUT | {"model": base.name, "config_hash": base.config_hash}
    pack = write_pack(root / "pack", ADAPTERS, Manifest(**about))
    for name in pack.tasks:
        task(root / "tasks", name)
    probes = [base.encode(n, load_task(root / "tasks" / n).probe) for n in pack.tasks]
    pack = save_router(pack, fit_router(base.model, probes))
    return pack, Adapters(base, pack)


@pytest.fixture(scope="module")
def server(made):
    with serving(*made) as running:
        yield running


def say(server, text, stream=False, **options):
    """The answer's text, reason, calls of tools and usage, as OpenAI's client reads them."""
    token = server.service.encoder.tokenizer.convert_tokens_to_ids(text.replace(" ", "Ġ"))
    body = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9,
            "logit_bias": {str(token): 100}, "stream": stream, **options}  # fmt: skip
    with client(server) as api:
        if not stream:
            reply = api.chat.completions.create(**body)
            (one,) = reply.choices
            calls = one.message.tool_calls or []
            n_logprobs = len(one.logprobs.content) if one.logprobs else 0
            return (one.message.content or "", one.finish_reason,
                    [(c.function.name, c.function.arguments) for c in calls],
                    reply.usage.completion_tokens, n_logprobs)  # fmt: skip
        *parts, last = api.chat.completions.create(**body, stream_options={"include_usage": True})
    choices = [one.choices[0] for one in parts]
    calls = [c for one in choices for c in one.delta.tool_calls or []]
    return ("".join(one.delta.content or "" for one in choices), choices[-1].finish_reason,
            [(c.function.name, c.function.arguments) for c in calls],
            last.usage.completion_tokens,
            sum(len(one.logprobs.content) for one in choices if one.logprobs))  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_an_end_that_may_begin_a_marker_is_said(server, stream):
    for text in SAID[:2]:
        # The text and the end of the answer.
        assert say(server, text, stream) == (text, "stop", [], 2, 0)
        logprobs = {"extra_body": {"logprobs": True}}
        assert say(server, text, stream, **logprobs) == (text, "stop", [], 2, 2)
        assert say(server, text, stream, max_tokens=1) == (text, "length", [], 1, 0)
    assert say(server, "see <#b", stream, stop="#") == ("see <", "stop", [], 1, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(server, stream):
    def said(text):
        return say(server, f"<tool_call>{text}</tool_call>", stream)[:3]

    call = '{"name": "f", "arguments": {"x": 1}}'
    assert said(call) == ("", "tool_calls", [("f", '{"x": 1}')])
    assert said('{"name": "f"}') == ("", "tool_calls", [("f", "{}")])
    two = '[{"name": "f"}, {"name": "g"}]'
    assert said(two) == ("", "tool_calls", [("f", "{}"), ("g", "{}")])
    # What is none is text.
    for text in ("[1]", '"x"', "{}", "[]", '{"name": 1}', "nonsense", "null"):
        assert said(text) == (text, "stop", []), text
    assert say(server, "before <tool_call>[1]</tool_call>", stream)[:3] == (
        "before [1]", "stop", [])  # fmt: skip


def test_no_tools_are_shown_where_none_is_to_be_called(server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    tokenizer = server.service.encoder.tokenizer
    seen = []
    for options in ({}, {"tools": tools}, {"tools": tools, "tool_choice": "none"},
                    {"tools": tools, "tool_choice": "auto"}):  # fmt: skip
        messages = [{"role": "user", "content": "x"}]
        template = "{{ tools }}" + tokenizer.chat_template
        kept, tokenizer._tokenizer.chat_template = tokenizer.chat_template, template
        try:
            with client(server) as api:
                reply = api.chat.completions.create(model="model", messages=messages, max_tokens=1,
                                                    **options)  # fmt: skip
        finally:
            tokenizer._tokenizer.chat_template = kept
        seen.append(reply.usage.prompt_tokens)
    assert seen[0] == seen[2] < seen[1] == seen[3]


def test_a_prompt_with_the_first_token_does_not_get_it_twice(server):
    """As `mlx_lm.generate` reads a prompt that the template has made."""
    tokenizer = server.service.encoder.tokenizer
    messages = [{"role": "user", "content": "the fox"}]
    made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert made.startswith(BOS) and ids[0] == 0 != ids[1]
    with client(server) as api:
        for prompt, n in ((made, len(ids)), ("the fox", len(tokenizer.encode("the fox")))):
            reply = api.completions.create(model="model", prompt=prompt, max_tokens=1)
            assert reply.usage.prompt_tokens == n


def error_of(reply, status):
    head, body = reply.split(b"\r\n\r\n", 1)
    assert head.split()[1] == str(status).encode(), reply
    assert b"content-type: application/json" in head.lower()
    return json.loads(body)["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_router_that_fails_is_said_with_a_status(made, stream):
    router = load_router(made[0])
    router.directions.resize((len(router.tasks), 3), refcheck=False)
    with serving(*made, router) as server:
        reply = raw(server, post({**GOOD, "model": "auto", "stream": stream}))
        assert error_of(reply, 500) == "the request could not be started"


def test_a_reply_that_fails_is_said(made, monkeypatch):
    """Before anything was sent, as a reply; later, in the stream."""

    def broken(*_arguments):
        raise ZeroDivisionError

    with serving(*made) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "logprobs", broken)
            reply = raw(server, post(GOOD | {"logprobs": True}))
            assert error_of(reply, 500) == "the reply failed (ZeroDivisionError)"
            reply = raw(server, post(GOOD | {"logprobs": True, "stream": True}))
            assert (
                b" 200 " in reply and reply.count(b"HTTP/1.1") == 1 and b'data: {"error"' in reply
            )
            patch.setattr(Encoder, "encode", broken)
            for stream in (False, True):
                reply = raw(server, post(GOOD | {"stream": stream}))
                assert error_of(reply, 500) == "the reply failed (ZeroDivisionError)"
        assert b" 200 " in raw(server, post(GOOD))


def test_what_http_itself_refuses_is_json(server):
    for method in ("PUT", "DELETE", "PATCH", "TRACE"):
        reply = raw(server, f"{method} /v1/models HTTP/1.0\r\n\r\n".encode())
        words = f"{method}: not supported, expected GET, HEAD, POST or OPTIONS"
        assert error_of(reply, 501) == words
    many = b"".join(b"X-%d: 1\r\n" % i for i in range(200))
    assert error_of(raw(server, b"GET /health HTTP/1.0\r\n" + many + b"\r\n"), 431)
    assert error_of(raw(server, b"GET /" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n"), 414)
    assert "Bad request" in error_of(raw(server, b"a b c d\r\n\r\n"), 400)


def test_head_is_get_without_a_body(server, made):
    def heads(server, path, *lines):
        """What comes to HEAD, and to GET; but for the time."""
        rest = b"".join(line + b"\r\n" for line in lines) + b"\r\n"
        ask = (b"%s %s HTTP/1.0\r\n%s" % (method, path, rest) for method in (b"HEAD", b"GET"))
        found = [raw(server, one).split(b"\r\n\r\n", 1) for one in ask]
        (head, nothing), (other, body) = found
        assert nothing == b"" != body
        assert [line for line in head.split(b"\r\n") if not line.startswith(b"date:")] == [
            line for line in other.split(b"\r\n") if not line.startswith(b"date:")
        ]
        return int(head.split()[1])

    for path in (b"/", b"/health", b"/health/live", b"/v1/models", b"/v1/models/wide",
                 b"/lora-adapters"):  # fmt: skip
        assert heads(server, path) == 200
    for path in (b"/nothing", b"/v1/models/nobody", b"/v1/completions"):
        assert heads(server, path) == 404
    assert raw(server, b"HEAD /metrics HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")
    with serving(*made, token="s3cret") as server:
        assert heads(server, b"/") == 200 and heads(server, b"/health") == 401
        assert heads(server, b"/health", b"Authorization: Bearer s3cret") == 200


def test_queries_are_passed_over_and_schemes_are_of_any_case(made):
    with serving(*made, token="s3cret") as server:
        for scheme in ("Bearer", "bearer", "BEARER"):
            reply = raw(server, post(GOOD, "/v1/completions?api-version=1",
                                     Authorization=f"{scheme} s3cret"))  # fmt: skip
            assert b" 200 " in reply
        key = b"Authorization: bearer s3cret\r\n\r\n"
        assert b" 200 " in raw(server, b"GET /v1/models?x=1 HTTP/1.0\r\n" + key)
        assert b" 404 " in raw(server, b"GET /nothing?x=/v1/models HTTP/1.0\r\n" + key)
        assert b" 401 " in raw(server, post(GOOD, Authorization="bearer S3CRET"))


def test_many_open_files(server):
    """Beyond 1,024 `select` fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("needs 1,200 open files (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    files = []
    try:
        files += [os.open(os.devnull, os.O_RDONLY) for _ in range(1040)]
        body = {"model": "wide", "prompt": "x", "max_tokens": 400, "logit_bias": {"40": 100}}
        assert b" 200 " in raw(server, post(body))
    finally:
        for one in files:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
