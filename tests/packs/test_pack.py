"""Packs of every storage: their bytes, what they serve, and one that changes while it is read."""

import hashlib
import itertools
import json
import os
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.adapters import SERVES, adapter_of, compressed
from helpers.tiny import ALL, LAYERS

from d2c_mlx import Pack, export, load_pack, read_adapter
from d2c_mlx.compress.compact_file import compact_nbytes, read_index
from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.push import push
from d2c_mlx.packs.write import list_pack, opened, with_file, write_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_tree

ADAPTERS = [replace(adapter_of("one"), sources=("a", "c")), adapter_of("two", mixed=True, seed=1)]

# The tasks and files of a plain pack.
OWN = {"a": "cluster-0", "c": "cluster-0", "two": "cluster-1"}
ENDS = ("_config.json", "s.safetensors")
FILES = [f"cluster-{k}/adapter{end}" for k in (0, 1) for end in ENDS]


@pytest.fixture
def write(tmp_path, about):
    """`write(storage, name, **facts)`: a pack, the same for the same facts."""

    def call(storage, name="pack", **facts):
        described = about.model_copy(update=facts)
        if storage == "plain":
            two = ADAPTERS[1].uniform(mx.float16)
            return write_pack(tmp_path / name, [ADAPTERS[0], two], described)
        return write_pack(tmp_path / name, compressed(ADAPTERS), described, SERVES)

    return call


@pytest.mark.parametrize("storage", ["plain", "compact"])
def test_the_bytes_of_a_manifest(write, storage):
    """What most packs lack is not written, and the order of the keys is part of a pack's hash."""
    facts = {"budget": "9KB", "origins": {"a": "o/a@1"}, "systems": {"two": "S", "z": "no task"}}
    pack = write(storage, **facts)
    paths = [path for path in sorted(pack.path.rglob("*")) if path.is_file()]
    files = {path.relative_to(pack.path).as_posix(): path.read_bytes() for path in paths}
    text = files.pop("manifest.json").decode()
    base = {"model": "tiny/llama", "config_sha256": pack.manifest.config_hash}
    compact = storage == "compact"
    expected = {
        "format": "d2c-mlx-pack",
        "format_version": 2 if compact else 1,
        "storage": storage,
        "base": {**base, "n_layers": LAYERS} if compact else base,
        **({"dtype": "float16"} if compact else {}),
        "budget": {"text": "9KB", "nbytes": None},
        "origins": {"a": "o/a@1"},
        "tasks": dict(sorted(SERVES.items())) if compact else OWN,
        "systems": {"two": "S"},
        "files": {
            name: {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        "nbytes": sum(map(len, files.values())),
    }
    assert text == json.dumps(expected, indent=2) + "\n"
    assert [*files] == (["compact.safetensors"] if compact else FILES)
    assert hash_tree(write(storage, "again", **facts).path) == hash_tree(pack.path)
    more = with_file(pack, "more", b"x")
    assert [*json.loads((more.path / "manifest.json").read_text())] == [*expected]
    assert set(more.manifest.files) == {"more", *files} and more.tasks == pack.tasks


def test_a_plain_pack_holds_every_bit_where_mlx_lm_looks(write):
    pack = write("plain")
    assert load_pack(pack.path) == pack
    assert export(pack, "mlx", pack.path.parent / "out")["c"] == "cluster-0"
    for name in ("cluster-0", "cluster-1"):
        assert hash_tree(pack.path.parent / "out" / name) == hash_tree(pack.path / name)
    assert pack.nbytes == sum(a.nbytes(LAYERS) for a in (ADAPTERS[0], pack.load("two")))
    loaded = pack.load("c")
    assert loaded.digest == ADAPTERS[0].digest == read_adapter(pack.path / "cluster-0").digest
    assert loaded.base == "tiny/llama"
    config = json.loads((pack.path / pack.tasks["c"] / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == LAYERS
    keys = sorted({path.split(".", 3)[3] for path in ALL})
    assert config["lora_parameters"] == {"rank": 3, "scale": 1.25, "dropout": 0.0, "keys": keys}


def test_a_compact_pack_holds_what_was_compressed(write):
    pack = write("compact")
    assert load_pack(pack.path) == pack
    assert pack.nbytes == compact_nbytes(read_index(pack.path / "compact.safetensors"))
    one, two, _ = (adapter.adapter() for adapter in compressed(ADAPTERS))
    assert pack.load("one").digest == pack.load("also").digest == one.digest
    assert pack.load("two").digest == two.digest and pack.load("two").name == "two"
    assert pack.load("none") is None and pack.load("lost") is None
    with pytest.raises(PackError, match="no task 'z'; it serves also, lost, none, one, two"):
        pack.load("z")
    pack = load_pack(write("compact", dtype=mx.bfloat16).path)
    assert {lora.a.dtype for lora in pack.load("two").modules.values()} == {mx.bfloat16}


@pytest.mark.parametrize("storage", ["plain", "compact"])
def test_a_budget_is_exact_and_keeps_the_old_pack(write, storage, tmp_path):
    pack = write(storage)
    exact = write(storage, "exact", budget="x", max_bytes=pack.nbytes)
    assert exact.manifest.to_json()["budget"] == {"text": "x", "nbytes": pack.nbytes}
    for name in ("over", "pack"):
        with pytest.raises(PackError, match=f"{name}.*{pack.nbytes:,}.*{pack.nbytes - 1:,}"):
            write(storage, name, max_bytes=pack.nbytes - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact", "pack"]
    assert load_pack(pack.path) == pack


@pytest.fixture(params=["plain", "compact"])
def make(request, about):
    def write(path, seed):
        adapters = [adapter_of(name, seed=seed + i) for i, name in enumerate("abc")]
        if request.param == "plain":
            return write_pack(path, adapters, about)
        small = [compress(x, dict.fromkeys(x.modules, [(3, 4)])) for x in adapters]
        return write_pack(path, small, about, {name: i for i, name in enumerate("abc")})

    return write


def test_a_pack_that_was_replaced_is_not_taken_for_the_one_that_was_verified(make, tmp_path):
    stale = make(tmp_path / "pack", 0)
    export(stale, "mlx", tmp_path / "out")
    before = hash_tree(tmp_path / "out")
    make(tmp_path / "pack", 10)
    for use in (
        lambda: export(stale, "mlx", tmp_path / "out"),
        lambda: export(stale, "peft", tmp_path / "peft"),
        lambda: push(stale, "org/name", output=tmp_path / "out2"),
        lambda: stale.load("a"),
    ):
        pytest.raises(PackError, use).match("was replaced or changed while it was read")
    assert hash_tree(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "pack"}
    # Bytes that change under the same name and time.
    pack = load_pack(stale.path)
    (path, *_) = sorted(pack.path.rglob("*.safetensors"))
    times, content = path.stat(), bytearray(path.read_bytes())
    content[-400] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    names = [path.relative_to(pack.path).as_posix()]
    for use in (lambda: pack.load("a"), lambda: pack.copy_all(names, tmp_path / "copy")):
        pytest.raises(PackError, use).match("was replaced or changed")


def test_a_pack_that_a_kill_left_aside_is_read(make, tmp_path, command):
    """Between the two renames of a change it is under another name, and only there."""
    pack = make(tmp_path / "pack", 0)
    before = hash_tree(pack.path)
    for read in (
        lambda: list_pack(load_pack(pack.path)),
        lambda: command("verify", pack.path),
        lambda: opened(pack.path).__enter__(),
    ):
        pack.path.rename(tmp_path / ".pack.old")
        assert read()
        assert hash_tree(pack.path) == before and not (tmp_path / ".pack.old").exists()
    (tmp_path / "link").symlink_to("pack")
    pack.path.rename(tmp_path / ".pack.old")
    assert load_pack(tmp_path / "link").tasks == pack.tasks


def test_an_output_that_became_another_s_meanwhile_is_not_replaced(make, tmp_path, monkeypatch):
    pack = make(tmp_path / "pack", 0)
    copied, original = itertools.count(), Pack.copy_all

    def write(self, names, target):
        if not next(copied):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("mine")
        return original(self, names, target)

    monkeypatch.setattr(Pack, "copy_all", write)
    with pytest.raises(Exception, match="mine in it is of no earlier output"):
        push(pack, "org/name", output=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
