"""Hostile and damaged packs, and rules of mlx-lm's layout: each line names what is at fault."""

import hashlib
import json
import os
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from d2c_mlx_cli import packs
from helpers import ROOT
from helpers.adapters import adapter_of, compressed
from helpers.command import edit_config, edit_tensors, problems_of
from helpers.damage import rehash, true_of_files
from helpers.tiny import ALL, LAYERS, TARGETS

from d2c_mlx import LoRA, load_pack
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.compress.compact_file import write_compact
from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.export import READERS, export, verify
from d2c_mlx.packs.write import write_pack

CONFIG = "cluster-0/adapter_config.json"
COMPACT = "compact.safetensors"
BASE = {"model": "m", "config_sha256": "", "n_layers": 2}


def fields(path):
    """Field -> line, each field once; a line without one is under the file that it names."""
    pairs = [line.split(", ")[0].split(": ")[:2] for line in problems_of(load_pack, path)]
    assert len({tuple(pair) for pair in pairs}) == len(pairs)
    manifest = str(path / "manifest.json")
    return {field if file == manifest else file.removeprefix(f"{path}/") for file, field in pairs}


# Fields of the manifest, and those at fault.
HOSTILE = [
    ({"nbytes": 5}, "nbytes"), ({"nbytes": 1e3}, "nbytes"), ({"nbytes": True}, "nbytes"),
    ({"base": ...}, "base"), ({"base": 3}, "base"),
    ({"base": {**BASE, "model": None}}, "base.model"),
    ({"base": {**BASE, "config_sha256": []}}, "base.config_sha256"),
    ({"base": {**BASE, "weights_sha256": 1}}, "base.weights_sha256"),
    ({"budget": {"text": 2, "nbytes": None}}, "budget.text"),
    ({"budget": {"text": "2", "nbytes": 0}}, "budget.nbytes"),
    ({"tasks": {}}, "tasks"), ({"tasks": ...}, "tasks"), ({"tasks": {"a": 1.5}}, "tasks.a"),
    ({"tasks": {"a": True}}, "tasks.a"), ({"files": {}}, "files"), ({"files": []}, "files"),
    ({"origins": {"a": 1}}, "origins.a"), ({"systems": {"a": []}}, "systems.a"),
    ({"merged": {"0": True}}, "merged.0"),
]  # fmt: skip
PLAIN = [
    ({"tasks": {"a\x1b[3m": "cluster-0"}}, "tasks.a\\x1b[3m"),
    ({"tasks": {"a\u202e": "cluster-0"}}, "tasks.a\\u202e"),
    ({"tasks": {"a": None}}, "tasks.a"), ({"tasks": {"a": 0}}, "tasks.a"),
    ({"tasks": {"a": "../elsewhere"}}, "tasks.a"), ({"tasks": {"a": "cluster-9"}}, "tasks.a"),
]  # fmt: skip
FORMAT = "format 'd2c-mlx-pack' version "
OF_COMPACT = [
    ({"dtype": "int8"}, "dtype"), ({"dtype": ...}, "dtype"), ({"dtype": 3}, "dtype"),
    ({"base": {"model": "m", "config_sha256": ""}}, "base.n_layers"),
    ({"base": {**BASE, "n_layers": 0}}, "base.n_layers"),
    ({"tasks": {"\x1b": 0}}, "tasks.\\x1b"), ({"tasks": {"a": "cluster-0"}}, "tasks.a"),
    ({"tasks": {"a": 3}}, COMPACT), ({"tasks": {"a": -1}}, COMPACT),
    ({"storage": []}, FORMAT + "2 storage []"), ({"storage": ...}, FORMAT + "2 storage None"),
    ({"format": "zip"}, "format 'zip' version 2 storage 'compact'"),
    ({"format_version": 1}, FORMAT + "1 storage 'compact'"),
]  # fmt: skip


PLACES = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4}
OF_GGUF = [
    ({"dtype": ...}, "dtype"), ({"base": {"model": "m", "config_sha256": ""}}, "base.n_layers"),
    ({"tasks": {"a": "../a.gguf"}}, "tasks.a"), ({"tasks": {"a": 0}}, "tasks.a"),
    ({"gguf": ...}, "gguf"), ({"gguf": {**PLACES, "modules": 3}}, "gguf.modules"),
    ({"gguf": {**PLACES, "num_hidden_layers": 0, "modules": []}}, "gguf.num_hidden_layers"),
    ({"gguf": {**PLACES, "num_hidden_layers": 1 << 40, "modules": ["a"]}},
     "gguf.num_hidden_layers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("storage", "changes"),
    [
        ("plain", HOSTILE + PLAIN),
        ("compact", HOSTILE[5:] + OF_COMPACT),
        ("gguf", HOSTILE[5:] + OF_GGUF),
    ],
)
def test_a_field_that_is_wrong_is_named(request, copy_of, storage, changes):
    pack = request.getfixturevalue(storage)
    for change, at_fault in changes:
        assert fields(copy_of(pack, **change)) == {at_fault}
    for content in (b"{", b"[]", b"\xff\xfe\x00", None):
        path = copy_of(pack) / "manifest.json"
        path.unlink() if content is None else path.write_bytes(content)
        (line,) = problems_of(load_pack, path.parent)
        assert str(path) in line


def test_what_another_storage_says_does_not_count(copy_of, plain, gguf):
    places = gguf.manifest.to_json()["gguf"]
    pack = load_pack(copy_of(plain, gguf=places, dtype="float32"))
    assert pack.load("one").digest == plain.load("one").digest
    assert verify(gguf.path, "mlx-swift") == gguf and gguf.load("none") is None
    assert gguf.load("one").digest == plain.load("one").uniform().digest


def test_all_problems_at_once(copy_of, plain, compact):
    files = {name: file.model_dump() for name, file in plain.manifest.files.items()}
    left = {name: entry for name, entry in files.items() if name != CONFIG}
    path = copy_of(plain, base=..., budget={"text": 2}, tasks={"a": [], "b": "cluster-0"})
    assert fields(path) == {"base", "budget.text", "tasks.a"}
    path = copy_of(plain, nbytes="5", tasks={"a": "..", "b": "cluster-0"}, files=left)
    assert fields(path) == {"nbytes", "tasks.a", "tasks.b"}
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
    assert len(problems_of(load_pack, path)) == len(names)


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
        (line,) = problems_of(load_pack, path)
        assert words in line
    monkeypatch.setattr("d2c_mlx.compress.compact_file._MOST_NUMBERS", 100)
    (line,) = problems_of(load_pack, compact.path)
    assert "found rank " in line and "at most 100" in line


Q0 = "model.layers.0.self_attn.q_proj"
PATHS = [path for path in ALL if path.endswith(TARGETS)]
ONE, TWO = (adapter_of(name, PATHS, seed=seed) for seed, name in enumerate("ab"))
SOME = replace(ONE, modules={path: lora for path, lora in ONE.modules.items() if path != Q0})


@pytest.fixture
def directory(tmp_path):
    ONE.save(tmp_path / "one", LAYERS)
    return tmp_path / "one"


@pytest.fixture
def two(tmp_path, about):
    return write_pack(tmp_path / "pack", [ONE, TWO], about)


def change_config(directory, lora=(), **fields):
    config = json.loads((directory / "adapter_config.json").read_text())
    edit_config(directory, **fields, lora_parameters=config["lora_parameters"] | dict(lora))


def change_tensors(directory, change):
    edit_tensors(directory, change, "adapters.safetensors")


def rename(tensors, old, new):
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


CONFIGS = [
    ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
    ({"num_layers": -1}, "num_layers is -1"),
    ({"num_layers": True}, "num_layers is True"),
    ({"num_layers": 1}, "number of blocks, above 1"),
    ({"lora": {"rank": None}}, "lora_parameters.rank is None"),
    ({"lora": {"rank": 8}}, "rank is 8, expected the rank of all tensors, which is [3]"),
    ({"lora": {"scale": "2"}}, "lora_parameters.scale is '2'"),
    ({"lora": {"scale": float("nan")}}, "NaN is no"),
    ({"lora": {"dropout": None}}, "lora_parameters.dropout is None"),
    ({"lora": {"keys": None}}, "lora_parameters.keys is None"),
    ({"lora": {"keys": ["q_proj", "v_proj"]}}, "keys is ['q_proj', 'v_proj'], expected"),
    ({"lora": {"keys": TARGETS[:1]}}, "tensors: ['self_attn.q_proj', 'self_attn.v_proj']"),
]
TENSORS = [
    (lambda t: t.clear(), "holds no tensors of a LoRA"),
    (lambda t: t.pop(f"{Q0}.lora_b"), f"modules is ['{Q0}'], expected both factors"),
    (lambda t: rename(t, Q0, "lm_head"), "is ['lm_head.lora_a']"),
    (lambda t: t.update({f"{Q0}.m": np.ones(4, "f2")}), f"is ['{Q0}.m']"),
    (lambda t: t.update({f"{Q0}.lora_a": np.ones((2, 4, 8), "f2")}), f"is ['{Q0}.lora_a']"),
    (lambda t: t.update({f"{Q0}.lora_a": np.ones((32, 3), "f4")}), "dtypes is ['F16', 'F32']"),
    (lambda t: t.update({k: x.astype("f8") for k, x in t.items()}), "dtypes is ['F64']"),
    (lambda t: rename(t, Q0, f"language_{Q0}"), "blocks is ['language_model"),
    # A factor in PEFT's orientation.
    (lambda t: t.update({f"{Q0}.lora_a": np.ones((3, 32), "f2")}), "which is [3, 32]"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS + TENSORS)
def test_what_breaks_a_rule_of_the_layout(directory, change, words):
    assert layout_problems(directory) == []
    if isinstance(change, dict):
        change_config(directory, **change)
    else:
        change_tensors(directory, change)
    (line,) = layout_problems(directory)
    assert str(directory) in line and words in line


def refused(words, call, *args):
    lines = problems_of(call, *args)
    assert len(lines) == len(words) and all(a in b for a, b in zip(words, lines)), lines


def test_a_plain_pack_is_always_checked(two):
    assert verify(two.path) == verify(two.path, "mlx-swift") == two
    infinite = {f"{Q0}.lora_a": np.full((32, 3), np.inf, "f2")}
    change_tensors(two.path / "cluster-1", lambda tensors: tensors.update(infinite))
    rehash(two.path)
    refused(["cluster-1/"], verify, two.path)
    change_config(two.path / "cluster-0", num_layers=-1)
    change_config(two.path / "cluster-1", lora={"keys": ["q_proj"]})
    rehash(two.path)
    lines = ["cluster-0/adapter_config.json: num_layers", "cluster-1/adapter_config.json: lora_par"]
    for check in (load_pack, verify):
        refused(lines, check, two.path)


def test_a_pack_that_would_not_load_elsewhere_is_not_written(tmp_path, about):
    """Factors of two dtypes; scales that differ are folded into factors that are all float32."""
    wide = replace(ONE.modules[Q0], b=ONE.modules[Q0].b.astype(mx.float32))
    mixed = replace(ONE, modules={**ONE.modules, Q0: wide})
    line = f"{tmp_path}/pack/cluster-0/adapters.safetensors: dtypes is ['F16', 'F32']"
    refused([line], write_pack, tmp_path / "pack", [mixed, TWO], about)
    assert not (tmp_path / "pack").exists()
    verify(write_pack(tmp_path / "pack", [mixed.uniform(mx.float16), TWO], about).path)
    scaled = replace(ONE, modules={**ONE.modules, Q0: replace(ONE.modules[Q0], scale=3.0)})
    verify(write_pack(tmp_path / "scaled", [scaled, TWO], about).path)


def test_a_compact_pack_is_checked_as_it_unpacks(tmp_path, about):
    """A manifest can say too few blocks, which no hash covers; one adapter has no modules."""
    one, some = (compress(a, dict.fromkeys(a.modules, [(3, 4)])) for a in (ONE, SOME))
    small = [replace(one, name="none", modules={}), one, some]
    about = about.model_copy(update={"dtype": mx.bfloat16})
    pack = write_pack(tmp_path / "pack", small, about, {"none": 0, "a": 1, "b": 2})
    assert verify(pack.path, "mlx-swift") == verify(pack.path) == pack
    words = f"{pack.path}/cluster-2: 1 modules are in some blocks only (first: q_proj, in 1 of"
    refused([words], verify, pack.path, "MNN")
    manifest = json.loads((pack.path / "manifest.json").read_text())
    manifest["base"]["n_layers"] = 1
    (pack.path / "manifest.json").write_text(json.dumps(manifest))
    verify(pack.path)
    lines = [f"{pack.path}/cluster-{k}/adapter_config.json: num_layers is 1, " for k in (1, 2)]
    refused(lines, verify, pack.path, "mlx-swift")


def test_what_a_reader_cannot_load_is_refused_by_name(tmp_path, two, about):
    text = (ROOT / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")
    assert [*READERS] == [*packs.READERS]
    for name, to in READERS.items():
        assert f"\n| {name} | {to or '–'} | " in text
        assert name == "llama.cpp" or verify(two.path, name) == two
    refused(["for: 'tvm', expected one of mlx-swift, mlx-lm"], verify, two.path, "tvm")
    refused(["the pack is for 'tiny/llama'"], verify, two.path, "llama.cpp")
    partial = write_pack(tmp_path / "some", [SOME, TWO], about)
    refused(["1 modules are in some blocks only"], verify, partial.path, "ExecuTorch")
    verify(partial.path, "PEFT")
    # Where all blocks are alike PEFT takes short names, and no patterns are needed.
    for pack, targets in ((two, ["q_proj", "v_proj"]), (partial, sorted(SOME.modules))):
        export(pack, "peft", tmp_path / "peft")
        config = json.loads((tmp_path / "peft/cluster-0/adapter_config.json").read_text())
        assert config["target_modules"] == targets and not config["rank_pattern"]
    wide = LoRA(mx.ones((32, 513), mx.float16), mx.ones((513, 32), mx.float16))
    write_pack(partial.path, [replace(ONE, modules={Q0: wide})], about)
    refused(["rank 513, at most 512 is taken"], verify, partial.path, "vllm-metal")
