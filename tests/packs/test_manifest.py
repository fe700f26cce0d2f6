"""Hostile and damaged packs: each is refused, and the line names the field or file at fault."""

import hashlib
import json
import os
from dataclasses import replace

import pytest
from helpers.compact import compressed
from helpers.damage import rehash, true_of_files
from helpers.exported import adapter_of

from d2c_mlx.compress.compact_file import read_index, write_compact
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.errors import PackError

CONFIG = "cluster-0/adapter_config.json"
COMPACT = "compact.safetensors"
BASE = {"model": "m", "config_sha256": "", "n_layers": 2}


def problems(path):
    with pytest.raises(PackError) as caught:
        load_pack(path)
    return caught.value.problems


def fields(path):
    """Field -> line, each field once; a line without one is under the file that it names."""
    pairs = [line.split(", ")[0].split(": ")[:2] for line in problems(path)]
    assert len({tuple(pair) for pair in pairs}) == len(pairs)
    manifest = str(path / "manifest.json")
    return {field if file == manifest else file.removeprefix(f"{path}/") for file, field in pairs}


# Fields of the manifest, and those at fault.
HOSTILE = [
    ({"nbytes": 5}, "nbytes"), ({"nbytes": "5"}, "nbytes"), ({"nbytes": ...}, "nbytes"),
    ({"nbytes": 1e3}, "nbytes"), ({"nbytes": True}, "nbytes"),
    ({"base": ...}, "base"), ({"base": 3}, "base"),
    ({"base": {**BASE, "model": None}}, "base.model"),
    ({"base": {**BASE, "config_sha256": []}}, "base.config_sha256"),
    ({"base": {**BASE, "weights_sha256": 1}}, "base.weights_sha256"),
    ({"budget": {"text": 2, "nbytes": None}}, "budget.text"),
    ({"budget": {"text": "2", "nbytes": "x"}}, "budget.nbytes"),
    ({"budget": {"text": "2", "nbytes": 0}}, "budget.nbytes"),
    ({"tasks": {}}, "tasks"), ({"tasks": ...}, "tasks"), ({"tasks": []}, "tasks"),
    ({"files": ...}, "files"), ({"files": []}, "files"), ({"files": {}}, "files"),
    ({"tasks": {"a": 1.5}}, "tasks.a"), ({"tasks": {"a": []}}, "tasks.a"),
    ({"tasks": {"a": True}}, "tasks.a"), ({"origins": 3}, "origins"),
    ({"origins": {"a": 1}}, "origins.a"), ({"systems": {"a": []}}, "systems.a"),
    ({"merged": {"0": "x"}}, "merged.0"), ({"merged": {"0": True}}, "merged.0"),
]  # fmt: skip
PLAIN = [
    ({"tasks": {"a\x1b[3m": "cluster-0"}}, "tasks.a\\x1b[3m"),
    ({"tasks": {"a\u202e": "cluster-0"}}, "tasks.a\\u202e"),
    ({"tasks": {"a": None}}, "tasks.a"), ({"tasks": {"a": 0}}, "tasks.a"),
    ({"tasks": {"a": "../elsewhere"}}, "tasks.a"), ({"tasks": {"a": ""}}, "tasks.a"),
    ({"tasks": {"a": "x" * 300}}, "tasks.a"), ({"tasks": {"a": "cluster-9"}}, "tasks.a"),
]  # fmt: skip
FORMAT = "format 'd2c-mlx-pack' version "
OF_COMPACT = [
    ({"dtype": "int8"}, "dtype"), ({"dtype": ...}, "dtype"), ({"dtype": 3}, "dtype"),
    ({"base": {"model": "m", "config_sha256": ""}}, "base.n_layers"),
    ({"base": {**BASE, "n_layers": True}}, "base.n_layers"),
    ({"base": {**BASE, "n_layers": 0}}, "base.n_layers"),
    ({"tasks": {"\x1b": 0}}, "tasks.\\x1b"), ({"tasks": {"a": "cluster-0"}}, "tasks.a"),
    ({"tasks": {"a": 3}}, COMPACT), ({"tasks": {"a": -1}}, COMPACT),
    ({"storage": "zip"}, FORMAT + "2 storage 'zip'"), ({"storage": []}, FORMAT + "2 storage []"),
    ({"storage": ...}, FORMAT + "2 storage None"),
    ({"format": "zip"}, "format 'zip' version 2 storage 'compact'"),
    ({"format_version": 1}, FORMAT + "1 storage 'compact'"),
    ({"format_version": ...}, FORMAT + "None storage 'compact'"),
]  # fmt: skip


PLACES = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}
OF_GGUF = [
    ({"dtype": ...}, "dtype"), ({"base": {"model": "m", "config_sha256": ""}}, "base.n_layers"),
    ({"tasks": {"a": "cluster-0"}}, "tasks.a"), ({"tasks": {"a": "../a.gguf"}}, "tasks.a"),
    ({"tasks": {"a": 0}}, "tasks.a"), ({"gguf": ...}, "gguf"), ({"gguf": 3}, "gguf"),
    ({"gguf": {**PLACES, "modules": 3}}, "gguf.modules"),
    ({"gguf": {**PLACES, "num_hidden_layers": 0, "modules": []}}, "gguf.num_hidden_layers"),
    ({"gguf": {**PLACES, "num_hidden_layers": 1 << 40, "modules": ["a"]}},
     "gguf.num_hidden_layers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("storage", "changes"),
    [
        ("plain", HOSTILE + PLAIN),
        ("compact", HOSTILE[7:] + OF_COMPACT),
        ("gguf", HOSTILE[7:] + OF_GGUF),
    ],
)
def test_a_field_that_is_wrong_is_named(request, copy_of, storage, changes):
    pack = request.getfixturevalue(storage)
    for change, at_fault in changes:
        assert fields(copy_of(pack, **change)) == {at_fault}
    for content in (b"", b"{", b"[]", b"\xff\xfe\x00", None):
        path = copy_of(pack) / "manifest.json"
        path.unlink() if content is None else path.write_bytes(content)
        (line,) = problems(path.parent)
        assert str(path) in line


def test_what_another_storage_says_does_not_count(copy_of, plain, gguf):
    places = gguf.manifest.to_json()["gguf"]
    pack = load_pack(copy_of(plain, gguf=places, dtype="float32"))
    assert pack.load("one").digest == plain.load("one").digest
    assert load_pack(gguf.path) == gguf and gguf.load("none") is None
    assert gguf.load("one").digest == plain.load("one").uniform().digest


def test_all_problems_of_a_manifest_at_once(copy_of, plain):
    files = {name: file.model_dump() for name, file in plain.manifest.files.items()}
    path = copy_of(plain, base=..., budget={"text": 2}, tasks={"a": [], "b": "cluster-0"})
    assert fields(path) == {"base", "budget.text", "tasks.a"}
    left = {name: entry for name, entry in files.items() if name != CONFIG}
    path = copy_of(plain, nbytes="5", tasks={"a": "..", "b": "cluster-0"}, files=left)
    assert fields(path) == {"nbytes", "tasks.a", "tasks.b"}


def test_files_that_are_missing_or_differ_are_all_named(copy_of, plain, compact):
    for pack in (plain, compact):
        path, (first, *others) = copy_of(pack), pack.manifest.files
        content = bytearray((path / first).read_bytes())
        content[-1] ^= 1
        (path / first).write_bytes(content)
        for name in others[:1]:
            (path / name).unlink()
        assert fields(path) == {first, *others[:1]}


def test_paths_that_lead_out_of_a_pack(copy_of, tmp_path, plain):
    (tmp_path / "secret").write_bytes(b"")
    path = copy_of(plain)
    (path / "link").symlink_to(tmp_path / "secret")
    (path / "folder").symlink_to(tmp_path)
    os.mkfifo(path / "pipe")
    names = ["../secret", str(tmp_path / "secret"), "x/../secret", "./secret", "link", "pipe",
             "folder/secret", "a/b/c", "x" * 300, "a\nb"]  # fmt: skip
    manifest = json.loads((path / "manifest.json").read_text())
    for name in names:
        manifest["files"][name] = {"nbytes": 0, "sha256": hashlib.sha256().hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert len(problems(path)) == len(names)


def test_what_no_hash_covers_is_not_read(copy_of, plain):
    """It could say anything, such as a config of another scale."""
    left = true_of_files(plain.path, *(set(plain.manifest.files) - {CONFIG}))
    assert fields(copy_of(plain, **left)) == {"tasks.one"}
    files = json.loads((plain.path / "manifest.json").read_text())["files"]
    files[CONFIG]["nbytes"] *= 1.0
    assert fields(copy_of(plain, files=files)) == {f"files.{CONFIG}.nbytes"}


def test_a_compact_file_that_no_model_has(copy_of, compact, monkeypatch):
    """A module without a key in mlx-lm's layout, names for a terminal, and gigabytes of zeros."""
    small = compressed([adapter_of("one"), adapter_of("two", seed=1)])
    (levels, *_) = small[0].modules.values()
    names = [replace(adapter, name=f"{adapter.name}\x1b[2J") for adapter in small]
    for adapters, words in (
        ([replace(small[0], modules={"lm_head\n": levels})] * 3,
         "1 modules are in no transformer block (first: 'lm_head\\n')"),
        (names, "3 adapters have names that are no printable text (first: 'one\\x1b[2J')"),
    ):  # fmt: skip
        path = copy_of(compact)
        write_compact(path / COMPACT, adapters)
        rehash(path)
        (line,) = problems(path)
        assert words in line
    index = read_index(compact.path / COMPACT)
    rank = int(index.counts.sum(axis=2).max())
    most = rank * max(max(sides) for _, *sides in index.modules)
    monkeypatch.setattr("d2c_mlx.compress.compact_file._MOST_NUMBERS", most)
    load_pack(compact.path)
    monkeypatch.setattr("d2c_mlx.compress.compact_file._MOST_NUMBERS", most - 1)
    (line,) = problems(compact.path)
    assert f"found rank {rank} and a module of " in line and f"at most {most - 1:,}" in line
