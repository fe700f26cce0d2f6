"""Adapters that come and go while requests run: over sockets, beside stock mlx-lm."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from helpers.adapters import ABOUT, ADAPTERS
from helpers.loading import NO_END, PATHS, TOKEN, N, ask, changing, read
from helpers.served import (
    GOOD,
    client,
    counted,
    counts_at,
    counts_when,
    idle,
    post,
    raw,
    serving,
    text,
)

from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import write_compact_pack, write_pack


@pytest.fixture(scope="module")
def shared(pack, library, model_path):
    """A server for tests that leave it as it was."""
    with changing(pack, library, model_path) as found:
        yield found


def test_an_adapter_is_loaded_asked_and_unloaded(shared, library, answer):
    """vLLM's shapes and words."""
    server, do = shared
    first, second = (read(library, name) for name in ("a3", "a7"))
    body = {"lora_name": "mine", "lora_path": "a3"}
    loaded = 200, "Success: LoRA adapter 'mine' added successfully."
    assert do(PATHS[0], body) == loaded
    assert ask(server, "mine") == text(answer, first, "the fox", N)
    with client(server, TOKEN) as api:
        card = api.models.retrieve("mine").model_dump()
        base = api.models.retrieve("model").model_dump()
    assert (card["parent"], card["root"]) == ("model", str(library / "a3"))
    assert (base["parent"], base["root"]) == (None, "model")
    assert do(PATHS[0], body) == failed(400, "InvalidUserInput", "The lora adapter 'mine' has "
        "already been loaded. If you want to load the adapter in place, set 'load_inplace' to "
        "True.")  # fmt: skip
    assert do(PATHS[0], body | {"lora_path": str(library / "a7"), "load_inplace": True}) == loaded
    assert ask(server, "mine") == text(answer, second, "the fox", N)
    unload = {"lora_name": "mine"}
    assert do(PATHS[1], unload) == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert do(PATHS[1], unload) == failed(404, "NotFoundError", "The lora adapter 'mine' cannot be "
                                          "found.")  # fmt: skip
    assert do(PATHS[1], {}) == failed(400, "InvalidUserInput", "'lora_name' needs to be provided to"
                                      " unload a LoRA adapter.")  # fmt: skip


def failed(status, kind, message):
    error = {"message": message, "type": kind, "param": None, "code": status}
    return status, json.dumps({"error": error}, separators=(",", ":"))


def test_what_may_not_be_loaded(shared, library):
    server, do = shared
    nothing = failed(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
    assert do(PATHS[0], {"lora_name": "x"}) == nothing == do(PATHS[0], {"lora_path": "a1"})
    for path in ("..", "../x", "/etc", ".", str(library), "a1/../../model"):
        status, said = do(PATHS[0], {"lora_name": "x", "lora_path": path})
        assert status in (400, 404) and ("expected a path inside" in said or "No adapter" in said)
        assert status == 400 or not (library / path).exists()
    for path in ("org/name", "a99", "\0", "x" * 5000, "itself"):
        status, said = do(PATHS[0], {"lora_name": "x", "lora_path": path})
        assert status == 404 and "Loading lora x failed: No adapter found for" in said
    status, said = do(PATHS[0], {"lora_name": "x", "lora_path": "broken"})
    assert status == 500 and "InternalServerError" in said and "broken" in said
    # The names that packs refuse, and those of other models (issue 72).
    for name in ("model", "auto", "a\nb", "\x1b[31m", ".hidden", "a/b", "x" * 500_000):
        assert do(PATHS[0], {"lora_name": name, "lora_path": "a1"})[0] == 400, name[:9]
    for body in ([1], {"lora_name": 1}, {"lora_name": "x", "lora_path": "a1", "pinned": "yes"},
                 {"lora_name": "x", "lora_path": "a1", "is_3d_lora_weight": True}):  # fmt: skip
        assert do(PATHS[0], body)[0] == 400
    assert "x" not in server.service.adapters.names


def test_changes_are_off_and_behind_the_token(pack, model_path, library):
    with serving(pack, model_path, token=TOKEN, directory=library) as server:
        for path in PATHS:
            reply = raw(server, post({}, path, Authorization=f"Bearer {TOKEN}"))
            assert b" 404 " in reply and b"--allow-changes" in reply
    with serving(pack, model_path, token=TOKEN, changes=True, directory=library) as server:
        assert all(b" 401 " in raw(server, post({}, path)) for path in PATHS)
    refused = CliRunner().invoke(cli, ["serve", str(pack.path), "--allow-changes"])
    assert refused.exit_code == 2 and "give --token" in refused.output


def test_a_request_loads_what_is_in_the_directory(shared, library, answer):
    """The first of several at once; it need not be allowed to change anything else."""
    server, do = shared
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ask(server, "a5"), range(8)))
    assert {*found} == {text(answer, read(library, "a5"), "the fox", N)}
    with client(server, TOKEN) as api:
        with pytest.raises(openai.BadRequestError, match="'broken' was found but could not be lo"):
            api.completions.create(**GOOD | {"model": "broken"})
        for name in ("a99", "../a1", "itself", ".", "a1/", "\0", "x" * 9999, "a\n"):
            with pytest.raises(openai.NotFoundError, match="expected one of"):
                api.completions.create(**GOOD | {"model": name})
        assert do(PATHS[1], {"lora_name": "a5"})[0] == 200
        # The directory's owner made the link, as the hub's cache is made of links.
        assert ask(server, "linked") == text(answer, read(library, "a3"), "the fox", N)
    assert do(PATHS[1], {"lora_name": "linked"})[0] == 200


def begin(server, name, n):
    """A stream that has begun, and a function that gives all its text."""
    api = client(server, TOKEN)
    stream = api.completions.create(model=name, prompt="the fox", max_tokens=n, stream=True,
                                    logit_bias=NO_END)  # fmt: skip
    first = next(iter(stream)).choices[0].text
    return stream, lambda: first + "".join(one.choices[0].text for one in stream)


def test_what_runs_keeps_its_adapter(shared, library):
    """Other weights under its name, and an unload, which waits for it."""
    server, do = shared
    n, body = 60, {"lora_name": "mine", "lora_path": "a3"}
    assert do(PATHS[0], body)[0] == 200
    alone = begin(server, "mine", n)[1]()
    ends = [begin(server, "mine", n)[1] for _ in range(2)]
    assert do(PATHS[0], body | {"lora_path": "a7", "load_inplace": True})[0] == 200
    changed = begin(server, "mine", n)[1]()
    assert [end() for end in ends] == [alone, alone] != [changed, changed]
    (stream, _), unloaded = begin(server, "mine", 400), []
    thread = threading.Thread(target=lambda: unloaded.append(do(PATHS[1], {"lora_name": "mine"})))
    thread.start()
    counts_when(server, lambda _: "mine" not in server.service.adapters.names)
    with client(server, TOKEN) as api, pytest.raises(openai.NotFoundError):
        api.completions.create(**GOOD | {"model": "mine"})
    assert not unloaded
    stream.close()
    thread.join()
    assert unloaded[0][0] == 200
    idle(server)


def test_a_task_of_a_shared_adapter_is_unloaded(pack, model_path, tmp_path, answer):
    """And those left to the base; what else is served of an adapter stays."""
    base = BaseModel(str(model_path))
    about = Manifest(**ABOUT | {"model": base.name, "config_hash": base.config_hash})
    both = compress(ADAPTERS[0], dict.fromkeys(ADAPTERS[0].modules, [(2, 8)]))
    serves = {"one": 0, "two": 0, "bare": None}
    pack = write_compact_pack(tmp_path / "pack", [both], serves, about)
    with changing(pack, None, base) as (server, do), ThreadPoolExecutor(1) as pool:

        def unload(name):
            """While a request by this name runs; the counts after it."""
            stream, _ = begin(server, name, 400)
            done = pool.submit(do, PATHS[1], {"lora_name": name})
            counts_when(server, lambda _: name not in server.service.adapters.names)
            if name == "two":
                assert ask(server, "one") == text(answer, pack.load("one"), "the fox", N)
            assert not done.done()
            stream.close()
            assert done.result()[0] == 200
            return counted(server)

        assert ask(server, "model")
        for name in ("two", "bare", "one"):
            counts = unload(name)
            assert not [key for key in counts if f'="{name}"' in key]
            assert ('d2c_mlx_adapter_loads_total{adapter="one"}' in counts) == (name != "one")
        assert counts['d2c_mlx_requests_total{task=""}'] == 1


@pytest.mark.parametrize("memory", [None, 1])
def test_a_pack_that_is_replaced_is_reloaded_without_losing_a_request(
    memory, pack, model_path, tmp_path, answer
):
    base = BaseModel(str(model_path))
    about = Manifest(**ABOUT | {"model": base.name, "config_hash": base.config_hash})
    old, new = ADAPTERS, [replace(one, name=f"x{i}", sources=(ADAPTERS[i - 1].name,))
                          for i, one in enumerate(ADAPTERS)]  # fmt: skip
    pack = write_pack(tmp_path / "pack", old, about)
    names = [one.name for one in old]
    was = {name: text(answer, pack.load(name), "the fox", N) for name in names}
    with changing(load_pack(pack.path), None, base, memory) as (server, do):
        stop = threading.Event()

        def go(name):
            found = []
            while not stop.is_set():
                found.append(ask(server, name))
            return found

        with ThreadPoolExecutor(6) as pool:
            asked = [(name, pool.submit(go, name)) for name in names * 2]
            counts_at(server, "d2c_mlx_first_token_seconds_count", 12)
            now = write_pack(tmp_path / "pack", new, about)
            status, said = do(PATHS[2], {})
            assert status == 200 and sorted(json.loads(said)["tasks"]) == sorted(names)
            after = {name: ask(server, name) for name in names}
            stop.set()
            found = [(name, one.result()) for name, one in asked]
        is_now = {name: text(answer, now.load(name), "the fox", N) for name in names}
        assert after == is_now != was
        for name, texts in found:
            assert {*texts} <= {was[name], is_now[name]}
        (tmp_path / "pack" / "manifest.json").write_text("{}")
        status, said = do(PATHS[2], {})
        assert status == 409 and "the pack before is served" in said


def test_scales_of_a_request_and_of_all(shared, library, answer):
    """llama.cpp's addresses; each row of a batch has its own."""
    server, do = shared
    assert do(PATHS[0], {"lora_name": "mine", "lora_path": "a3"})[0] == 200
    listed = {one["task_name"]: one for one in json.loads(do("/lora-adapters", None)[1])}
    mine, wide = listed["mine"]["id"], listed["wide"]["id"]
    assert listed["mine"] == {"id": mine, "path": str(library / "a3"), "scale": 1.0,
                              "task_name": "mine", "prompt_prefix": ""}  # fmt: skip

    def scaled(factor):
        one = read(library, "a3")
        modules = {path: replace(x, scale=x.scale * factor) for path, x in one.modules.items()}
        return text(answer, replace(one, modules=modules), "the fox", N)

    factors = [0.5, -1.0, 2.0, 1.0, 0.25, -2.0, 1.5, 0.5]
    with ThreadPoolExecutor(8) as pool:
        lora = [[{"id": mine, "scale": one}, {"id": wide, "scale": 0}] for one in factors]
        found = list(pool.map(lambda one: ask(server, "model", lora=one), lora))
    assert found == [scaled(one) for one in factors] and len({*found}) > 3
    # Without a scale that counts it is the base.
    for none in ([], [{"id": mine, "scale": 0}]):
        assert ask(server, "mine", lora=none) == text(answer, None, "the fox", N)
    with pytest.raises(openai.BadRequestError, match="a row has one"):
        ask(server, "mine", lora=[{"id": mine, "scale": 1}, {"id": wide, "scale": 1}])
    assert do(PATHS[3], [{"id": mine, "scale": 0.5}]) == (200, '{"success":true}')
    assert (
        ask(server, "mine") == scaled(0.5) != ask(server, "mine", lora=[{"id": mine, "scale": 1}])
    )
    # Those that are left out.
    assert ask(server, "wide") == text(answer, None, "the fox", N)
    assert do(PATHS[3], [{"id": one["id"], "scale": 1} for one in listed.values()])[0] == 200
    assert ask(server, "wide") == text(answer, "wide", "the fox", N)
    assert do(PATHS[3], [{"id": 10**9, "scale": 1}])[0] == 400
    assert do(PATHS[1], {"lora_name": "mine"})[0] == 200
