"""Packs of every storage: their bytes, what they serve, and what stock mlx-lm makes of them."""

import hashlib
import json
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.compact import SERVES, compressed
from helpers.exported import adapter_of
from helpers.losses import stock_loss
from helpers.tiny import ALL, LAYERS, library
from mlx_lm import load as stock_load

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.compact_file import compact_nbytes, read_index
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import with_file, write_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_tree

ADAPTERS = [replace(adapter_of("one"), sources=("a", "c")), adapter_of("two", mixed=True, seed=1)]


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
    files = {
        path.relative_to(pack.path).as_posix(): path.read_bytes()
        for path in sorted(pack.path.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    base = {"model": "tiny/llama", "config_sha256": pack.manifest.config_hash}
    tasks = {"a": "cluster-0", "c": "cluster-0", "two": "cluster-1"}
    if storage == "compact":
        base, tasks = {**base, "n_layers": LAYERS}, dict(sorted(SERVES.items()))
    expected = {
        "format": "d2c-mlx-pack",
        "format_version": 1 if storage == "plain" else 2,
        "storage": storage,
        "base": base,
        **({} if storage == "plain" else {"dtype": "float16"}),
        "budget": {"text": "9KB", "nbytes": None},
        "origins": {"a": "o/a@1"},
        "tasks": tasks,
        "systems": {"two": "S"},
        "files": {
            name: {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        "nbytes": sum(map(len, files.values())),
    }
    text = (pack.path / "manifest.json").read_text()
    assert text == json.dumps(expected, indent=2) + "\n"
    names = {
        f"cluster-{k}/adapter{end}" for k in (0, 1) for end in ("s.safetensors", "_config.json")
    }
    assert set(files) == (names if storage == "plain" else {"compact.safetensors"})
    assert hash_tree(write(storage, "again", **facts).path) == hash_tree(pack.path)
    more = with_file(pack, "more", b"x")
    keys = json.loads((more.path / "manifest.json").read_text()).keys()
    assert [*keys] == [*expected]
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
    for path, lora in ADAPTERS[0].modules.items():
        same = loaded.modules[path]
        assert same.a.dtype == mx.float16 and same.scale == lora.scale
        assert mx.array_equal(same.a, lora.a) and mx.array_equal(same.b, lora.b)
    config = json.loads((pack.adapter_path("c") / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == LAYERS
    keys = sorted({path.split(".", 3)[3] for path in ALL})
    assert config["lora_parameters"] == {"rank": 3, "scale": 1.25, "dropout": 0.0, "keys": keys}
    with pytest.raises(PackError, match="no task 'z'; it serves a, c, two"):
        pack.adapter_path("z")


def test_a_compact_pack_holds_what_was_compressed(write):
    pack = write("compact")
    assert load_pack(pack.path) == pack
    assert pack.nbytes == compact_nbytes(read_index(pack.path / "compact.safetensors"))
    small = [adapter.adapter() for adapter in compressed(ADAPTERS)]
    assert pack.load("one").digest == pack.load("also").digest == small[0].digest
    assert pack.load("two").digest == small[1].digest and pack.load("two").name == "two"
    assert pack.load("none") is None and pack.load("lost") is None
    for call, words in (
        (lambda: pack.adapter_path("one"), "d2c-mlx export .*pack --to mlx --output DIR"),
        (lambda: pack.load("z"), "no task 'z'; it serves also, lost, none, one, two"),
    ):
        with pytest.raises(PackError, match=words):
            call()
    pack = write("compact", dtype=mx.bfloat16)
    assert {x.a.dtype for x in load_pack(pack.path).load("two").modules.values()} == {mx.bfloat16}


@pytest.mark.parametrize("storage", ["plain", "compact"])
def test_a_budget_is_exact_and_keeps_the_old_pack(write, storage, tmp_path):
    pack = write(storage)
    exact = write(storage, "exact", budget="x", max_bytes=pack.nbytes)
    assert exact.manifest.to_json()["budget"] == {"text": "x", "nbytes": pack.nbytes}
    for name in ("over", "pack"):
        with pytest.raises(PackError) as caught:
            write(storage, name, max_bytes=pack.nbytes - 1)
        (line,) = caught.value.problems
        assert str(tmp_path / name) in line
        assert f"{pack.nbytes:,}" in line and f"{pack.nbytes - 1:,}" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact", "pack"]
    assert load_pack(pack.path) == pack


def test_stock_mlx_lm_has_the_loss_of_what_pack_load_gives(tmp_path, model, about):
    paths = library(tmp_path, ["one", "two"])
    # Four times as strong: losses that differ from the base's by more than what is compared.
    adapters = [read_adapter(paths.adapters / name, ALL) for name in ("one", "two")]
    adapters = [scaled(adapter, 4.0).uniform(mx.float16) for adapter in adapters]
    pack = write_pack(tmp_path / "pack", compressed(adapters, 3), about, SERVES)
    tasks = export(pack, "mlx", tmp_path / "plain")
    base = Model(str(model))
    for name in ("one", "two"):
        examples = base.encode(name, load_task(paths.tasks / name).test)
        ((_, rows),) = Engine(base).run([(pack.load(name), examples)])
        total = rows.sum()
        stock, _ = stock_load(str(model), adapter_path=str(tmp_path / "plain" / tasks[name]))
        assert total / examples.n_targets == pytest.approx(stock_loss(stock, examples), abs=1e-4)
        ((_, rows),) = Engine(base).run([(None, examples)])
        bare = rows.sum()
        assert abs(bare - total) / examples.n_targets > 1e-3
