"""More adapters than memory has room for: over sockets, beside stock mlx-lm."""

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from helpers.loading import NO_END, PATHS, TOKEN, N, ask, changing, read
from helpers.served import client, counted, counts_at, counts_when, evictions, idle, prompt_of, text

from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.serve import scheduler
from d2c_mlx.serve.adapters import Adapters, Entry

# One kind of pack suffices.
pytestmark = pytest.mark.parametrize("pack", ["compact"], indirect=True)


def test_more_adapters_than_memory_holds(pack, library, model_path, answer):
    """Each answer is its own adapter's, whoever had to leave; pinned ones stay."""
    rng = random.Random(0)
    base = BaseModel(str(model_path))
    factors = Adapters(base, pack, 1).model.factors(read(library, "a0"))
    room = 9 * sum(x.nbytes for pair in factors.values() for x in pair)
    names = [*(f"a{i}" for i in range(12)), *pack.tasks, "model"]
    asked = [(rng.choice(names), prompt_of(rng, 3)) for _ in range(40)]
    with changing(pack, library, room, BaseModel(str(model_path))) as (server, do):
        pin = {"lora_name": "kept", "lora_path": "a0", "pinned": True}
        assert do(PATHS[0], pin)[0] == 200
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda job: ask(server, *job), asked))
        kept = server.adapters.names["kept"].slot
        assert server.adapters.model.nbytes <= room and kept
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
    factors = Adapters(BaseModel(str(model_path)), pack, 1).model.factors(read(library, "a1"))
    room = 6 * sum(x.nbytes for pair in factors.values() for x in pair)
    with changing(pack, library, room, BaseModel(str(model_path))) as (server, do):
        for i in (1, 4):
            pin = {"lora_name": f"p{i}", "lora_path": f"a{i}", "pinned": True}
            assert do(PATHS[0], pin)[0] == 200
        with pytest.raises(openai.InternalServerError, match="no room in memory beside"):
            ask(server, "a0")
        assert ask(server, "p1") and do(PATHS[1], {"lora_name": "p1"})[0] == 200
        assert do(PATHS[1], {"lora_name": "p4"})[0] == 200
        assert ask(server, "a0")


def test_a_pinned_adapter_is_loaded_anew_where_memory_has_one_place_more(
    pack, library, model_path, answer
):
    factors = Adapters(BaseModel(str(model_path)), pack, 1).model.factors(read(library, "a1"))
    room = 4 * sum(x.nbytes for pair in factors.values() for x in pair)
    with changing(pack, library, room, BaseModel(str(model_path))) as (server, do):
        pins = [{"lora_name": f"p{i}", "lora_path": f"a{i}", "pinned": True} for i in (1, 4, 7)]
        assert [do(PATHS[0], pin)[0] for pin in pins] == [200, 200, 400]
        ask(server, "a10")
        anew = pins[0] | {"lora_path": "a7", "load_inplace": True}
        assert do(PATHS[0], anew)[0] == 200
        assert ask(server, "p1") == text(answer, read(library, "a7"), "the fox", N)
        assert ask(server, "a10") == text(answer, read(library, "a10"), "the fox", N)
        names = server.adapters.names
        assert all(names[name].slot for name in ("p1", "p4", "a10"))
        assert server.adapters.model.nbytes <= room and do(PATHS[0], pins[2])[0] == 400


def test_a_wider_adapter_takes_room_from_others_only_while_it_is_there(pack, library, model_path):
    """Memory has room for two of it, and for many others."""
    found = Adapters(BaseModel(str(model_path)), pack, 1)
    wide, *others = (found.model.factors(read(library, f"a{i}")) for i in (0, 1, 4, 7, 10))
    each = [sum(x.nbytes for pair in one.values() for x in pair) for one in (wide, others[0])]
    found.memory = 3 * each[0]
    most = found.most_in_memory(others[0])
    assert most > 2 == found.most_in_memory(wide)
    found.add("wide", Entry(library, lambda: None), wide)
    assert found.names["wide"].slot and found.most_in_memory(others[0]) == 2
    found.remove("wide").result()
    assert found.most_in_memory(others[0]) == most
    for i, one in enumerate(others):
        found.add(str(i), Entry(library, lambda: None), one)
    # The base has a slot, too.
    assert found.model.nbytes == 5 * each[1]
    found.add("wide", Entry(library, lambda: None), wide)
    assert not found.names["wide"].slot and found.place(found.names["wide"], wide)
    assert [bool(found.names[str(i)].slot) for i in range(4)] == [False, False, False, True]
    assert found.model.nbytes == found.memory


def test_a_pinned_adapter_makes_way_for_a_wider_one(pack, library, model_path, answer):
    """It came last, into a slot that there is not beside the wider one."""
    factors = Adapters(BaseModel(str(model_path)), pack, 1).model.factors(read(library, "a0"))
    room = 3 * sum(x.nbytes for pair in factors.values() for x in pair)
    prompts = [f"{prompt_of(random.Random(0), 40)} {tail}" for tail in ("x", "the fox", "lazy")]
    with changing(pack, library, room, BaseModel(str(model_path))) as (server, do):
        ask(server, "a1")
        ask(server, "a4")
        pin = {"lora_name": "kept", "lora_path": "a7", "pinned": True}
        assert do(PATHS[0], pin)[0] == 200 and server.adapters.names["kept"].slot == 3
        for prompt in prompts[:2]:
            ask(server, "kept", prompt)
        # Not while a request runs with it.
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(ask, server, "kept", n=200, logit_bias=NO_END)
            counts_when(server, lambda _: server.adapters.names["kept"].rows)
            assert ask(server, "a0") == text(answer, read(library, "a0"), "the fox", N)
            assert long.result() == ask(server, "kept", n=200, logit_bias=NO_END)
        assert server.adapters.names["kept"].slot == 1 and server.adapters.model.nbytes <= room
        with client(server, TOKEN) as api:
            found = api.completions.create(model="kept", prompt=prompts[2], max_tokens=N)
        assert found.choices[0].text == text(answer, read(library, "a7"), prompts[2], N)
        assert found.usage.prompt_tokens_details.cached_tokens


@pytest.mark.slow
def test_who_waits_for_room_is_not_passed_over_for_ever(pack, library, model_path, answer):
    """Memory has room for one adapter, and others ask for it all the time."""
    with changing(pack, library, 1, BaseModel(str(model_path))) as (server, _):
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
        pack, library, 1, BaseModel(str(model_path))
    ) as (server, do):  # fmt: skip
        assert do(PATHS[0], {"lora_name": "asked", "lora_path": "a3"})[0] == 200
        found = server.adapters
        long = pool.submit(ask, server, "wide", n=400, logit_bias=NO_END)
        counts_at(server, "d2c_mlx_first_token_seconds_count", 1)
        others = [pool.submit(ask, server, "asked") for _ in range(2)]
        entry = found.names["asked"]
        counts_when(server, lambda _: entry.users == 2 and found.lacks_room(entry))
        anew = {"lora_name": "asked", "lora_path": "a7", "load_inplace": True}
        assert do(PATHS[0], anew)[0] == 200 and not long.done()
        expected = text(answer, read(library, "a7"), "the fox", N)
        assert [one.result(60) for one in others] == [expected] * 2 and long.result(60)


def test_beginnings_of_prompts_go_with_their_adapter(library, tmp_path, pack, model_path, answer):
    """New weights under an old name, by a load in place, and in a file that is read again."""
    shutil.copytree(library, tmp_path / "own", symlinks=True)
    prompts = [f"{prompt_of(random.Random(0), 40)} {tail}" for tail in ("x", "the fox", "lazy")]
    with changing(pack, tmp_path / "own", 1, BaseModel(str(model_path))) as (server, do):

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
