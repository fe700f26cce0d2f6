"""`serve` with clients that say what is wrong, leave, or are too many."""

import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import Queue

import mlx.core as mx
import psutil
import pytest
from helpers.served import GOOD, NO_END, client, get, idle, post, raw, serving, text, until
from mlx_lm.sample_utils import make_sampler

from d2c_mlx.serve.adapters import Adapters
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.serve.router import Router
from d2c_mlx.serve.scheduler import Job, Limits
from d2c_mlx.serve.text import Answer, Encoder

CHAT = {"model": "wide", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x"}}
# Fields that would be ignored -> values that mean nothing, and pass.
IGNORED = {
    "parallel_tool_calls": (False, [True]), "reasoning_effort": ("low", []),
    "ignore_eos": (True, [False]), "min_tokens": (5, [0]), "num_draft_tokens": (3, [0]),
    "continue_final_message": (True, [False]), "repeat_penalty": (1.1, [1, 1.0]),
    "mirostat": (2, [0]), "tfs_z": (0.5, [1]), "num_predict": (5, []), "think": (True, []),
    "adapters": ("/tmp/x", []), "best_of": (True, [1]), "n": (2, [1]), "lora": ([], []),
    "xtc_probability": (0.5, [0]),
}  # fmt: skip
# Fields of a text and of a chat, each with values that are refused (400) by its name.
FIELDS = {
    **{name: [2**63] for name in ("top_k", "presence_penalty", "frequency_penalty",
                                  "repetition_context_size")},
    "temperature": [2**63, 101, True, -1, "hot"], "repetition_penalty": [2**63, 1e-300, 0],
    "top_p": [1e-60, 0], "min_p": [1.1], "presence_context_size": [10**7],
    "seed": [2**63],
    "logit_bias": [{"5": None}, {"5": [1]}, {"5": 1e9}, {"5": True}, {"1_0": 1}, {"-1": 1},
                   {"9" * 5000: 1}, [1], {"100000": 1}, {"x": 1}],
    "max_tokens": [10**6, 0, True], "top_logprobs": [2, 21], "model": [1],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, 5],
    "stop": [[1], ["x"] * 17, [""]], "stream_options": [1], "prompt": [["x"], "", 1],
    **{name: [value] for name, (value, _) in IGNORED.items()},
}  # fmt: skip
CHAT_FIELDS = {
    "messages": [[], "x", [{"role": "user"}], [{"role": "user", "content": [IMAGE]}], [1],
                 [{"role": "user", "content": 5}]],
    "tool_choice": ["required", TOOLS[0], True, {}],
    "chat_template_kwargs": [
        {"tokenize": False}, {"return_tensors": "np"}, {"tools": []}, {"padding": True},
        {"truncation": True, "max_length": 1}, {"add_generation_prompt": False}, {"self": 1},
        {"return_dict": True}, {"continue_final_message": True}, {"tokenizer_kwargs": {"text": 1}},
        {"chat_template": "{{ 1/0 }}"},
        {"chat_template": 2 * "{% for i in range(6000) %}" + 2 * "{% endfor %}"}],
}  # fmt: skip
CHUNKED = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
           b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
# Request, field at fault, status.
BAD = [
    *((post(GOOD | {name: value}), name, 400) for name, values in FIELDS.items()
      for value in values),
    *((post(CHAT | {name: value}, "/v1/chat/completions"), name, 400)
      for name, values in CHAT_FIELDS.items() for value in values),
    (post(CHAT | {"chat_template_kwargs": {"messages": 1}}, "/v1/chat/completions"),
     "messages", 400),
    *((post(content), None, 400) for content in
      (b"{", b"\xff\xfe", b'{"model": NaN}', b"[" * 90_000, [1], b"")),
    (post({"prompt": "x"}), "model", 400),
    *((post(GOOD | {"model": name}), "model", 404) for name in ("nobody", "../../etc/passwd", "")),
    (post(GOOD | {"prompt": "the fox " * 400}), None, 400),
    (post(GOOD | {"prompt": "the fox " * 2000}), "prompt", 400),
    (post(GOOD | {"max_tokens": 400, "prompt": "the fox " * 100}), None, 400),
    (post(GOOD, "/v1/embeddings"), None, 404), (post(GOOD, "/api/chat"), None, 404),
    (get("/etc/passwd"), None, 404), (get("/v1/models/nobody"), "model", 404),
    (get("/v1/models", method="PUT"), None, 404),
    (post(GOOD, Origin="http://evil.example"), None, 403),
    (get("/v1/models", "Origin: null"), None, 403),
]  # fmt: skip


def error_of(reply):
    """Status, field and message of a refusal."""
    head, body = reply.split(b"\r\n\r\n", 1)
    assert b"application/json" in head, reply
    error = json.loads(body)["error"]
    return int(head.split()[1]), error["param"], error["message"]


# Kept open, as clients do; what HTTP/1.0 closes at once may be reset before it is read.
LARGE = [CHUNKED + b"493e0\r\n" + b" " * 300_000 + b"\r\n0\r\n\r\n",
         post(b" " * 300_000).replace(b"HTTP/1.0", b"HTTP/1.1")]  # fmt: skip


@pytest.fixture(scope="module")
def small(pack, model_path):
    with serving(pack, model_path, limits=Limits(body_nbytes=200_000, seconds=2)) as running:
        yield running


def test_what_is_wrong_is_told_in_json_and_the_server_goes_on(small, answer, capfd):
    for content, field, status in BAD:
        assert error_of(raw(small, content))[:2] == (status, field), content[:200]
    for content in LARGE:
        with socket.create_connection(small.address) as connection:
            connection.sendall(content)
            reply = b""
            while b"}}" not in reply:
                reply += connection.recv(65536)
            assert error_of(reply)[0] == 413
    # What HTTP itself refuses.
    for content in (b"\x00\x01 garbage\r\n\r\n", post(GOOD, Content_Length="-1"),
                    b"GET /" + b"x" * 70_000 + b" HTTP/1.0\r\n\r\n"):  # fmt: skip
        assert b" 400 " in raw(small, content)
    with client(small) as api:
        # Values that mean nothing pass.
        harmless = {name: value for name, (_, values) in IGNORED.items() for value in values}
        for options in ({}, harmless, dict.fromkeys(IGNORED)):
            reply = api.completions.create(**GOOD, extra_body=options)
            assert reply.choices[0].text == text(answer, "wide", "the fox", 4)
    assert "Traceback" not in capfd.readouterr().err


def patterns(n):
    return {"type": "string", "allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(n)]}


def with_schema(schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return post(GOOD | {"response_format": form})


@pytest.mark.slow
def test_a_schema_has_bounds_and_ends_no_process(small):
    """3,000 references were a segmentation fault, 30 patterns took 2 GB in 20 s (issue 72)."""

    def chain(n):
        parts = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
        return {"$defs": {**parts, f"d{n}": {"type": "string"}}, "$ref": "#/$defs/d0"}

    def nested(depth):
        schema = {"type": "array", "items": {"type": "string"}}
        return schema if depth == 1 else schema | {"items": nested(depth - 1)}

    words = {"properties": {"a": {"enum": ["x" * 99_000]}}}
    for schema in (chain(3000), nested(300), patterns(60), patterns(30), {"type": "nothing"},
                   {"$ref": "#/nowhere"}, words):  # fmt: skip
        started = time.monotonic()
        assert error_of(raw(small, with_schema(schema)))[:2] == (400, "response_format")
        assert time.monotonic() - started < 20
    for schema in (chain(100), nested(60), patterns(2)):
        assert b" 200 " in raw(small, with_schema(schema)), schema


def test_the_compilation_of_a_schema_ends_with_its_client(small):
    def children():
        return {child for child in psutil.Process().children() if child.is_running()}

    before = children()
    with ExitStack() as stack:
        for _ in range(5):  # each may take 2 GB
            connection = stack.enter_context(socket.create_connection(small.address))
            connection.sendall(with_schema(patterns(32)))
        until(lambda: children() - before)
        time.sleep(0.5)
        assert len(children() - before) <= 2
    until(lambda: not children() - before, 2)


def test_long_prompts_are_refused_by_their_bytes_and_hold_up_nobody(small):
    """They were tokenized whole, and the event loop waited for the tokenizer (issue 72)."""
    long, calls, stopped = post(GOOD | {"prompt": "ab " * 30_000}), [], threading.Event()

    def encode(*_arguments, **_options):
        calls.append(1)
        stopped.wait(5)
        return [1]

    tokenizer = small.service.encoder.tokenizer
    stream = {"max_tokens": 400, "stream": True, "logprobs": True, "logit_bias": NO_END}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        streaming = pool.submit(raw, small, post(GOOD | stream))
        until(lambda: small.service.adapters.names["wide"].rows)
        patch.setattr(tokenizer._tokenizer, "encode", encode)
        assert error_of(raw(small, long))[1] == "prompt" and not calls
        waiting = [pool.submit(raw, small, post(GOOD)) for _ in range(2)]
        until(lambda: calls)
        started = time.monotonic()
        assert b" 200 " in raw(small, get("/health")) and time.monotonic() - started < 2
        stopped.set()
        assert all(b" 200 " in reply.result() for reply in [*waiting, streaming])


@pytest.mark.slow
def test_who_leaves_frees_the_place(pack, model_path):
    """Streams and whole replies, and one that never sends all; more than may wait are refused."""
    long = {"model": "wide", "prompt": "the", "max_tokens": 500, "logit_bias": NO_END}
    limits, log = Limits(batch=2, queue=2, seconds=1), io.StringIO()
    with serving(pack, model_path, limits=limits, log=log) as server:
        for stream in (True, False):
            with socket.create_connection(server.address) as connection:
                connection.sendall(post(long | {"stream": stream}))
                until(lambda: server.service.adapters.names["wide"].rows)
            idle(server)
        lines = [json.loads(line) for line in log.getvalue().splitlines()]
        raw(server, post(GOOD)[:-4], wait=False)
        assert b"send it at once" in raw(server, post(GOOD)[:-4])
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: raw(server, post(long)), range(8)))
        assert {reply.split()[1] for reply in replies} == {b"200", b"503"}
        assert all(b'"overloaded"' in reply for reply in replies if b" 503 " in reply)
    assert [line["status"] for line in lines] == [200, 499]
    assert all(line["completion_tokens"] < 500 for line in lines)


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_ends_its_requests_and_no_others(pack, model_path, answer, monkeypatch, stream):
    """Before anything was sent, as a reply with a status; later, in the stream."""

    def broken(*_arguments, **_options):
        raise MemoryError

    # As on Metal: whoever generates wires memory, and sets it back when it ends.
    limits = [0]
    info = {**mx.device_info(), "max_recommended_working_set_size": 1 << 30}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "set_wired_limit", lambda n: limits.append(n) or limits[-2])
    with serving(pack, model_path) as server, client(server) as api:
        # The last two on the scheduler's thread.
        for owner, name, model in (
            (Answer, "take", "wide"),
            (Encoder, "encode", "wide"),
            (Router, "states", "auto"),
            (Adapters, "__call__", "wide"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                reply = raw(server, post(GOOD | {"model": model, "stream": stream}))
            late = stream and owner in (Answer, Adapters)
            assert reply.split()[1] == (b"200" if late else b"500"), reply
            assert b"MemoryError" in reply and (b'data: {"error"' in reply) == late
            assert reply.count(b"HTTP/1.1") == 1
        tokenizer = server.service.encoder.tokenizer
        monkeypatch.setattr(tokenizer._tokenizer, "chat_template", "{{ 1 / zero }}")
        for zero, status in ((0, b"400"), (1, b"200")):
            body = CHAT | {"stream": stream, "chat_template_kwargs": {"zero": zero}}
            assert raw(server, post(body, "/v1/chat/completions")).split()[1] == status
        reply = api.completions.create(**GOOD)
        assert reply.choices[0].text == text(answer, "wide", "the fox", 4)
        assert b" 200 " in raw(server, get("/health")) and limits[-1] == 1 << 30
    assert limits[-2:] == [1 << 30, 0]


def test_sampling_goes_on_after_a_failure_and_at_its_limits(server, answer):
    """A sampler that fails while MLX traces it leaves the thread without random numbers."""
    tokenizer, expected = answer.tokenizer, text(answer, "wide", "the fox", 4)
    events = Queue()
    job = Job(tokenizer.encode("the fox"), "wide", 4, events.put, make_sampler(0.7, top_k=10**6))
    server.service.scheduler.submit(job)
    while not isinstance(last := events.get(timeout=60), RequestError):
        pass
    assert "ValueError" in str(last)
    with client(server) as api:

        def ask(**options):
            return api.completions.create(**GOOD, extra_body=options).choices[0].text

        assert ask(temperature=1e-45) == ask(temperature=0, seed=2**63 - 1) == expected
        # Beyond the vocabulary is all of it.
        assert len({ask(temperature=5, top_k=10**6) for _ in range(6)}) > 1
        assert ask(temperature=5, top_k=1) == ask(temperature=5, top_p=1e-6) == expected
        for name, most in (("presence", 2), ("frequency", -2), ("repetition", 100)):
            assert ask(temperature=100, **{f"{name}_penalty": most}) is not None
        only = tokenizer.encode("x")[0]
        assert ask(logit_bias={str(only): 10_000}) == "xxxx"
        others = [i for i in range(tokenizer.vocab_size) if i != only]
        assert ask(logit_bias={str(i): -10_000.0 for i in others}, temperature=1) == "xxxx"
