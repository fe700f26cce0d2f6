"""A tiny pack, what stock mlx-lm answers with it, its server, and clients of every kind."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import mlx.core as mx
import openai
import pytest
from mlx_lm import load as stock_load

from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.model import Model
from d2c_mlx.models.stock import switch
from d2c_mlx.models.tasks import load_task
from d2c_mlx.serve.router import fit_router, load_router, save_router
from d2c_mlx.serve.service import PackService
from d2c_mlx.web.server import PackServer
from helpers.adapters import ADAPTERS, pack_of
from helpers.losses import greedy
from helpers.tiny import task, tiny_model

NAMES = [adapter.name for adapter in ADAPTERS]
WORDS = "the quick brown fox and lazy dogs are watching an answer to question".split()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="session")
def packs(model_path, tmp_path_factory):
    """Three adapters of other ranks and modules, plain; compact, with a task left to the base."""
    root = tmp_path_factory.mktemp("pack")
    base = Model(str(model_path))
    levels = [{p: ((2, 4), (1, 2)) for p in adapter.modules} for adapter in ADAPTERS]
    stored = [compress(a, level) for a, level in zip(ADAPTERS, levels)]
    serves = {name: i for i, name in enumerate(NAMES)} | {"bare": None}
    packs = {
        "plain": pack_of(base, ADAPTERS, root / "plain"),
        "compact": pack_of(base, stored, root / "compact", serves),
    }
    for name in serves:
        task(root / "tasks", name)
    for kind, pack in packs.items():
        probes = [base.encode(n, load_task(root / "tasks" / n).probe) for n in pack.tasks]
        packs[kind] = save_router(pack, fit_router(base.model, probes))
    return packs


@pytest.fixture(scope="session")
def pack(packs):
    """The compact one, which most tests ask."""
    return packs["compact"]


@pytest.fixture(scope="session")
def server(pack, model_path):
    """For tests that leave it as it was."""
    with serving(pack, model_path) as running:
        yield running


@pytest.fixture(scope="session")
def answer(pack, model_path):
    return answers_of(model_path, pack)


def answers_of(model_path, pack):
    """`answer(task or adapter, prompt, n)`: greedy tokens of stock mlx-lm with its LoRA layers."""
    model, tokenizer = stock_load(str(model_path))
    model.set_dtype(mx.float32)
    texts = {}

    def ask(name, prompt, n):
        """With the pack's adapter, unless an adapter is given."""
        adapter = pack.load(name) if isinstance(name, str) else name
        key = adapter and adapter.digest, tuple(prompt), n
        if key not in texts:
            switch(model, adapter and adapter.uniform(mx.float32), pack.path)
            texts[key] = greedy(model, tokenizer, prompt, n)
        return texts[key]

    ask.tokenizer = tokenizer
    return ask


@contextmanager
def serving(pack, model, router=None, limits=None, directory=None, log=None, **access):
    """A server of a pack on a model's directory, or on a base model that nobody uses any more."""
    base = model if isinstance(model, Model) else Model(str(model))
    service = PackService(pack, base, router or load_router(pack), limits, directory)
    server = PackServer(("127.0.0.1", 0), service, log=log, **access)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


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


def until(true, seconds=20):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def n_open(server):
    return server.service.scheduler.n_open


def idle(server):
    until(lambda: n_open(server) == 0)


def raw(server, content, wait=True):
    """Bytes that the server sends back to bytes."""
    with socket.create_connection(server.address) as connection:
        connection.settimeout(60)
        connection.sendall(content)
        if not wait:
            return b""
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


def post(body, path="/v1/completions", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Host": "localhost", "Content_Length": str(len(content)), **headers}
    head = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in lines.items())
    return f"POST {path} HTTP/1.0\r\n{head}\r\n".encode() + content


def get(path, *lines, method="GET"):
    """The bytes of a request without a body."""
    head = "".join(f"{line}\r\n" for line in ("Host: localhost", *lines))
    return f"{method} {path} HTTP/1.0\r\n{head}\r\n".encode()


# A bias under which no answer ends by itself.
NO_END = {str(i): 100 for i in range(20, 200)}
GOOD = {"model": "wide", "prompt": "the fox", "max_tokens": 4}
