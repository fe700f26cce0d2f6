"""Compact packs: what they serve, what they refuse, and what stock mlx-lm makes of them."""

import hashlib
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import scipy.special
from helpers.compact import ABOUT, SERVES, compressed
from helpers.tiny import ALL, LAYERS, library, tiny_model
from mlx_lm import load as stock_load

from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.affine import BITS
from d2c_mlx.compress.compact_file import read_index, write_compact
from d2c_mlx.compress.file_layout import compact_nbytes
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import PackInfo, load_pack
from d2c_mlx.packs.write import with_file, write_compact_pack, write_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_tree

ABOUT_BASE = {"model": "tiny/llama", "config_sha256": "0" * 64, "n_layers": LAYERS}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A float32 base, so that stock mlx-lm computes in the precision that we compute in."""
    root = tmp_path_factory.mktemp("compact")
    found = library(root, ["one", "two"])
    tiny_model(root / "float", mx.float32)
    return found._replace(model=root / "float")


@pytest.fixture(scope="module")
def adapters(paths):
    # Four times as strong: losses that differ from the base's by more than what is compared.
    found = [read_adapter(paths.adapters / name, ALL) for name in ("one", "two")]
    return [scaled(adapter, 4.0).uniform(mx.float16) for adapter in found]


def write(directory, adapters, max_bytes=None, serves=SERVES, **options):
    return write_compact_pack(
        directory, adapters, serves, PackInfo(**ABOUT, max_bytes=max_bytes, **options)
    )


@pytest.fixture
def pack(tmp_path, adapters):
    return write(tmp_path / "pack", compressed(adapters))


def refused(path):
    with pytest.raises(PackError) as caught:
        load_pack(path)
    return caught.value.problems


def edit(pack, **changes):
    path = pack.path / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


def test_manifest(pack):
    content = (pack.path / "compact.safetensors").read_bytes()
    assert json.loads((pack.path / "manifest.json").read_text()) == {
        "format": "d2c-mlx-pack",
        "format_version": 2,
        "storage": "compact",
        "base": {"model": "tiny/llama", "config_sha256": "0" * 64, "n_layers": LAYERS},
        "dtype": "float16",
        "budget": {"text": "9KB", "nbytes": None},
        "tasks": {"also": 0, "lost": 2, "none": None, "one": 0, "two": 1},
        "files": {
            "compact.safetensors": {
                "nbytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        },
        "nbytes": len(content),
    }
    assert load_pack(pack.path) == pack
    assert pack.nbytes == compact_nbytes(read_index(pack.path / "compact.safetensors"))


def test_the_order_of_the_keys_is_part_of_the_bytes(pack):
    """Packs of before and after a change of our code have the same hash."""

    def keys(one):
        return list(json.loads((one.path / "manifest.json").read_text()))

    head, tail = ["format", "format_version", "storage"], ["tasks", "files", "nbytes"]
    assert keys(pack) == [*head, "base", "dtype", "budget", *tail]
    more = with_file(pack, "more", lambda path: path.write_bytes(b"x"))
    assert keys(more) == [*head, "base", "budget", "dtype", *tail]
    assert more.info == pack.info and set(more.manifest.files) == {"more", "compact.safetensors"}


@pytest.mark.parametrize("said", [3, [], {"0": "x", "1": True}, {"one": 3, "0": None}])
def test_what_decides_nothing_may_be_anything(pack, said):
    """Origins and counts are for people and for later merges; later versions may say more."""
    edit(pack, origins=said, merged=said, later=said)
    again = load_pack(pack.path)
    assert again.origins == {} or again.origins == {"0": "x"}
    assert [again.merged(k) for k in again.adapters] == [2, 1, 1]


def test_load_gives_what_was_compressed(pack, adapters):
    expected = [small.adapter() for small in compressed(adapters)]
    assert pack.load("one").digest == pack.load("also").digest == expected[0].digest
    assert pack.load("two").digest == expected[1].digest
    assert pack.load("two").base == "tiny/llama" and pack.load("two").name == "two"
    assert pack.load("none") is None and pack.load("lost") is None


def test_the_dtype_of_the_base(tmp_path, adapters):
    pack = write(tmp_path / "pack", compressed(adapters), dtype=mx.bfloat16)
    assert {x.a.dtype for x in load_pack(pack.path).load("two").modules.values()} == {mx.bfloat16}


def test_the_same_pack_twice_is_the_same_bytes(tmp_path, pack, adapters):
    write(tmp_path / "again", compressed(adapters))
    assert hash_tree(tmp_path / "again") == hash_tree(pack.path)


def test_no_adapter_directories(pack):
    for task in ("one", "none"):
        with pytest.raises(PackError, match="d2c-mlx export .*pack --to mlx --output DIR"):
            pack.adapter_path(task)
    for call in (pack.load, pack.adapter_path):
        with pytest.raises(PackError, match="no task 'z'; it serves also, lost, none, one, two"):
            call("z")


def test_budget(tmp_path, pack, adapters):
    exact = write(tmp_path / "exact", compressed(adapters), pack.nbytes)
    assert exact.manifest.budget.nbytes == pack.nbytes
    with pytest.raises(PackError, match="over the budget"):
        write(tmp_path / "over", compressed(adapters), pack.nbytes - 1)
    with pytest.raises(PackError, match="task 'x' has adapter 3 of 3"):
        write(tmp_path / "over", compressed(adapters), serves={"x": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact", "pack"]


def test_tampering_with_one_bit(pack):
    file = pack.path / "compact.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    (line,) = refused(pack.path)
    assert str(file) in line and "sha256" in line


@pytest.mark.parametrize(
    "change, found",
    [
        ({"format_version": 1}, "version 1, expected 'd2c-mlx-pack' version 2"),
        ({"format_version": 3}, "version 3, expected 'd2c-mlx-pack' version 2"),
        ({"storage": "zip"}, "storage 'zip', expected one of ['plain', 'compact', 'gguf']"),
        ({"storage": []}, "storage []"),
        ({"storage": ...}, "version 2, expected 'd2c-mlx-pack' version 1"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"base": {}}, "base.n_layers is missing"),
        ({"tasks": {"a": "cluster-0"}}, "points to 'cluster-0', expected the position"),
        ({"tasks": {"a": True}}, "points to True"),
        ({"tasks": {"a": 3}}, "tasks name adapter 3, the file holds 3"),
        ({"tasks": {}}, "tasks: found none, expected one or more"),
        ({"tasks": {"\x1b": 0}}, "the name '\\x1b' has characters that are not printable"),
        ({"nbytes": 5}, "nbytes: found 5, expected "),
        ({"budget": {"text": "9KB"}}, "budget.nbytes is missing"),
        ({"base": {**ABOUT_BASE, "n_layers": True}}, "base.n_layers is True, expected a whole"),
        ({"base": {**ABOUT_BASE, "model": None}}, "base.model is None, expected a string"),
        ({"files": {}}, "compact.safetensors is not among its files"),
    ],
)
def test_manifests_that_do_not_verify(pack, change, found):
    edit(pack, **change)
    (line,) = refused(pack.path)
    assert str(pack.path / "manifest.json") in line and found in line


def test_a_module_outside_the_blocks(pack, adapters):
    """It has no key in mlx-lm's layout."""
    path = pack.path / "compact.safetensors"
    (one, *_) = compressed(adapters)
    (levels, *_) = one.modules.values()
    write_compact(path, [replace(one, modules={"lm_head\n": levels})] * 3)
    content = path.read_bytes()
    entry = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(pack, files={path.name: entry}, nbytes=len(content))
    (line,) = refused(pack.path)
    assert "1 modules are in no transformer block (first: 'lm_head\\n')" in line


def test_a_wide_module_beside_one_of_high_rank(pack, monkeypatch):
    """Megabytes that would become gigabytes of zeros."""
    index = read_index(pack.path / "compact.safetensors")
    rank = int(index.counts.sum(axis=2).max())
    most = rank * max(max(sides) for _, *sides in index.modules)
    monkeypatch.setattr("d2c_mlx.compress.compact_file._MOST_NUMBERS", most)
    load_pack(pack.path)
    monkeypatch.setattr("d2c_mlx.compress.compact_file._MOST_NUMBERS", most - 1)
    with pytest.raises(
        PackError, match=rf"found rank {rank} and a module of .* at most {most - 1:,}"
    ):
        load_pack(pack.path)


def test_an_adapter_in_the_file_whose_name_is_not_printable(pack, adapters):
    path = pack.path / "compact.safetensors"
    small = [replace(one, name=f"{one.name}\x1b[2J") for one in compressed(adapters)]
    write_compact(path, small)
    content = path.read_bytes()
    entry = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(pack, files={path.name: entry}, nbytes=len(content))
    found = refused(pack.path)
    assert len(found) == 3 and "'one\\x1b[2J' of adapter 0 is no printable text" in found[0]


def test_old_plain_packs_still_load(tmp_path, adapters):
    named = [replace(adapter, sources=(adapter.name,)) for adapter in adapters]
    pack = write_pack(tmp_path / "plain", named, PackInfo(**ABOUT))
    edit(pack, storage=...)
    again = load_pack(pack.path)
    assert again.storage == "plain" and again.load("two").digest == adapters[1].digest


def stock_loss(model, examples):
    """By the logits of stock mlx-lm, one row at a time, summed in float64."""
    total = 0.0
    for example in examples.examples:
        logits = np.array(model(mx.array([example.tokens[:-1]]))[0].astype(mx.float32), np.float64)
        nll = scipy.special.logsumexp(logits, axis=-1)
        nll -= logits[np.arange(len(nll)), list(example.tokens[1:])]
        total += nll[example.first_target - 1 :].sum()
    return total / examples.n_targets


@pytest.mark.parametrize("bits", BITS)
def test_stock_mlx_lm_has_the_loss_of_what_pack_load_gives(tmp_path, paths, adapters, bits):
    pack = write(tmp_path / "pack", compressed(adapters, bits))
    tasks = export(pack, "mlx", tmp_path / "plain")
    base = BaseModel(str(paths.model))
    for name in ("one", "two"):
        examples = base.encode(name, load_task(paths.tasks / name).test)
        ((_, total),) = Engine(base).run([(pack.load(name), examples)])
        model, _ = stock_load(str(paths.model), adapter_path=str(tmp_path / "plain" / tasks[name]))
        assert total / examples.n_targets == pytest.approx(stock_loss(model, examples), abs=1e-4)
        ((_, plain),) = Engine(base).run([(None, examples)])
        assert abs(plain - total) / examples.n_targets > 1e-3


def test_unpack(tmp_path, pack):
    output = tmp_path / "plain"
    tasks = export(pack, "mlx", output)
    assert tasks == json.loads((output / "tasks.json").read_text())
    assert tasks == {
        "also": "cluster-0", "lost": None, "none": None, "one": "cluster-0", "two": "cluster-1",
    }  # fmt: skip
    assert sorted(path.name for path in output.iterdir()) == [
        ".d2c-mlx.json",
        "cluster-0",
        "cluster-1",
        "tasks.json",
    ]
    for task in ("one", "two"):
        assert load_adapter(output / tasks[task]).digest == pack.load(task).digest
        config = json.loads((output / tasks[task] / "adapter_config.json").read_text())
        assert config["num_layers"] == LAYERS
        assert config["base_model_name_or_path"] == "tiny/llama"


def test_unpack_a_plain_pack(tmp_path, adapters):
    named = [replace(adapter, sources=(adapter.name,)) for adapter in adapters]
    pack = write_pack(tmp_path / "pack", named, PackInfo(**ABOUT))
    assert export(pack, "mlx", tmp_path / "plain") == {"one": "cluster-0", "two": "cluster-1"}
    for k in (0, 1):
        assert hash_tree(tmp_path / "plain" / f"cluster-{k}") == hash_tree(
            pack.path / f"cluster-{k}"
        )


def test_unpack_never_replaces_the_pack(pack):
    for output, whose in ((pack.path, "your"), (pack.path.parent, "the")):
        with pytest.raises(PackError, match=f"would replace {whose} pack"):
            export(pack, "mlx", output)
    assert load_pack(pack.path) == pack
