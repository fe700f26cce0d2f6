"""Adapters that come and go while requests run: over sockets, beside stock mlx-lm."""

import json

import openai
import pytest
from helpers.adapters import ADAPTERS
from helpers.loading import NO_END, PATHS, TOKEN, N, ask, changing, read
from helpers.served import GOOD, client, idle, pack_of, post, raw, serving, text

from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.model import Model


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
