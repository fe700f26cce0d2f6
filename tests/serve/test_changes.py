"""Adapters that come and go while requests run: over sockets, beside stock mlx-lm."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from helpers.adapters import ABOUT, ADAPTERS
from helpers.loading import NO_END, PATHS, TOKEN, N, ask, changing, read
from helpers.served import GOOD, client, idle, n_open, post, raw, serving, text, until

from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.model import Model
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import write_pack


@pytest.fixture(scope="module")
def shared(pack, library, model_path):
    """A server for tests that leave it as it was."""
    with changing(pack, library, model_path) as pair:
        yield pair


def test_an_adapter_is_loaded_asked_and_unloaded(shared, library, answer):
    """By vLLM's routes."""
    server, do = shared
    first, second = (text(answer, read(library, name), "the fox", N) for name in ("a3", "a7"))
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
    with serving(pack, model_path, token=TOKEN, directory=library) as server:
        for path in PATHS:
            assert b" 404 " in raw(server, post({}, path, Authorization=f"Bearer {TOKEN}"))
    with serving(pack, model_path, token=TOKEN, changes=True, directory=library) as server:
        assert all(b" 401 " in raw(server, post({}, path)) for path in PATHS)
    for options in (["--allow-changes"], ["--adapter-dir", library]):
        assert command("serve", pack.path, *options)[0] == 2


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
    before = adapters.model.nbytes
    assert do(PATHS[0], body)[0] == 200
    alone = begin(server, "mine", n)[1]()
    ends = [begin(server, "mine", n)[1] for _ in range(2)]
    assert do(PATHS[0], body | {"lora_path": "a7", "load_inplace": True})[0] == 200
    changed = begin(server, "mine", n)[1]()
    assert [end() for end in ends] == [alone, alone] != [changed, changed]
    stream, end = begin(server, "mine", 400)
    assert do(PATHS[1], {"lora_name": "mine"})[0] == 200 and adapters.model.nbytes > before
    assert end().startswith(changed)
    idle(server)
    assert adapters.model.nbytes == before


def test_a_task_of_a_shared_adapter_is_unloaded(pack, model_path, tmp_path, answer):
    """And those left to the base; what else is served of an adapter stays."""
    base = Model(str(model_path))
    about = Manifest(**ABOUT | {"model": base.name, "config_hash": base.config_hash})
    both = compress(ADAPTERS[0], dict.fromkeys(ADAPTERS[0].modules, [(2, 8)]))
    serves = {"one": 0, "two": 0, "bare": None}
    pack = write_pack(tmp_path / "pack", [both], about, serves)
    with changing(pack, None, base) as (server, do):
        adapters = server.service.adapters
        for name in ("two", "bare", "one"):
            stream, _ = begin(server, name, 400)
            assert do(PATHS[1], {"lora_name": name})[0] == 200
            if name == "two":
                assert ask(server, "one") == text(answer, pack.load("one"), "the fox", N)
            stream.close()
            idle(server)
            assert bool(adapters.model.nbytes) == (name != "one")


@pytest.mark.parametrize("memory", [None, 1])
def test_a_pack_that_is_replaced_is_reloaded_without_losing_a_request(
    memory, pack, model_path, tmp_path, answer
):
    base = Model(str(model_path))
    about = Manifest(**ABOUT | {"model": base.name, "config_hash": base.config_hash})
    old, new = ADAPTERS, [replace(one, name=f"x{i}", sources=(ADAPTERS[i - 1].name,))
                          for i, one in enumerate(ADAPTERS)]  # fmt: skip
    pack = write_pack(tmp_path / "pack", old, about)
    names = [one.name for one in old]
    before = {name: text(answer, pack.load(name), "the fox", N) for name in names}
    with changing(load_pack(pack.path), None, base, memory) as (server, do):
        stop = threading.Event()

        def go(name):
            texts = []
            while not stop.is_set():
                texts.append(ask(server, name))
            return texts

        with ThreadPoolExecutor(6) as pool:
            asked = [(name, pool.submit(go, name)) for name in names * 2]
            until(lambda: n_open(server) == 6)
            now = write_pack(tmp_path / "pack", new, about)
            status, reply = do(PATHS[2], {})
            assert status == 200 and sorted(json.loads(reply)["tasks"]) == sorted(names)
            after = {name: ask(server, name) for name in names}
            stop.set()
            texts = [(name, future.result()) for name, future in asked]
        assert after == {n: text(answer, now.load(n), "the fox", N) for n in names} != before
        for name, replies in texts:
            assert {*replies} <= {before[name], after[name]}
        (tmp_path / "pack" / "manifest.json").write_text("{}")
        assert do(PATHS[2], {})[0] == 409 and ask(server, names[0]) == after[names[0]]
