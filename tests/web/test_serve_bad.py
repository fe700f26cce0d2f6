"""`serve` with clients that say what is wrong, leave, or are too many."""

import gc
import json
import random
import resource
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import mlx.core as mx
import openai
import pytest
from helpers.served import (
    GOOD,
    client,
    counted,
    counts_at,
    idle,
    post,
    prompt_of,
    raw,
    serving,
    text,
)
from mlx_lm.generate import make_stop_sequences
from mlx_lm.sample_utils import make_sampler

from d2c_mlx.serve.jobs import Job, Limits
from d2c_mlx.serve.mixed_batch import MixedModel

pytestmark = pytest.mark.slow

CHAT = {"model": "wide", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
# Fields of sampling that ended the batch, and what was left of it.
NUMBERS = [
    *({name: 2**63} for name in ("temperature", "top_k", "presence_penalty", "frequency_penalty",
                                 "repetition_penalty", "repetition_context_size")),
    {"seed": 2**63, "temperature": 0}, {"temperature": 101}, {"temperature": True},
    {"top_p": 1e-60}, {"min_p": 1.1}, {"top_k": 1.5},
    {"top_k": -1}, {"presence_penalty": -2.1}, {"frequency_penalty": "much"},
    {"repetition_penalty": 1e-300}, {"presence_context_size": 10**7}, {"xtc_probability": 2},
    {"xtc_threshold": 0.6}, {"logit_bias": {"5": None}}, {"logit_bias": {"5": [1]}},
    {"logit_bias": {"5": 1e9}}, {"logit_bias": {"5": True}}, {"logit_bias": {"1_0": 1}},
    {"logit_bias": {"-1": 1}}, {"logit_bias": {"9" * 5000: 1}}, {"logit_bias": [1]},
]  # fmt: skip
CHUNKED = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
           b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
BAD = [
    *((400, post({"temperature": 0.7, **GOOD, **one}), f"{next(iter(one))}: found")
      for one in NUMBERS),
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
    (400, post(GOOD | {"seed": 1, "temperature": 1, "xtc_probability": 0.5}), "seed: XTC"),
    (400, post(GOOD | {"n": 0}), "n: found 0, "),
    (400, post(GOOD | {"top_logprobs": 2}), "top_logprobs: needs logprobs true"),
    (400, post(GOOD | {"response_format": {"type": "xml"}}), "response_format: found"),
    (400, post(GOOD | {"response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "nothing"}}}}), "the schema is refused"),
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
    *((400, post(CHAT | {"chat_template_kwargs": one}, "/v1/chat/completions"),
       f"chat_template_kwargs: found '{next(iter(one))}', expected variables")
      for one in ({"return_tensors": "np"}, {"tokenize": True}, {"tools": []}, {"padding": True},
                  {"truncation": True, "max_length": 1}, {"add_generation_prompt": False},
                  {"return_dict": True}, {"continue_final_message": True}, {"self": 1},
                  {"tokenizer_kwargs": {"text": 1}}, {"chat_template": "{{ 1/0 }}"},
                  {"chat_template": 2 * "{% for i in range(6000) %}" + 2 * "{% endfor %}"})),
    (400, post(CHAT | {"chat_template_kwargs": {"messages": 1}}, "/v1/chat/completions"),
     "the chat template fails (TypeError"),
    (404, post(GOOD, "/v1/embeddings"), "no such address"),
    (404, b"GET /etc/passwd HTTP/1.0\r\n\r\n", "no such address"),
    (404, b"GET /v1/models/nobody HTTP/1.0\r\n\r\n", "expected one of"),
    (411, b"POST /v1/completions HTTP/1.0\r\n\r\n", "Content-Length"),
    (400, post(GOOD, Content_Length="-1"), "Content-Length"),
    (400, post(GOOD, Content_Length="1e3"), "Content-Length"),
    (413, CHUNKED + b"30d40\r\n" + b" " * 200_000 + b"\r\n0\r\n\r\n", "takes 100,000"),
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


def test_who_leaves_frees_the_place(pack, mixed):
    """Streams and whole replies, and one that never sends all of its body."""
    long = {"model": "wide", "prompt": "the", "max_tokens": 500,
            "logit_bias": {str(i): 100 for i in range(20, 200)}}  # fmt: skip
    with serving(pack, mixed, limits=Limits(batch=2, queue=2, seconds=1)) as server:
        before = counted(server)
        for stream in (True, False):
            with socket.create_connection(server.address) as connection:
                connection.sendall(post(long | {"stream": stream}))
                while counted(server)["d2c_mlx_answer_tokens_total"] < 3 + before[
                    "d2c_mlx_answer_tokens_total"]:  # fmt: skip
                    time.sleep(0.01)
            idle(server)
            gone = "d2c_mlx_vanished_total"
            after = counts_at(server, gone, before[gone] + 1)
            assert after[gone] == before[gone] + 1
            generated = after["d2c_mlx_answer_tokens_total"] - before["d2c_mlx_answer_tokens_total"]
            assert 3 <= generated < 500
            before = after
        raw(server, post(GOOD)[:-4], wait=False)
        assert b" 408 " in raw(server, post(GOOD)[:-4])
        assert b" 408 " in raw(server, b"")


@pytest.mark.slow
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

    wired, limit = [], 0

    def wire(nbytes):
        nonlocal limit
        wired.append(nbytes)
        limit, before = nbytes, limit
        return before

    # As on Metal: whoever generates wires memory, and sets it back when it ends.
    info = {**mx.device_info(), "max_recommended_working_set_size": 1 << 30}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", wire)
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
        assert limit == 1 << 30
    assert limit == 0 and wired[-2:] == [1 << 30, 0]


def test_a_template_that_fails_is_no_closed_connection(pack, mixed, monkeypatch):
    monkeypatch.setattr(mixed.model.base.tokenizer._tokenizer, "chat_template", "{{ 1 / zero }}")
    body = CHAT | {"chat_template_kwargs": {"zero": 0}}
    with serving(pack, mixed) as server:
        reply = raw(server, post(body, "/v1/chat/completions"))
        assert b" 400 " in reply and b"fails (ZeroDivisionError: division by zero)" in reply
        body["chat_template_kwargs"] = {"zero": 1, "documents": []}
        assert b" 200 " in raw(server, post(body, "/v1/chat/completions"))


def test_sampling_goes_on_after_a_failure(pack, mixed, answer):
    """A sampler that fails while MLX traces it leaves the thread without random numbers."""
    with serving(pack, mixed) as server, client(server) as api:
        for _ in range(2):
            ids = answer.tokenizer.encode("the fox")
            events = Queue()
            job = Job(ids, "wide", 4, events.put, make_stop_sequences(answer.tokenizer),
                      make_sampler(0.7, top_k=10**6))  # fmt: skip
            server.service.scheduler.submit(job)
            while not isinstance(last := events.get(timeout=60), RuntimeError):
                assert last is not None
            assert "ValueError" in str(last)
            for options in ({}, {"top_p": 0.9}, {"top_k": 3}, {"xtc_probability": 0.5}):
                reply = api.completions.create(**GOOD, temperature=5.0, extra_body=options)
                assert reply.usage.completion_tokens
        idle(server)


def test_options_of_sampling_at_their_limits(pack, mixed, answer):
    """As mlx-lm means them, and none fails the batch."""
    expected = text(answer, "wide", "the fox", 4)
    with serving(pack, mixed) as server, client(server) as api:

        def ask(**options):
            return api.completions.create(**GOOD, extra_body=options).choices[0].text

        assert ask(temperature=1e-45) == ask(temperature=0, seed=2**63 - 1) == expected
        # Beyond the vocabulary is all of it.
        assert len({ask(temperature=5, top_k=10**6) for _ in range(6)}) > 1
        assert ask(temperature=5, top_k=1) == ask(temperature=5, top_p=1e-6) == expected
        for name, most in (("presence", 2), ("frequency", -2), ("repetition", 100)):
            for window in (0, 1, 1_000_000):
                size = {f"{name}_context_size": window}
                assert ask(temperature=100, **{f"{name}_penalty": most}, **size) is not None
        only = answer.tokenizer.encode("x")[0]
        assert ask(logit_bias={str(only): 10_000}) == "xxxx"
        others = [i for i in range(server.service.vocabulary) if i != only]
        assert ask(logit_bias={str(i): -10_000.0 for i in others}, temperature=1) == "xxxx"
        idle(server)


def memory(server):
    """Bytes that MLX holds once no request is open and all garbage is collected."""
    idle(server)
    gc.collect()
    return mx.get_active_memory()


@pytest.mark.slow
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
        before, threads = memory(server), threading.active_count()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert all(pool.map(one, range(n, 2 * n)))
        assert abs(memory(server) - before) < 2e6
        print({key: n for key, n in counted(server).items() if "_total" in key})
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1.05 * resident
        assert threading.active_count() <= threads + 12
