"""More adapters than memory has room for: over sockets, beside stock mlx-lm."""

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import openai
import pytest
from helpers.adapters import ABOUT, Q, adapter_of
from helpers.loading import NO_END, PATHS, TOKEN, N, ask, changing, read
from helpers.served import client, counted, counts_at, counts_when, evictions, idle, prompt_of, text

from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.serve import scheduler
from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.mixed_batch import Prefixes, ranks_of


def of_their_own(pack, model_path, memory=1):
    base = BaseModel(str(model_path))
    return Adapters(base, pack, memory, Metrics("model"), Prefixes(0))


def test_more_adapters_than_memory_holds(pack, library, model_path, answer):
    """Each answer is its own adapter's, whoever had to leave; pinned ones stay."""
    rng = random.Random(0)
    factors = of_their_own(pack, model_path).model.factors(read(library, "a0"))
    room = 9 * sum(x.nbytes for pair in factors.values() for x in pair)
    names = [*(f"a{i}" for i in range(12)), *pack.tasks, "model"]
    asked = [(rng.choice(names), prompt_of(rng, 3)) for _ in range(40)]
    with changing(pack, library, model_path, room) as (server, do):
        pin = {"lora_name": "kept", "lora_path": "a0", "pinned": True}
        assert do(PATHS[0], pin)[0] == 200
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda job: ask(server, *job), asked))
        kept = server.service.adapters.names["kept"].seat
        assert server.service.adapters.model.nbytes <= room and kept
        assert evictions(server) > 9
        codes = [do(PATHS[0], pin | {"lora_name": f"p{i}"})[0] for i in range(9)]
        # One slot stays for others.
        assert codes[0] == 200 and codes[-1] == 400
        assert ask(server, "a3") == text(answer, read(library, "a3"), "the fox", N)
        idle(server)
    for (name, prompt), reply in zip(asked, found):
        own = None if name == "model" else name if name in pack.tasks else read(library, name)
        assert reply == text(answer, own, prompt, N), name


def test_no_room_beside_what_is_pinned(pack, library, model_path):
    """Which a wider adapter takes from others: who asks for it does not wait for ever."""
    factors = of_their_own(pack, model_path).model.factors(read(library, "a1"))
    room = 6 * sum(x.nbytes for pair in factors.values() for x in pair)
    with changing(pack, library, model_path, room) as (server, do):
        for i in (1, 4):
            pin = {"lora_name": f"p{i}", "lora_path": f"a{i}", "pinned": True}
            assert do(PATHS[0], pin)[0] == 200
        with pytest.raises(openai.InternalServerError, match="no room in memory beside"):
            ask(server, "a0")
        assert ask(server, "p1") and do(PATHS[1], {"lora_name": "p1"})[0] == 200
        assert do(PATHS[1], {"lora_name": "p4"})[0] == 200
        assert ask(server, "a0")


def test_a_wider_adapter_takes_room_from_others_only_while_it_is_there(pack, library, model_path):
    """Memory has room for two of it, and for many others."""
    adapters = of_their_own(pack, model_path)
    wide, *others = (adapters.model.factors(read(library, f"a{i}")) for i in (0, 1, 4, 7, 10))
    each = [sum(x.nbytes for pair in f.values() for x in pair) for f in (wide, others[0])]
    adapters.memory = 3 * each[0]
    adapters.add("wide", Entry("wide", library, lambda: None), wide)
    assert adapters.names["wide"].seat and adapters.nbytes_with(ranks_of(others[0])) == 3 * each[0]
    adapters.remove("wide").result()
    assert adapters.model.nbytes == 0
    for i, factors in enumerate(others):
        adapters.add(str(i), Entry(str(i), library, lambda: None), factors)
    # The base has a slot, too.
    assert adapters.model.nbytes == 5 * each[1]
    entry = Entry("wide", library, lambda: None)
    adapters.add("wide", entry, wide)
    assert entry.seat is None and adapters._place(entry, wide)
    assert [bool(adapters.names[str(i)].seat) for i in range(4)] == [False, False, False, True]
    assert adapters.model.nbytes == adapters.memory


def test_memory_is_known_before_anything_is_allocated(model_path, tmp_path):
    """One wide adapter among many of rank 1 took its rank for all of them (issue 72)."""
    base = BaseModel(str(model_path))
    adapters = [adapter_of(f"t{i}", [(0, Q)], 1, 1.0, i) for i in range(59)]
    adapters.append(adapter_of("wide", [(0, Q)], 500, 1.0, 99))
    about = ABOUT | {"model": base.name, "config_hash": base.config_hash}
    pack = write_pack(tmp_path / "pack", adapters, Manifest(**about))
    whole = 61 * 500 * 64 * base.compute_dtype.size
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    few = of_their_own(pack, model_path, whole - 1)
    assert few.model.nbytes == 0 and mx.get_peak_memory() - before < whole / 2
    assert of_their_own(pack, model_path, whole).model.nbytes == whole


def test_a_pinned_adapter_makes_way_for_a_wider_one(pack, library, model_path, answer):
    """It came last, into a slot that there is not beside the wider one."""
    factors = of_their_own(pack, model_path).model.factors(read(library, "a0"))
    room = 3 * sum(x.nbytes for pair in factors.values() for x in pair)
    prompts = [f"{prompt_of(random.Random(0), 40)} {tail}" for tail in ("x", "the fox", "lazy")]
    with changing(pack, library, model_path, room) as (server, do):
        ask(server, "a1")
        ask(server, "a4")
        pin = {"lora_name": "kept", "lora_path": "a7", "pinned": True}
        assert do(PATHS[0], pin)[0] == 200 and server.service.adapters.names["kept"].seat.slot == 3
        for prompt in prompts[:2]:
            ask(server, "kept", prompt)
        # Not while a request runs with it.
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(ask, server, "kept", n=200, logit_bias=NO_END)
            counts_when(server, lambda _: server.service.adapters.names["kept"].rows)
            assert ask(server, "a0") == text(answer, read(library, "a0"), "the fox", N)
            assert long.result() == ask(server, "kept", n=200, logit_bias=NO_END)
        assert (
            server.service.adapters.names["kept"].seat.slot == 1
            and server.service.adapters.model.nbytes <= room
        )
        with client(server, TOKEN) as api:
            found = api.completions.create(model="kept", prompt=prompts[2], max_tokens=N)
        assert found.choices[0].text == text(answer, read(library, "a7"), prompts[2], N)
        assert found.usage.prompt_tokens_details.cached_tokens


@pytest.mark.slow
def test_who_waits_for_room_is_not_passed_over_for_ever(pack, library, model_path, answer):
    """Memory has room for one adapter, and others ask for it all the time."""
    with changing(pack, library, model_path, 1) as (server, _):
        stop = threading.Event()

        def insist(i):
            while not stop.is_set():
                ask(server, "wide", n=40 + 17 * i, logit_bias=NO_END)

        with ThreadPoolExecutor(6) as pool:
            others = [pool.submit(insist, i) for i in range(6)]
            try:
                counts_at(server, "d2c_mlx_first_token_seconds_count", 6)
                assert ask(server, "other") == text(answer, "other", "the fox", N)
                assert evictions(server)
            finally:
                stop.set()
            assert all(one.result() is None for one in others)


def test_an_adapter_that_is_loaded_anew_while_several_wait_for_its_room(
    pack, library, model_path, answer, monkeypatch
):
    """The first that waits holds up all others; it must not wait for one of those."""
    monkeypatch.setattr(scheduler, "_PASSED_SECONDS", 0.0)
    with ThreadPoolExecutor(3) as pool, changing(
        pack, library, model_path, 1
    ) as (server, do):  # fmt: skip
        assert do(PATHS[0], {"lora_name": "asked", "lora_path": "a3"})[0] == 200
        found = server.service.adapters
        long = pool.submit(ask, server, "wide", n=400, logit_bias=NO_END)
        counts_at(server, "d2c_mlx_first_token_seconds_count", 1)
        others = [pool.submit(ask, server, "asked") for _ in range(2)]
        entry = found.names["asked"]
        counts_when(server, lambda _: entry.users.total() == 2 and found.lacks_room(entry))
        anew = {"lora_name": "asked", "lora_path": "a7", "load_inplace": True}
        assert do(PATHS[0], anew)[0] == 200 and not long.done()
        expected = text(answer, read(library, "a7"), "the fox", N)
        assert [one.result(60) for one in others] == [expected] * 2 and long.result(60)


def test_beginnings_of_prompts_go_with_their_adapter(library, tmp_path, pack, model_path, answer):
    """New weights under an old name, by a load in place, and in a file that is read again."""
    shutil.copytree(library, tmp_path / "own", symlinks=True)
    prompts = [f"{prompt_of(random.Random(0), 40)} {tail}" for tail in ("x", "the fox", "lazy")]
    with changing(pack, tmp_path / "own", model_path, 1) as (server, do):

        def shared(name, adapter):
            """Whether each prompt found something."""
            found = []
            for prompt in prompts:
                with client(server, TOKEN) as api:
                    reply = api.completions.create(model=name, prompt=prompt, max_tokens=N)
                assert reply.choices[0].text == text(answer, adapter, prompt, N)
                found.append(reply.usage.prompt_tokens_details.cached_tokens > 0)
            return found

        first, second = (read(library, one) for one in ("a3", "a7"))
        assert shared("a3", first) == shared("a7", second) == [False, False, True]
        # Memory has room for one.
        assert shared("a3", first)[:2] == [False, False]
        body = {"lora_name": "a3", "lora_path": "a7", "load_inplace": True}
        assert do(PATHS[0], body)[0] == 200 and shared("a3", second)[:2] == [False, False]
        ask(server, "wide")
        shutil.rmtree(tmp_path / "own" / "a7")
        shutil.copytree(library / "a3", tmp_path / "own" / "a7")
        assert shared("a3", first) == [False, False, True]
        assert counted(server)["d2c_mlx_prefix_bytes"]
        assert do(PATHS[1], {"lora_name": "a3"})[0] == 200
        counts = counts_when(server, lambda counts: not counts["d2c_mlx_prefix_bytes"])
        key = 'd2c_mlx_adapter_%s_total{adapter="%s"}'
        assert counts[key % ("loads", "a7")] == counts[key % ("evictions", "a7")] == 1
        assert key % ("loads", "a3") not in counts
