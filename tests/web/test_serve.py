"""`serve` with real clients, beside what stock mlx-lm generates."""

import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from helpers.adapters import ADAPTERS
from helpers.served import GOOD, NAMES, client, get, idle, pack_of, prompt_of, raw, serving, text

from d2c_mlx.models.model import Model
from d2c_mlx.serve.router import load_router


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
    tokens = list(answer(NAMES[0], answer.tokenizer.encode("the fox"), 30))
    words = text(answer, NAMES[0], "the fox", 30)
    with client(server) as api:
        for part in (
            None,
            *(words[i : i + n] for i, n in ((0, 1), (3, 2), (5, 5))),
            "Ω",
            words[-1],
        ):
            options = {"model": NAMES[0], "prompt": "the fox", "max_tokens": 30, "stop": part,
                       "extra_body": {"logprobs": True}}  # fmt: skip
            whole = api.completions.create(**options)
            n = whole.usage.completion_tokens
            assert whole.choices[0].text == (words if part is None else words.split(part)[0])
            assert whole.usage.prompt_tokens == len(answer.tokenizer.encode("the fox"))
            content = whole.choices[0].logprobs.content
            assert [entry["id"] for entry in content] == tokens[:n] and len(content) == n
            assert all(entry["logprob"] < 0 for entry in content)
            assert all(e["token"] == answer.tokenizer.decode([e["id"]]) for e in content)
            options["stop"] = [part, "nowhere"] if part else None
            *stream, last = api.completions.create(
                **options, stream=True, stream_options={"include_usage": True}
            )
            parts = [part.choices[0] for part in stream]
            assert "".join(x.text for x in parts) == whole.choices[0].text
            assert last.usage.completion_tokens == n
            streamed = [e for x in parts if x.logprobs for e in x.logprobs.content]
            assert [e["id"] for e in streamed] == tokens[:n]
        chat = {"model": NAMES[0], "max_tokens": 5, "logprobs": True,
                "messages": [{"role": "user", "content": "x"}]}  # fmt: skip
        content = api.chat.completions.create(**chat).choices[0].logprobs.content
        many = [part.choices[0] for part in api.chat.completions.create(**chat, stream=True)]
        again = [entry for part in many if part.logprobs for entry in part.logprobs.content]
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
    """Until Ctrl-C or SIGTERM; what streams do then is in test_serve_hold.py."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        _, _, err = command("serve", pack.path, "--model", model_path, "--port", port)
    assert f"--port {port}: Address already in use" in err
    code = "from d2c_mlx_cli.main import main; main()"
    argv = [sys.executable, "-c", code, "serve", str(pack.path), "--model", str(model_path),
            "--port", "0"]  # fmt: skip
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A background shell has SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
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
