"""A server whose adapters may change, and a folder of adapters to load."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.serve.scheduler import Limits
from helpers.adapters import ADAPTERS
from helpers.served import client, post, raw, serving

TOKEN = "s3cret"
# Tokens of an answer.
N = 6
PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
# No end token, so that an answer is as long as it may be.
NO_END = {"0": -10_000, "1": -10_000, "2": -10_000}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Twelve adapters as directories, made of three; one that is broken, and links."""
    root = tmp_path_factory.mktemp("library")
    for i in range(12):
        adapter = ADAPTERS[i % 3]
        modules = {path: replace(lora, scale=lora.scale * (1 + i // 3))
                   for path, lora in adapter.modules.items()}  # fmt: skip
        replace(adapter, modules=modules).save(root / f"a{i}", 2)
    (root / "broken").mkdir()
    (root / "broken" / "adapters.safetensors").write_bytes(b"x")
    outside = tmp_path_factory.mktemp("outside") / "adapter"
    read(root, "a3").save(outside, 2)
    (root / "linked").symlink_to(outside)
    (root / "itself").symlink_to(root / "itself")
    return root


@contextmanager
def changing(pack, library, model, memory=None, **options):
    """A server of its own, whose adapters may change, and `do(path, body)`, which asks for that."""
    options = {"token": TOKEN, "directory": library, **options}
    limits = Limits(adapter_nbytes=memory)
    with serving(pack, model, limits=limits, **options) as server:

        def do(path, body):
            reply = raw(server, post(body, path, Authorization=f"Bearer {TOKEN}"))
            head, content = reply.split(b"\r\n\r\n", 1)
            return int(head.split()[1]), content.decode()

        yield server, do


def read(library, name):
    return read_adapter(library / name)


def ask(server, name, prompt="the fox", n=N, **options):
    """The text of an answer; options as in a request."""
    with client(server, TOKEN) as api:
        reply = api.completions.create(model=name, prompt=prompt, max_tokens=n, extra_body=options)
        return reply.choices[0].text
