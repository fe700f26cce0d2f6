"""More adapters than memory has room for, beside stock mlx-lm; all at once: test_stress.py."""

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mlx.core as mx
import pytest
from helpers.adapters import adapter_of
from helpers.loading import NO_END, PATHS, TOKEN, N, ask, changing, read
from helpers.served import client, n_open, pack_of, prompt_of, text, until
from helpers.tiny import ALL

from d2c_mlx.models.model import Model
from d2c_mlx.serve import scheduler
from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.utils.errors import AdapterError

PROMPTS = [f"{prompt_of(random.Random(0), 40)} {tail}" for tail in ("x", "the fox")]


def nbytes_of(adapters, library, name):
    """Bytes of one slot of an adapter."""
    shapes, modules = adapters.base.module_shapes, read(library, name).modules
    return 4 * sum(lora.rank * sum(shapes[path]) for path, lora in modules.items())


def test_a_wider_adapter_takes_room_from_others_only_while_it_is_there(pack, library, model_path):
    """Memory has room for it and one other, or for many others; one that runs stays."""
    adapters = Adapters(Model(str(model_path)), pack, 1)
    wide, narrow = (nbytes_of(adapters, library, name) for name in ("a0", "a1"))
    # Its other modules have a place for the base, too; the one of both has three of rank 3.
    both = adapters.memory = 2 * wide + narrow * 3 // 2
    entries = {name: Entry(library / name, partial(read, library, name))
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
    with pytest.raises(AdapterError, match="MB of memory"):
        Adapters(Model(str(model_path)), pack, 1)


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
    first, second = (read(library, name) for name in ("a3", "a7"))
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
