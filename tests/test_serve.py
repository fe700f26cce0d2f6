"""`serve`: batches of several adapters beside stock mlx-lm, and the server with real clients."""

import json
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import openai
import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from mlx_lm import load as stock_load
from mlx_lm.generate import BatchGenerator, StopSequences
from test_serving import ABOUT, ADAPTERS
from tiny import task, tiny_model

from d2c_mlx.mixed import MixedModel, RowAdapters
from d2c_mlx.model import BaseModel, greedy
from d2c_mlx.pack import load_pack
from d2c_mlx.packing import write_compact_pack, write_pack
from d2c_mlx.quantize import compress
from d2c_mlx.routing import fit_router, load_router, save_router
from d2c_mlx.server import Limits, PackServer
from d2c_mlx.serving import switch
from d2c_mlx.tasks import load_task

NAMES = [one.name for one in ADAPTERS]
WORDS = "the quick brown fox and lazy dogs are watching an answer to question".split()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module", params=["plain", "compact"])
def pack(request, model_path, tmp_path_factory):
    """Three adapters of other ranks and modules; the compact one leaves a task to the base."""
    root = tmp_path_factory.mktemp("pack")
    base = BaseModel(str(model_path))
    about = ABOUT | {"model": base.name, "config_hash": base.config_hash}
    if request.param == "plain":
        pack = write_pack(root / "pack", ADAPTERS, **about)
    else:
        levels = [{p: ((2, 4), (1, 2)) for p in one.modules} for one in ADAPTERS]
        stored = [compress(a, some, 32) for a, some in zip(ADAPTERS, levels)]
        serves = {name: i for i, name in enumerate(NAMES)} | {"bare": None}
        pack = write_compact_pack(root / "pack", stored, serves, **about)
    for name in pack.tasks:
        task(root / "tasks", name)
    probes = [base.encode(n, load_task(root / "tasks" / n).probe) for n in pack.tasks]
    return save_router(pack, fit_router(base.model, probes))


@pytest.fixture(scope="module")
def mixed(pack, model_path):
    return MixedModel(BaseModel(str(model_path)), pack)


@pytest.fixture(scope="module")
def answer(pack, model_path):
    """`answer(task, prompt, n)`: greedy tokens of stock mlx-lm with its own LoRA layers."""
    model, tokenizer = stock_load(str(model_path))
    model.set_dtype(mx.float32)
    known = {}

    def ask(name, prompt, n):
        key = name, tuple(prompt), n
        if key not in known:
            one = None if name is None else pack.load(name)
            switch(model, one and one.uniform(mx.float32), pack.path)
            known[key] = greedy(model, tokenizer, prompt, n)
        return known[key]

    ask.tokenizer = tokenizer
    return ask


def test_a_batch_of_all_adapters_gives_each_rows_own_logits(pack, mixed, model_path):
    """Beside stock mlx-lm with one adapter at a time, and rows in any order."""
    model, _ = stock_load(str(model_path))
    model.set_dtype(mx.float32)
    rows = [None, *pack.tasks, NAMES[0], None]
    tokens = mx.array(np.random.default_rng(0).integers(3, 250, (len(rows), 9)))
    caches = [mixed.cache(name) for name in rows]
    merged = [c[0].merge(list(c)) for c in zip(*caches)]
    found = np.array(mixed(tokens, cache=merged))
    for i, name in enumerate(rows):
        one = None if name is None else pack.load(name)
        switch(model, one and one.uniform(mx.float32), pack.path)
        np.testing.assert_allclose(found[i], np.array(model(tokens[i : i + 1]))[0], atol=2e-5)
        alone = np.array(mixed(tokens[i : i + 1], cache=mixed.cache(name)))
        np.testing.assert_allclose(alone[0], found[i], atol=2e-5)


def test_adapters_stay_with_their_rows_while_others_come_and_go(pack, mixed, answer):
    """mlx-lm's batch generator, rows of other lengths that are added, end and are removed."""
    rng = random.Random(3)
    batch = BatchGenerator(mixed, completion_batch_size=5, prefill_batch_size=2,
                           prefill_step_size=4)  # fmt: skip
    asked, found, removed = {}, {}, set()
    todo = [(rng.choice([None, *pack.tasks]), [rng.randrange(3, 250) for _ in range(n)])
            for n in (3, 17, 5, 1, 9, 30, 2, 8, 12, 4, 6, 21)]  # fmt: skip
    while todo or len(found) < len(asked):
        for name, prompt in [todo.pop() for _ in range(min(len(todo), rng.randrange(4)))]:
            n = rng.randrange(1, 25)
            (uid,) = batch.insert([list(prompt)], max_tokens=[n], caches=[mixed.cache(name)],
                                  stop_sequences=[StopSequences()])  # fmt: skip
            asked[uid] = name, prompt, n, []
        _, tokens = batch.next()
        for one in tokens:
            asked[one.uid][3].append(one.token)
            if one.finish_reason:
                found[one.uid] = asked[one.uid]
        for uid in asked.keys() - found.keys():
            if rng.random() < 0.01:
                batch.remove([uid])
                found[uid] = asked[uid]
                removed.add(uid)
    assert len(removed) < len(found) == 12
    for uid, (name, prompt, n, tokens) in found.items():
        expected = answer(name, prompt, n)
        # `greedy` stops at an end token, the batch here does not.
        stop = len(tokens) if uid in removed else len(expected)
        assert tuple(tokens[:stop]) == expected[:stop]


def test_row_adapters_are_whatever_mlx_lm_does_to_a_cache():
    rows = RowAdapters.merge([RowAdapters([1]), RowAdapters([0]), RowAdapters([2])])
    rows.extend(RowAdapters([5, 6]))
    rows.filter([4, 0, 2])
    assert rows.slots == [6, 1, 2] and rows.extract(1).slots == [1]


@contextmanager
def serving(pack, mixed, router=None, **options):
    router = router or load_router(pack)
    server = PackServer(("127.0.0.1", 0), pack, mixed, router, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client(server, key="none"):
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, timeout=60)


def prompt_of(rng, n=6):
    return " ".join(rng.choices(WORDS, k=n))


def text(answer, name, prompt, n, chat=False):
    """What stock mlx-lm answers, in words."""
    tokenizer = answer.tokenizer
    tokens = tokenizer.encode(prompt)
    if chat:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    words = tokenizer.detokenizer
    for token in answer(name, tokens, n):
        if token not in tokenizer.eos_token_ids:
            words.add_token(token)
    words.finalize()
    return words.text


def counted(server):
    lines = server.meters.text().decode().splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if "#" not in line
    }


def idle(server):
    for _ in range(200):
        if counted(server)["d2c_mlx_open"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError(counted(server))


def test_openais_client_gets_what_stock_mlx_lm_generates(pack, mixed, answer):
    """All tasks at once, chats and texts, streams and whole replies."""
    rng = random.Random(0)
    jobs = [(rng.choice(list(pack.tasks)), prompt_of(rng, rng.randrange(1, 12)),
             rng.randrange(1, 20), rng.random() < 0.5, rng.random() < 0.5)
            for _ in range(24)]  # fmt: skip
    with serving(pack, mixed) as server, client(server) as api:
        assert [one.id for one in api.models.list()] == ["model", *pack.tasks, "auto"]
        assert api.models.retrieve(NAMES[0]).id == NAMES[0]

        def ask(job):
            name, prompt, n, chat, stream = job
            options = {"model": name, "max_tokens": n, "stream": stream, "temperature": 0}
            if chat:
                messages = [{"role": "user", "content": prompt}]
                found = api.chat.completions.create(messages=messages, **options)
                if stream:
                    return "".join(one.choices[0].delta.content or "" for one in found)
                return found.choices[0].message.content or ""
            found = api.completions.create(prompt=prompt, **options)
            return "".join(x.choices[0].text for x in found) if stream else found.choices[0].text

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, jobs))
        idle(server)
        counts = counted(server)
    for (name, prompt, n, chat, _), reply in zip(jobs, found):
        assert reply == text(answer, name, prompt, n, chat)
    assert counts['d2c_mlx_replies_total{status="200"}'] == 26
    assert counts["d2c_mlx_first_token_seconds_count"] == 24
    assert sum(v for k, v in counts.items() if k.startswith("d2c_mlx_requests_total")) == 24


def test_usage_stop_and_sampling(pack, mixed, answer):
    with serving(pack, mixed) as server, client(server) as api:
        whole = api.completions.create(model=NAMES[0], prompt="the fox", max_tokens=30)
        tokens = len(answer(NAMES[0], answer.tokenizer.encode("the fox"), 30))
        assert whole.usage.completion_tokens == tokens
        assert whole.usage.prompt_tokens == len(answer.tokenizer.encode("the fox"))
        words = whole.choices[0].text
        # Within tokens, over several, and one that only seems to begin.
        for part in {words[i : i + n] for i in range(8) for n in (1, 2, 5)} | {words[:4] + "Ω"}:
            cut = api.completions.create(model=NAMES[0], prompt="the fox", max_tokens=30, stop=part)
            stream = api.completions.create(model=NAMES[0], prompt="the fox", max_tokens=30,
                                            stop=[part, "nowhere"], stream=True)  # fmt: skip
            assert cut.choices[0].text == words.split(part)[0]
            assert "".join(one.choices[0].text for one in stream) == words.split(part)[0]
        stream = list(api.completions.create(
            model=NAMES[0], prompt="the fox", max_tokens=3, stream=True,
            stream_options={"include_usage": True}))  # fmt: skip
        assert stream[-1].usage.completion_tokens == 3
        warm = {api.completions.create(model=NAMES[0], prompt="the fox", max_tokens=8,
                                       temperature=5.0, top_p=0.9).choices[0].text
                for _ in range(4)}  # fmt: skip
        assert len(warm) > 1
        only = answer.tokenizer.encode("x")[0]
        forced = api.completions.create(model=NAMES[0], prompt="the", max_tokens=3,
                                        logit_bias={str(only): 1000})  # fmt: skip
        assert forced.choices[0].text == "xxx"


def test_auto_routes_and_says_where(pack, mixed, answer, model_path):
    router = load_router(pack)
    plain = BaseModel(str(model_path))
    with serving(pack, mixed) as server, client(server) as api:
        for name in NAMES:
            prompt = f"Question 1 of the user: what is {name}?"
            messages = [{"role": "user", "content": prompt}]
            ids = answer.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            match = router.route(plain.model, ids)
            reply = api.chat.completions.create(model="auto", messages=messages, max_tokens=9)
            assert match and reply.model == match.task
            assert reply.choices[0].message.content == text(answer, match.task, prompt, 9, True)
    # Nothing is near enough.
    strict = replace(router, threshold=2.0)
    with serving(pack, mixed, strict) as server, client(server) as api:
        far = api.completions.create(model="auto", prompt="zzz", max_tokens=9)
        assert far.model == "model" and far.choices[0].text == text(answer, None, "zzz", 9)


def raw(server, content, wait=True):
    """Bytes that the server sends back to bytes."""
    with socket.create_connection(server.server_address) as connection:
        connection.settimeout(20)
        connection.sendall(content)
        if not wait:
            return b""
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def post(body, path="/v1/completions", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content_Length": str(len(content)), **headers}
    head = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in lines.items())
    return f"POST {path} HTTP/1.0\r\n{head}\r\n".encode() + content


GOOD = {"model": "wide", "prompt": "the fox", "max_tokens": 4}
CHAT = {"model": "wide", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
BAD = [
    (400, post(b"{"), "not JSON"),
    (400, post(b"\xff\xfe"), "not JSON"),
    (400, post(b'{"model": NaN}'), "not JSON"),
    (400, post(b"[" * 100_000), "nested"),
    (400, post([1]), "list"),
    (400, post({"prompt": "x"}), "model: missing"),
    (404, post(GOOD | {"model": "nobody"}), "expected one of"),
    (404, post(GOOD | {"model": "../../etc/passwd"}), "expected one of"),
    (400, post(GOOD | {"prompt": ["x"]}), "prompt"),
    (400, post(GOOD | {"prompt": ""}), "prompt"),
    (400, post(GOOD | {"prompt": "the fox " * 400}), "context"),
    (400, post(GOOD | {"max_tokens": 10**6}), "at most"),
    (400, post(GOOD | {"max_tokens": 0}), "max_tokens"),
    (400, post(GOOD | {"max_tokens": True}), "max_tokens"),
    (400, post(GOOD | {"max_tokens": 400, "prompt": "the fox " * 100}), "context"),
    (400, post(GOOD | {"temperature": -1}), "temperature"),
    (400, post(GOOD | {"temperature": "hot"}), "temperature"),
    (400, post(GOOD | {"seed": 1, "temperature": 1}), "seed"),
    (400, post(GOOD | {"n": 2}), "n: not supported"),
    (400, post(GOOD | {"adapters": "/tmp/x"}), "adapters: not supported"),
    (400, post(GOOD | {"stop": [1]}), "stop"),
    (400, post(GOOD | {"stop": ["x"] * 17}), "stop"),
    (400, post(GOOD | {"stream_options": 1}), "stream_options"),
    (400, post(GOOD | {"logit_bias": {"100000": 1}}), "logit_bias"),
    (400, post(GOOD | {"logit_bias": {"x": 1}}), "logit_bias"),
    (400, post(CHAT | {"messages": []}, "/v1/chat/completions"), "messages"),
    (400, post(CHAT | {"messages": "x"}, "/v1/chat/completions"), "messages"),
    (400, post(CHAT | {"messages": [{"role": "user"}]}, "/v1/chat/completions"), "content"),
    (400, post(CHAT | {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}]}]},
        "/v1/chat/completions"), "only parts of text"),
    (400, post(CHAT | {"chat_template_kwargs": {"tokenize": False}}, "/v1/chat/completions"),
     "template"),
    (404, post(GOOD, "/v1/embeddings"), "no such address"),
    (404, b"GET /etc/passwd HTTP/1.0\r\n\r\n", "no such address"),
    (404, b"GET /v1/models/nobody HTTP/1.0\r\n\r\n", "expected one of"),
    (411, b"POST /v1/completions HTTP/1.0\r\n\r\n", "Content-Length"),
    (400, post(GOOD, Content_Length="-1"), "Content-Length"),
    (400, post(GOOD, Content_Length="1e3"), "Content-Length"),
    (413, post(b" " * 200_000), "takes 100,000"),
    (413, post(b"x", Content_Length="9" * 12), "takes 100,000"),
    (403, post(GOOD, Origin="http://evil.example"), "--allow-origin"),
    (403, b"GET /v1/models HTTP/1.0\r\nOrigin: null\r\n\r\n", "--allow-origin"),
    (403, b"OPTIONS /v1/completions HTTP/1.0\r\nOrigin: http://evil\r\n\r\n", "--allow-origin"),
]  # fmt: skip


def test_what_is_wrong_is_said_in_json_and_the_server_goes_on(pack, mixed, answer, capfd):
    limits = Limits(body_nbytes=100_000, seconds=2)
    with serving(pack, mixed, limits=limits) as server, client(server) as api:
        for status, content, words in BAD:
            reply = raw(server, content)
            head, body = reply.split(b"\r\n\r\n", 1)
            assert head.split()[1] == str(status).encode(), (content[:200], reply)
            assert words in json.loads(body)["error"]["message"], (content[:200], reply)
        assert raw(server, b"\x00\x01 garbage\r\n\r\n")
        with pytest.raises(openai.NotFoundError, match="expected one of"):
            api.completions.create(model="nobody", prompt="x")
        reply = api.completions.create(**GOOD)
        assert reply.choices[0].text == text(answer, "wide", "the fox", 4)
        idle(server)
    assert "Traceback" not in capfd.readouterr().err


def test_a_token_is_asked_for_and_pages_that_are_allowed_may_ask(pack, mixed):
    page = "http://localhost:3000"
    with serving(pack, mixed, token="s3cret", origins=[page]) as server:
        with client(server, "wrong") as api, pytest.raises(openai.AuthenticationError):
            api.completions.create(**GOOD)
        with client(server, "s3cret") as api:
            assert api.completions.create(**GOOD).choices[0].finish_reason
        assert b" 401 " in raw(server, b"GET /metrics HTTP/1.0\r\n\r\n")
        allowed = raw(
            server, f"OPTIONS /v1/completions HTTP/1.0\r\nOrigin: {page}\r\n\r\n".encode()
        )
        assert b" 204 " in allowed and f"Allow-Origin: {page}".encode() in allowed


def test_who_leaves_frees_the_place(pack, mixed):
    """Streams and whole replies, and one that never sends all of its body."""
    long = {"model": "wide", "prompt": "the", "max_tokens": 500,
            "logit_bias": {str(i): 100 for i in range(20, 200)}}  # fmt: skip
    with serving(pack, mixed, limits=Limits(batch=2, queue=2, seconds=1)) as server:
        before = counted(server)
        for stream in (True, False):
            with socket.create_connection(server.server_address) as connection:
                connection.sendall(post(long | {"stream": stream}))
                while counted(server)["d2c_mlx_answer_tokens_total"] < 3 + before[
                    "d2c_mlx_answer_tokens_total"]:  # fmt: skip
                    time.sleep(0.01)
            idle(server)
            after = counted(server)
            assert after["d2c_mlx_vanished_total"] == before["d2c_mlx_vanished_total"] + 1
            generated = after["d2c_mlx_answer_tokens_total"] - before["d2c_mlx_answer_tokens_total"]
            assert 3 <= generated < 500
            before = after
        raw(server, post(GOOD)[:-4], wait=False)
        assert raw(server, post(GOOD)[:-4]) == b""
        assert raw(server, b"") == b""


def test_more_than_may_wait_are_refused_at_once(pack, mixed):
    long = {"model": "wide", "prompt": "the", "max_tokens": 300,
            "logit_bias": {str(i): 100 for i in range(20, 200)}}  # fmt: skip
    with serving(pack, mixed, limits=Limits(batch=1, queue=1)) as server:
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda _: raw(server, post(long)), range(6)))
        codes = sorted(one.split()[1] for one in replies)
        assert codes[-1] == b"503" and b"200" in codes
        body = next(one for one in replies if b" 503 " in one).split(b"\r\n\r\n", 1)[1]
        assert json.loads(body)["error"]["code"] == "overloaded"
        idle(server)


def test_a_batch_that_fails_ends_its_requests_and_no_others(pack, mixed, answer, monkeypatch):
    def broken(*_arguments, **_options):
        raise MemoryError

    with serving(pack, mixed) as server, client(server) as api:
        with monkeypatch.context() as patch:
            patch.setattr(MixedModel, "__call__", broken)
            with pytest.raises(openai.InternalServerError, match="MemoryError"):
                api.completions.create(**GOOD)
            with pytest.raises(openai.APIError, match="MemoryError"):
                list(api.completions.create(**GOOD, stream=True))
        reply = api.completions.create(**GOOD)
        assert reply.choices[0].text == text(answer, "wide", "the fox", 4)
        assert urllib.request.urlopen(server.url.replace("v1", "health")).status == 200


def test_thousands_of_requests_good_and_bad(pack, mixed, answer, request):
    """No wrong adapter ever, nothing left open, memory as before."""
    rng = random.Random(1)
    prompts = [prompt_of(rng) for _ in range(8)]
    expected = {(name, p): text(answer, name, p, 6) for name in pack.tasks for p in prompts}
    # Else an adapter that is mixed up might not show.
    assert len({expected[name, prompts[0]] for name in pack.tasks}) == len(pack.tasks)

    def one(i):
        dice = random.Random(i)
        name, prompt = dice.choice(list(pack.tasks)), dice.choice(prompts)
        body = {"model": name, "prompt": prompt, "max_tokens": 6, "stream": dice.random() < 0.5}
        kind = dice.random()
        if kind < 0.15:
            status, content, _ = dice.choice(BAD)
            return raw(server, content).split()[1] == str(status).encode()
        if kind < 0.25:
            return raw(server, post(body)[: dice.randrange(1, 150)], wait=False) == b""
        if kind < 0.35:
            return raw(server, post(body | {"max_tokens": 60}), wait=False) == b""
        while (reply := raw(server, post(body))).split()[1] == b"503":
            time.sleep(0.02)
        head, content = reply.decode().split("\r\n\r\n", 1)
        if not body["stream"]:
            return json.loads(content)["choices"][0]["text"] == expected[name, prompt]
        lines = [x[6:] for x in content.splitlines() if x.startswith("data: {")]
        return "".join(json.loads(x)["choices"][0]["text"] for x in lines) == expected[name, prompt]

    n = request.config.getoption("--requests")
    limits = Limits(batch=4, queue=8, body_nbytes=100_000, seconds=2)
    with serving(pack, mixed, limits=limits) as server, ThreadPoolExecutor(12) as pool:
        assert [i for i, good in enumerate(pool.map(one, range(n))) if not good] == []
        idle(server)
        before, threads = mx.get_active_memory(), threading.active_count()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert all(pool.map(one, range(n, 2 * n)))
        idle(server)
        print({key: n for key, n in counted(server).items() if "_total" in key})
        assert abs(mx.get_active_memory() - before) < 2e6
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.05 * resident
        assert threading.active_count() <= threads + 12


def test_the_command(pack, model_path, tmp_path):
    refused = CliRunner().invoke(cli, ["serve", str(pack.path), "--host", "0.0.0.0"])
    assert refused.exit_code == 2 and "--token" in refused.output
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ["--model", str(model_path), "--port", port]
        refused = CliRunner().invoke(cli, ["serve", str(pack.path), *options])
    assert refused.exit_code and f"--port {port}: Address already in use" in refused.output
    command = [sys.executable, "-m", "d2c_mlx_cli.main"]
    code = "from d2c_mlx_cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", str(pack.path), "--model", str(model_path),
               "--port", "0"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A background shell has SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    line = process.stdout.readline()
    url = line.split(": ")[0]
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as api:
        assert api.completions.create(**GOOD).choices[0].text
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "stopping\n" and "Traceback" not in errors


def test_a_task_may_be_called_as_it_likes(model_path, tmp_path):
    """Even `auto`, or as the base model: tasks come first."""
    base = BaseModel(str(model_path))
    about = ABOUT | {"model": base.name, "config_hash": base.config_hash}
    adapters = [replace(one, sources=(name,)) for one, name in zip(ADAPTERS, ("auto", "model"))]
    pack = write_pack(tmp_path / "pack", adapters, **about)
    server = SimpleNamespace(pack=load_pack(pack.path))
    with serving(server.pack, MixedModel(base, server.pack)) as running, client(running) as api:
        assert [one.id for one in api.models.list()] == ["model", "auto"]
        assert running.models == {"model": "model", "auto": "auto"}
        assert api.completions.create(model="auto", prompt="the", max_tokens=2).model == "auto"
