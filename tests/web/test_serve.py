"""`serve` with real clients, beside what stock mlx-lm generates."""

import io
import json
import random
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
import openai
import pytest
from helpers.adapters import ADAPTERS, pack_of
from helpers.processes import started
from helpers.served import GOOD, NAMES, client, get, idle, post, prompt_of, raw, serving, text
from mlx_lm import load as stock_load
from pydantic import BaseModel
from scipy.special import log_softmax

from d2c_mlx.models.model import Model
from d2c_mlx.serve.router import load_router
from d2c_mlx.utils.errors import InputWarning


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "compact"])
def test_openais_client_gets_what_stock_mlx_lm_generates(packs, kind, model_path, answer):
    """All tasks at once, chats and texts, streams and whole replies."""
    pack, rng = packs[kind], random.Random(0)
    jobs = [(rng.choice(list(pack.tasks)), prompt_of(rng, rng.randrange(1, 12)),
             rng.randrange(1, 20), rng.random() < 0.5, rng.random() < 0.5)
            for _ in range(24)]  # fmt: skip
    with serving(pack, model_path) as server, client(server) as api:
        assert [model.id for model in api.models.list()] == ["model", *pack.tasks, "auto"]
        assert api.models.retrieve(NAMES[0]).id == NAMES[0]

        def ask(job):
            name, prompt, n, chat, stream = job
            options = {"model": name, "max_tokens": n, "stream": stream, "temperature": 0}
            if chat:
                messages = [{"role": "user", "content": prompt}]
                reply = api.chat.completions.create(messages=messages, **options)
                if stream:
                    return "".join(part.choices[0].delta.content or "" for part in reply)
                return reply.choices[0].message.content or ""
            reply = api.completions.create(prompt=prompt, **options)
            return "".join(x.choices[0].text for x in reply) if stream else reply.choices[0].text

        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(ask, jobs))
        idle(server)
    for (name, prompt, n, chat, _), reply in zip(jobs, replies):
        assert reply == text(answer, pack.load(name), prompt, n, chat)


def test_stop_words_usage_and_logprobs(server, answer):
    """Within tokens, over several, and one that only seems to begin; streamed or not.

    A log-probability for each token that `usage` counts.
    """
    tokenizer = answer.tokenizer
    tokens = list(answer(NAMES[0], tokenizer.encode("the fox"), 30))
    words = text(answer, NAMES[0], "the fox", 30)
    with client(server) as api:
        for part in (None, words[0], words[3:5], words[5:10], "Ω", words[-1]):
            options = {"model": NAMES[0], "prompt": "the fox", "max_tokens": 30, "stop": part,
                       "extra_body": {"logprobs": True}}  # fmt: skip
            whole = api.completions.create(**options)
            n, content = whole.usage.completion_tokens, whole.choices[0].logprobs.content
            assert whole.choices[0].text == (words if part is None else words.split(part)[0])
            assert whole.usage.prompt_tokens == len(tokenizer.encode("the fox"))
            assert [(e["id"], e["token"]) for e in content] == [
                (token, tokenizer.decode([token])) for token in tokens[:n]
            ]
            assert all(entry["logprob"] < 0 for entry in content)
            options |= {"stop": part and [part, "nowhere"], "stream": True}
            *events, last = api.completions.create(
                **options, stream_options={"include_usage": True}
            )
            parts = [event.choices[0] for event in events]
            assert "".join(x.text for x in parts) == whole.choices[0].text
            streamed = [e["id"] for x in parts if x.logprobs for e in x.logprobs.content]
            assert last.usage.completion_tokens == n and streamed == tokens[:n]
        chat = {"model": NAMES[0], "max_tokens": 5, "logprobs": True,
                "messages": [{"role": "user", "content": "x"}]}  # fmt: skip
        content = api.chat.completions.create(**chat).choices[0].logprobs.content
        parts = [event.choices[0] for event in api.chat.completions.create(**chat, stream=True)]
        again = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert [e.token for e in content] == [e.token for e in again] and len(content) == 5
        assert all(e.bytes == list(e.token.encode()) or "\ufffd" in e.token for e in again)


def test_auto_routes_and_says_where(server, pack, answer, model_path):
    router = load_router(pack)
    plain = Model(str(model_path))
    with client(server) as api:
        for name in NAMES:
            prompt = f"Question 1 of the user: what is {name}?"
            messages = [{"role": "user", "content": prompt}]
            ids = answer.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            match = router.best(router.states(plain.model, [ids])[0])
            reply = api.chat.completions.create(model="auto", messages=messages, max_tokens=9)
            assert match and reply.model == match.task
            assert reply.choices[0].message.content == text(answer, match.task, prompt, 9, True)
    # Nothing is near enough.
    with serving(pack, plain, replace(router, threshold=2.0)) as strict, client(strict) as api:
        far = api.completions.create(model="auto", prompt="zzz", max_tokens=9)
        assert far.model == "model" and far.choices[0].text == text(answer, None, "zzz", 9)


@pytest.mark.parametrize(("options", "field"), [
    *((["--token", "x", "--port", "0", "--host", host], f"--host {host} --port 0")
      for host in ("no name", "x" * 64, "a..b", "192.0.2.1")),
    (["--host", "0.0.0.0"], "--token"), (["--adapter-dir", "."], "--token"),
    (["--prefix-memory", "5%"], "--prefix-memory"), (["--adapter-memory", "5%"], "--adapter-mem"),
])  # fmt: skip
def test_options_that_are_refused(pack, model_path, command, options, field):
    before = threading.active_count()
    code, out, err = command("serve", pack.path, "--model", model_path, *options)
    assert (code, out) == (2, "") and field in err and "Traceback" not in err
    assert threading.active_count() <= before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command(pack, model_path, command, number):
    """Until Ctrl-C or SIGTERM; what streams do then is in test_refused.py."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        _, _, err = command("serve", pack.path, "--model", model_path, "--port", port)
    assert f"--port {port}: Address already in use" in err
    process = started(["serve", pack.path, "--model", model_path, "--port", 0])
    url = process.stdout.readline().split(": ")[0]
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as api:
        assert api.completions.create(**GOOD).choices[0].text
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "stopped\n" and "Traceback" not in errors


def test_a_task_may_be_called_as_it_likes(model_path, tmp_path):
    """Even `auto`, or as the base model: tasks come first."""
    base = Model(str(model_path))
    adapters = [replace(a, sources=(name,)) for a, name in zip(ADAPTERS, ("auto", "model"))]
    pack = pack_of(base, adapters, tmp_path / "pack")
    with serving(pack, base) as running, client(running) as api:
        assert [model.id for model in api.models.list()] == ["model", "auto"]
        quoted = raw(running, get("/v1/models/%61ut%6F"))
        assert b" 200 " in quoted and b'"id":"auto"' in quoted
        assert api.completions.create(model="auto", prompt="the", max_tokens=2).model == "auto"


# What chat front ends ask beyond plain answers, and what those who watch a server read

WARM = {"model": "wide", "prompt": "the fox", "max_tokens": 8, "temperature": 5.0}


class Fox(BaseModel):
    """A schema whose answers all end."""

    mood: Literal["lazy", "quick"]
    brown: bool


def test_a_seed_is_the_requests_own(server):
    """Whatever else is in the batch."""
    with client(server) as api, ThreadPoolExecutor(6) as pool:

        def ask(**options):
            return api.completions.create(**WARM | options).choices[0].text

        alone = ask(seed=3)
        others = [pool.submit(ask, seed=i, top_p=0.9, extra_body={"top_k": 40}) for i in range(4)]
        again = [pool.submit(ask, seed=3) for _ in range(4)]
        assert [reply.result() for reply in again] == [alone] * 4
        assert len({reply.result() for reply in others}) > 1
        assert ask(seed=5, extra_body={"top_k": 1}) == ask(seed=6, top_p=1e-6)


def test_the_likeliest_tokens_are_told(server, model_path):
    """Beside the whole model's own logits; what a grammar forbids is not among them."""
    model, tokenizer = stock_load(str(model_path))
    model.set_dtype(mx.float32)
    expected = log_softmax(np.array(model(mx.array([tokenizer.encode("the fox")]))[0, -1]))
    order = np.argsort(-expected)[:5]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": Fox.model_json_schema()}}
    with client(server) as api:

        def ask(n, top, **more):
            more |= {"logprobs": True, "top_logprobs": top}
            reply = api.completions.create(model="model", prompt="the fox", max_tokens=n,
                                           extra_body=more)  # fmt: skip
            return reply.choices[0].logprobs.content

        first, _ = ask(2, 5)
        top = first["top_logprobs"]
        assert [token["id"] for token in top] == order.tolist() and first["id"] == order[0]
        np.testing.assert_allclose([x["logprob"] for x in top], expected[order], atol=1e-4)
        assert first["token"] == tokenizer.decode([order[0]])
        # JSON has no word for the log-probability of a token that is forbidden.
        tops = [token["top_logprobs"] for token in ask(8, 20, response_format=form)]
        assert all(other["logprob"] is not None for top in tops for other in top)
        assert all(tops) and any(len(top) < 20 for top in tops)


@pytest.mark.slow
def test_an_answer_keeps_to_a_schema_and_its_neighbours_do_not(server, answer):
    """`parse` of OpenAI's client asks for it, strictly; a model of noise obeys."""
    chat = {"model": "wide", "messages": [{"role": "user", "content": "How is the fox?"}],
            "max_tokens": 60}  # fmt: skip
    with client(server) as api, ThreadPoolExecutor(8) as pool:

        def parse(seed):
            options = chat | {"temperature": 2.0, "seed": seed, "response_format": Fox}
            return api.chat.completions.parse(**options).choices[0].message.parsed

        plain = [pool.submit(lambda: api.completions.create(**GOOD)) for _ in range(3)]
        foxes = [*pool.map(parse, range(8))]
        assert all(isinstance(fox, Fox) for fox in foxes)
        assert len({(fox.mood, fox.brown) for fox in foxes}) > 1
        expected = text(answer, "wide", "the fox", 4)
        assert all(reply.result().choices[0].text == expected for reply in plain)
        # As the program `llm` sends it, in a stream.
        about = {"name": "output", "schema": Fox.model_json_schema()}
        form = {"type": "json_schema", "json_schema": about}
        events = api.chat.completions.create(**chat, stream=True, response_format=form)
        words = "".join(event.choices[0].delta.content or "" for event in events)
        assert Fox.model_validate_json(words)
        free = api.chat.completions.create(**chat, response_format={"type": "json_object"})
        assert free.choices[0].message.content.startswith("{")


FUNCTION = {"name": "f", "description": "The fox.",
            "parameters": {"type": "object", "properties": {}}}  # fmt: skip
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
MESSAGES = [{"role": "system", "content": "The lazy dog."}, {"role": "user", "content": "Who?"}]
# A tool was called: what the model is asked next.
CALLED = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "call_1", "content": "quick"}]  # fmt: skip
PARTS = [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]
# As Open WebUI's backend makes them (utils/payload.py, routers/openai.py, routers/tasks.py): the
# settings of a model, those that it does not know as they are; titles and tags as further chats.
# The last as LM Studio's plugin openai-compat-endpoint does (src/generator.ts).
SENT = [
    {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True},
     "temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "top_k": 40, "frequency_penalty": 0.1,
     "presence_penalty": 0.0, "seed": 7, "stop": ["###"], "logit_bias": {"5": -1},
     "response_format": {"type": "text"}, "num_ctx": 2048, "num_keep": 24, "num_gpu": 1,
     "keep_alive": "5m", "use_mmap": True, "user": {"name": "x", "id": "1"}},
    {"messages": MESSAGES, "stream": False, "max_completion_tokens": 100, "chat_id": "1",
     "session_id": "2", "stop": ["e"], "tools": [], "tool_choice": None,
     "metadata": {"task": "title"}},
    {"messages": [*CALLED, {"role": "user", "content": PARTS}], "stream": True,
     "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto"},
]  # fmt: skip


def test_what_chat_programs_send_is_answered(server):
    for path in ("/chat/completions", "/v1/chat/completions"):
        for body in SENT:
            body = {"model": "wide", "max_tokens": 5, **body}
            reply = raw(server, post(body, path, User_Agent="Python/3.11 aiohttp/3.12"))
            assert b" 200 " in reply.split(b"\r\n")[0], reply
            assert (b"data: [DONE]" in reply) == body["stream"] and b'"error"' not in reply


def test_a_log_has_numbers_and_nothing_of_what_was_said(pack, model_path):
    log = io.StringIO()
    with serving(pack, model_path, log=log) as server, client(server) as api:
        reply = api.completions.create(**GOOD | {"prompt": "a secret fox"})
        raw(server, post(GOOD | {"model": "nobody", "prompt": "secret"}))
        raw(server, get("/health"))
        # Nothing in it is a control sequence (issue 72).
        raw(server, get("/%C2%9B31m%E2%80%AE%E2%80%A8%7F", method="A" * 3000))
        idle(server)
    written = log.getvalue()
    assert written.isascii() and written.replace("\n", "").isprintable()
    first, second, third, odd = map(json.loads, written.splitlines())
    assert (odd["method"], odd["path"]) == ("A" * 16, "/\x9b31m\u202e\u2028\x7f")
    assert "secret" not in written and reply.choices[0].text not in written
    assert (first["status"], first["task"], first["completion_tokens"]) == (200, "wide", 4)
    assert first["finish_reason"] == "length" and first["seconds"] > 0 and first["time"]
    assert (second["status"], second["model"]) == (404, "nobody")
    assert (third["path"], third["status"]) == ("/health", 200)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_log_on_a_full_disk_ends_with_one_warning(pack, model_path):
    log = open("/dev/full", "w")
    with pytest.warns(InputWarning, match="logged no more") as warned:
        with serving(pack, model_path, log=log) as server, client(server) as api:
            for _ in range(3):
                assert api.completions.create(**GOOD).choices[0].text
    assert len(warned) == 1
    pytest.raises(OSError, log.close)
