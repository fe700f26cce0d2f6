"""Adapters that come and go while requests run, and memory: over sockets, beside stock mlx-lm."""

import json
import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx
import openai
import pytest
from helpers.adapters import ADAPTERS, adapter_of, pack_of
from helpers.served import GOOD, client, idle, n_open, post, prompt_of, raw, serving, text, until
from helpers.tiny import ALL

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.model import Model
from d2c_mlx.serve import scheduler
from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.scheduler import Limits
from d2c_mlx.utils.errors import AdapterError

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
    read_adapter(root / "a3").save(outside, 2)
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


def ask(server, name, prompt="the fox", n=N, **options):
    """The text of an answer; options as in a request."""
    with client(server, TOKEN) as api:
        reply = api.completions.create(model=name, prompt=prompt, max_tokens=n, extra_body=options)
        return reply.choices[0].text


@pytest.fixture(scope="module")
def shared(pack, library, model_path):
    """A server for tests that leave it as it was."""
    with changing(pack, library, model_path) as pair:
        yield pair


def test_an_adapter_is_loaded_asked_and_unloaded(shared, library, answer):
    """By vLLM's routes."""
    server, do = shared
    adapters = (read_adapter(library / name) for name in ("a3", "a7"))
    first, second = (text(answer, adapter, "the fox", N) for adapter in adapters)
    body = {"lora_name": "mine", "lora_path": "a3"}
    loaded = 200, "Success: LoRA adapter 'mine' added successfully."
    assert do(PATHS[0], body) == loaded and ask(server, "mine") == first
    with client(server, TOKEN) as api:
        card, base = (api.models.retrieve(name).model_dump() for name in ("mine", "model"))
    assert (card["parent"], card["root"]) == ("model", str(library / "a3"))
    assert (base["parent"], base["root"]) == (None, "model")
    assert do(PATHS[0], body)[0] == 400
    assert do(PATHS[0], body | {"lora_path": str(library / "a7"), "load_inplace": True}) == loaded
    assert ask(server, "mine") == second
    # The directory's owner made the link, as the hub's cache is made of links.
    assert do(PATHS[0], body | {"lora_path": "linked", "load_inplace": True}) == loaded
    assert ask(server, "mine") == first
    unload = {"lora_name": "mine"}
    assert do(PATHS[1], unload) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert do(PATHS[1], unload)[0] == 404 and do(PATHS[1], {})[0] == 400
    with client(server, TOKEN) as api, pytest.raises(openai.NotFoundError):
        api.completions.create(**GOOD | {"model": "mine"})


def test_what_may_not_be_loaded(shared, library):
    server, do = shared
    name, a1 = {"lora_name": "x"}, {"lora_path": "a1"}
    refused = [(a1, 400, "lora_name"), (name, 404, "lora_path"),
               (name | {"lora_path": "broken"}, 400, "lora_path"),
               (name | a1 | {"pinned": True}, 400, "pinned"),
               (name | a1 | {"is_3d_lora_weight": True}, 400, "is_3d_lora_weight"),
               ([1], 400, None), (a1 | {"lora_name": 1}, 400, "lora_name")]  # fmt: skip
    for path in ("..", "../x", "/etc", ".", str(library), "a1/../../model", "org/name", "a99",
                 "\0", "x" * 5000, "itself"):  # fmt: skip
        refused.append((name | {"lora_path": path}, 404, "lora_path"))
    # The names that packs refuse, and those of other models (issue 72).
    for bad in ("", "model", "auto", "a\nb", "\x1b[31m", ".hidden", "a/b", "x" * 500_000):
        refused.append((a1 | {"lora_name": bad}, 400, "lora_name"))
    for body, status, field in refused:
        code, reply = do(PATHS[0], body)
        assert (code, json.loads(reply)["error"]["param"]) == (status, field), str(body)[:80]
    assert "x" not in server.service.adapters.names


def test_changes_are_off_and_behind_the_token(pack, model_path, library, command):
    for options in ({"token": TOKEN}, {"directory": library}):
        with serving(pack, model_path, **options) as server:
            for path in PATHS:
                assert b" 404 " in raw(server, post({}, path, Authorization=f"Bearer {TOKEN}"))
    with serving(pack, model_path, token=TOKEN, directory=library) as server:
        assert all(b" 401 " in raw(server, post({}, path)) for path in PATHS)
    assert command("serve", pack.path, "--adapter-dir", library)[0] == 2


def begin(server, name, n):
    """A stream that has begun, and a function that gives all its text."""
    api = client(server, TOKEN)
    stream = api.completions.create(model=name, prompt="the fox", max_tokens=n, stream=True,
                                    logit_bias=NO_END)  # fmt: skip
    first = next(iter(stream)).choices[0].text
    return stream, lambda: first + "".join(event.choices[0].text for event in stream)


def test_what_runs_keeps_its_adapter(shared, library):
    """Other weights under its name, and an unload; it leaves memory with its last request."""
    server, do = shared
    adapters, n, body = server.service.adapters, 60, {"lora_name": "mine", "lora_path": "a3"}
    before = adapters.nbytes
    assert do(PATHS[0], body)[0] == 200
    alone = begin(server, "mine", n)[1]()
    ends = [begin(server, "mine", n)[1] for _ in range(2)]
    assert do(PATHS[0], body | {"lora_path": "a7", "load_inplace": True})[0] == 200
    changed = begin(server, "mine", n)[1]()
    assert [end() for end in ends] == [alone, alone] != [changed, changed]
    stream, end = begin(server, "mine", 150)
    assert do(PATHS[1], {"lora_name": "mine"})[0] == 200 and adapters.nbytes > before
    assert end().startswith(changed)
    idle(server)
    assert adapters.nbytes == before


def test_a_task_of_a_shared_adapter_is_unloaded(pack, model_path, tmp_path, answer):
    """And those left to the base; what else is served of an adapter stays."""
    base = Model(str(model_path))
    both = compress(ADAPTERS[0], dict.fromkeys(ADAPTERS[0].modules, [(2, 8)]))
    pack = pack_of(base, [both], tmp_path / "pack", {"one": 0, "two": 0, "bare": None})
    with changing(pack, tmp_path, base) as (server, do):
        for name in ("two", "bare", "one"):
            stream, _ = begin(server, name, 400)
            assert do(PATHS[1], {"lora_name": name})[0] == 200
            if name == "two":
                assert ask(server, "one") == text(answer, pack.load("one"), "the fox", N)
            stream.close()
            idle(server)
            assert bool(server.service.adapters.nbytes) == (name != "one")


# More adapters than memory has room for; all at once: test_stress.py

PROMPTS = [f"{prompt_of(random.Random(0), 40)} {tail}" for tail in ("x", "the fox")]


def nbytes_of(adapters, library, name):
    """Bytes of one slot of an adapter."""
    shapes, modules = adapters.base.module_shapes, read_adapter(library / name).modules
    return 4 * sum(lora.rank * sum(shapes[path]) for path, lora in modules.items())


def test_a_wider_adapter_takes_room_from_others_only_while_it_is_there(pack, library, model_path):
    """Memory has room for it and one other, or for many others; one that runs stays."""
    adapters = Adapters(Model(str(model_path)), pack, 1)
    wide, narrow = (nbytes_of(adapters, library, name) for name in ("a0", "a1"))
    # Its other modules have a place for the base, too; the one of both has three of rank 3.
    both = adapters.memory = 2 * wide + narrow * 3 // 2
    entries = {name: Entry(library / name, partial(read_adapter, library / name))
               for name in ("a0", "a1", "a4", "a7", "a10")}  # fmt: skip
    adapters.replace(entries)
    first, *others = entries.values()
    assert adapters.load(first) and adapters.nbytes == 2 * wide
    assert adapters.load(others[0]) and adapters.nbytes == both
    adapters.replace({name: entry for name, entry in entries.items() if entry is not first})
    for entry in others:
        assert adapters.load(entry)
    # The base has a slot, too.
    assert adapters.nbytes == 5 * narrow
    adapters.replace(entries)
    adapters.begin(others[0])
    adapters.begin(others[1])
    assert not adapters.load(first) and adapters.nbytes == 5 * narrow
    adapters.end(others[1])
    assert adapters.load(first) and adapters.n_evicted == 3
    assert others[0].slot == 1 and adapters.nbytes == both


def test_memory_is_known_before_anything_is_allocated(model_path, tmp_path):
    """One wide adapter among many of rank 1 took its rank for all of them (issue 72)."""
    bases = [Model(str(model_path)) for _ in range(2)]
    adapters = [adapter_of(f"t{i}", ALL, 1, 0.4, i) for i in range(59)]
    adapters.append(adapter_of("wide", ALL, 500, 0.4, 99))
    pack = pack_of(bases[0], adapters, tmp_path / "pack")
    # The base has a place beside those of rank 1.
    rank_1 = sum(map(sum, bases[0].module_shapes.values())) * bases[0].compute_dtype.size
    whole = (1 + 59 + 500) * rank_1
    del adapters
    for base, memory, nbytes in zip(bases, (whole - 1, whole), (0, whole)):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        assert Adapters(base, pack, memory).nbytes == nbytes
        # MLX lets a hundred operations wait, here all of an adapter's: their results are there too.
        assert mx.get_peak_memory() - before < 2.5 * whole


def test_what_the_device_has_no_room_for_is_refused(pack, library, model_path, monkeypatch):
    """When a client loads it, and at the start."""
    with changing(pack, library, model_path) as (server, do):
        monkeypatch.setenv("D2C_MLX_MEMORY_LIMIT", "1MB")
        server.service.adapters.memory = 1
        status, reply = do(PATHS[0], {"lora_name": "x", "lora_path": "a0"})
        assert status == 400 and "MB of memory" in reply
    pytest.raises(AdapterError, Adapters, Model(str(model_path)), pack, 1).match("MB of memory")


def test_who_waits_for_room_is_not_passed_over_for_ever(
    pack, library, model_path, answer, monkeypatch
):
    """Memory has room for one adapter, and others ask for it all the time."""
    monkeypatch.setattr(scheduler, "_PASSED_SECONDS", 0.2)
    with changing(pack, library, model_path, 1) as (server, _), ThreadPoolExecutor(6) as pool:
        stop = threading.Event()

        def insist(i):
            while not stop.is_set():
                ask(server, "wide", n=40 + 17 * i, logit_bias=NO_END)

        others = [pool.submit(insist, i) for i in range(6)]
        try:
            until(lambda: n_open(server) == 6)
            assert ask(server, "other") == text(answer, "other", "the fox", N)
            assert server.service.adapters.n_evicted
        finally:
            stop.set()
        assert all(future.result() is None for future in others)


def test_beginnings_of_prompts_go_with_their_adapter(library, tmp_path, pack, model_path, answer):
    """New weights under an old name, by a load in place, and in a file that is read again."""
    shutil.copytree(library, tmp_path / "own", symlinks=True)
    first, second = (read_adapter(library / name) for name in ("a3", "a7"))
    server = changing(pack, tmp_path / "own", model_path, 1)
    with server as (server, do), client(server, TOKEN) as api:

        def shared(name, adapter):
            """Whether each of two prompts found something."""
            kept = []
            for prompt in PROMPTS:
                reply = api.completions.create(model=name, prompt=prompt, max_tokens=N)
                assert reply.choices[0].text == text(answer, adapter, prompt, N)
                kept.append(reply.usage.prompt_tokens_details.cached_tokens > 0)
            return kept

        for name in ("a3", "a7"):
            assert do(PATHS[0], {"lora_name": name, "lora_path": name})[0] == 200
        # Memory has room for one.
        for name, adapter in (("a3", first), ("a7", second), ("a3", first)):
            assert shared(name, adapter) == [False, True]
        body = {"lora_name": "a3", "lora_path": "a7", "load_inplace": True}
        assert do(PATHS[0], body)[0] == 200 and shared("a3", second) == [False, True]
        ask(server, "wide")
        shutil.rmtree(tmp_path / "own" / "a7")
        shutil.copytree(library / "a3", tmp_path / "own" / "a7")
        assert shared("a3", first) == [False, True]
