"""Adapters from the hub: `huggingface_hub` itself against a hub on loopback."""

import json
import socket
import threading
from functools import partial

import pytest
from helpers.gguf_files import write_lora
from helpers.hub import Hub
from helpers.tiny import library, peft_adapter

from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.adapters.reading import find_adapters, read_adapter
from d2c_mlx.models.model import Model
from d2c_mlx.utils.errors import InputError
from d2c_mlx.utils.hub import HubId, download_all, parse_hub_id


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("hub"), ["a", "b"])


@pytest.fixture(scope="module")
def base(paths):
    return Model(str(paths.model))


@pytest.fixture(scope="module")
def hub(paths, base, tmp_path_factory):
    """Adapters of every format, each beside what nobody needs; and what cannot be had."""
    hub, root = Hub(), tmp_path_factory.mktemp("files")

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    a, b = (content(paths.adapters / name) for name in "ab")
    names = ("README.md", "optimizer.pt", "checkpoint-1/adapter_config.json")
    junk = dict.fromkeys(names, b"{")
    first = read_adapter(paths.adapters / "a", base.module_shapes)
    first.save(root / "mlx", base.n_layers)
    save_gguf(first, root / "x.gguf", base.config)
    gguf = (root / "x.gguf").read_bytes()
    hub.repos |= {
        "org/a": {"main": {**a, **junk}, "v1": {**b, **junk}},
        "org/mlx-lora": {"main": {**content(root / "mlx"), "0000100_adapters.safetensors": b"x"}},
        "org/in-gguf": {"main": {"lora-f32.gguf": gguf, **junk}},
        "org/two-gguf": {"main": {"lora-f32.gguf": gguf, "again.gguf": gguf}},
        "org/pickle": {"main": {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}},
        "org/empty": {"main": {"README.md": b"# x"}},
    }
    hub.refused["org/gated"] = (403, "GatedRepo", "Access to model org/gated is restricted")
    hub.refused["org/secret"] = (401, "RepoNotFound", "Invalid username or password.")
    yield hub
    hub.close()


@pytest.mark.slow
def test_adapters_of_every_format_come_with_no_other_file(hub, paths, base, tmp_path):
    """By the command; the second time without the hub."""
    hub.log.clear()
    adapters = f"one=org/a@v1,org/a,org/mlx-lora,org/in-gguf,{paths.adapters / 'b'}"
    args = ["convert", "--model", paths.model, "--adapters", adapters, "--json", "--output"]
    done = hub.run(tmp_path / "home", *args, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert sorted(rows) == ["a", "b", "in-gguf", "mlx-lora", "one"]
    assert rows["a"]["origin"] == f"org/a@{hub.commit('org/a')}"
    assert rows["one"]["origin"] == f"org/a@{hub.commit('org/a', 'v1')}" != rows["a"]["origin"]
    assert "origin" not in rows["b"]
    expected = {n: read_adapter(paths.adapters / n, base.module_shapes).digest for n in "ab"}
    for name in rows:
        adapter = read_adapter(tmp_path / "out" / name, base.module_shapes)
        assert adapter.digest == expected["b" if name in ("b", "one") else "a"]
    # The config is the same in both revisions, and so asked for once.
    weights = "adapter_model.safetensors"
    assert sorted(hub.gets("org/a")) == ["adapter_config.json", weights, weights]
    assert sorted(hub.gets("org/mlx-lora")) == ["adapter_config.json", "adapters.safetensors"]
    assert set(hub.gets("org/in-gguf")) == {"lora-f32.gguf"}
    offline = hub.run(tmp_path / "home", *args, tmp_path / "again", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == done.stdout


@pytest.mark.slow
def test_what_the_hub_does_not_give_is_one_line_each(hub, paths, tmp_path):
    ids = {
        "org/gated": "is gated: ask for access",
        "org/secret": "private",
        "org/missing": "RepositoryNotFoundError: 404",
        "org/a@v9": "RevisionNotFoundError",
        "org/pickle": "a pickle",
        "org/empty": "no adapter at its top",
        "org/two-gguf": "2 .gguf files",
    }
    args = ["convert", "--model", paths.model, "--output", tmp_path / "out", "--adapters"]
    done = hub.run(tmp_path / "home", *args, ",".join(ids))
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    for line, (name, words) in zip(done.stderr.splitlines(), ids.items(), strict=True):
        assert line.startswith("error: ") and name.split("@")[0] in line and words in line
    assert "adapter_model.bin" not in hub.gets("org/pickle")
    # A base model is asked for by the same function; nothing answers at this port.
    with socket.create_server(("127.0.0.1", 0)) as server:
        nowhere = f"http://127.0.0.1:{server.getsockname()[1]}"
    args[2] = "org/a"
    alone = hub.run(tmp_path / "home", *args, paths.adapters, HF_ENDPOINT=nowhere)
    assert alone.returncode == 2 and "model: 'org/a' is no local path" in alone.stderr
    assert "check the id and the network" in alone.stderr


def test_many_come_at_once_and_all_problems_are_told():
    """Each of four waits until all of them have begun."""
    gate = threading.Barrier(4, timeout=30)

    def call(i, wrong=()):
        gate.wait()
        if i in wrong:
            raise InputError(f"{i} is gone")
        return i

    assert download_all([partial(call, i) for i in range(8)]) == list(range(8))
    caught = pytest.raises(InputError, download_all, [partial(call, i, (1, 6)) for i in range(8)])
    assert caught.value.problems == ["1 is gone", "6 is gone"]


def test_what_is_an_id_a_path_or_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("org/name", "org/na.me-1@v1", "org/name@refs/pr/1"):
        repo, _, revision = text.partition("@")
        assert parse_hub_id(text) == HubId(repo, revision or None)
        assert str(parse_hub_id(text)) == text
    for text in ("./loras", "../loras", "a/b/c", "name", "/a/b", "org/name@", "~/loras", "C:/loras",
                 "x" * 300, "x/" * 3000, "=" * 5000, "a=" * 2500 + "x", "a\0b"):  # fmt: skip
        assert parse_hub_id(text) is None
        with pytest.raises(InputError, match="no such directory and no Hugging Face id"):
            find_adapters(text)
    # A list that is longer than any path.
    names = [f"{i:0100}" for i in range(45)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    assert [source.name for source in find_adapters(",".join(names))] == names


def test_adapters_one_by_one(tmp_path, base, monkeypatch):
    """A directory, a folder, a GGUF, other names; nothing else is an adapter."""
    a = peft_adapter(tmp_path / "both", "a")
    peft_adapter(tmp_path / "both", "b")
    comma = peft_adapter(tmp_path / "with, comma", "c").parent
    # What PEFT leaves beside an adapter that it trained.
    peft_adapter(a, "checkpoint-1")
    adapter = read_adapter(a, base.module_shapes)
    lora = write_lora(tmp_path / "d.gguf", adapter)
    (tmp_path / "own").mkdir()
    capitals = write_lora(tmp_path / "own" / "E.GGUF", adapter)
    monkeypatch.chdir(tmp_path)
    for spec, names in (
        (tmp_path / "both", ["a", "b"]),
        (str(a), ["a"]),
        (f"{a},x={lora}", ["a", "x"]),
        (str(comma), ["c"]),
        ((str(comma), str(lora)), ["c", "d"]),
        (str(capitals), ["E"]),
        (str(capitals.parent), ["E"]),
        ("both/a", ["a"]),
    ):
        sources = find_adapters(spec)
        assert [source.name for source in sources] == names
        # A path that is there is no id; no hub is asked.
        assert not any(source.origin for source in sources)
    for path, name in ((capitals, "E"), (capitals.parent, "own")):
        again = read_adapter(path, base.module_shapes, base.config)
        assert (again.modules.keys(), again.name) == (adapter.modules.keys(), name)
    for spec, words in (
        (f"{a},both", "'a' is that of another adapter.*; call it NAME=ENTRY"),
        ("y=both", "names 2 adapters, expected one"),
        (f"../y={a}", "is no name of a directory"),
        (f".y={a}", "the name '.y' is .*hidden"),
        (f"{a},", "'': no such directory"),
        (f"{a},A={lora}", "'A' is .*one with 'a' on a Mac"),
        ("nope.gguf", "no such directory and no Hugging Face id"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            find_adapters(spec)
        assert len(caught.value.problems) == 1


def test_what_is_no_adapter_of_a_folder_is_a_problem_by_name(tmp_path, base):
    """Passed over, it would be missing from the merge without a word."""
    folder = tmp_path / "folder"
    a = peft_adapter(folder, "a")
    (folder / ".hidden.bin").write_bytes(b"x")
    (folder / ".gone").symlink_to(tmp_path / "gone")
    (folder / "README.md").write_text("a note")
    (folder / "linked").symlink_to(a)
    write_lora(folder / "b.GGUF", read_adapter(a, base.module_shapes))
    assert [source.name for source in find_adapters(folder)] == ["a", "b", "linked"]
    (folder / "broken").symlink_to(tmp_path / "gone")
    for name in ("c.safetensors", "d.SafeTensors", "e.bin"):
        (folder / name).write_bytes(b"x")
    caught = pytest.raises(InputError, find_adapters, folder)
    problems = [line.split(": ")[0] for line in caught.value.problems]
    names = ("broken", "c.safetensors", "d.SafeTensors", "e.bin")
    assert problems == [str(folder / name) for name in names]
