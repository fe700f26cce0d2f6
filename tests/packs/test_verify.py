"""`verify` and the rules of mlx-lm's and mlx-swift's layout, each broken once."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from d2c_mlx_cli import packs
from helpers import ROOT
from helpers.damage import rehash
from helpers.exported import adapter_of
from helpers.tiny import ALL, LAYERS, TARGETS
from safetensors.numpy import load_file, save_file

from d2c_mlx.adapters.adapter import LoRA
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.export import READERS, export, verify
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.errors import InputError

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
    """A pack of q and v of every block."""
    return write_pack(tmp_path / "pack", [ONE, TWO], about)


def change_config(directory, lora=None, **fields):
    path = directory / "adapter_config.json"
    config = {**json.loads(path.read_text()), **fields}
    config["lora_parameters"] |= lora or {}
    path.write_text(json.dumps(config))


def change_tensors(directory, change):
    path = directory / "adapters.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


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


def refused(call, *words):
    """Each line of the error has the words of its place."""
    with pytest.raises(InputError) as caught:
        call()
    lines = caught.value.problems
    assert len(lines) == len(words) and all(a in b for a, b in zip(words, lines)), lines


def test_a_plain_pack_is_always_checked(two):
    assert verify(two.path) == verify(two.path, "mlx-swift") == two
    infinite = {f"{Q0}.lora_a": np.full((32, 3), np.inf, "f2")}
    change_tensors(two.path / "cluster-1", lambda tensors: tensors.update(infinite))
    rehash(two.path)
    refused(lambda: verify(two.path), "cluster-1/")
    change_config(two.path / "cluster-0", num_layers=-1)
    change_config(two.path / "cluster-1", lora={"keys": ["q_proj"]})
    rehash(two.path)
    lines = ["cluster-0/adapter_config.json: num_layers", "cluster-1/adapter_config.json: lora_par"]
    for check in (load_pack, verify):
        refused(lambda check=check: check(two.path), *lines)


def test_a_pack_that_would_not_load_elsewhere_is_not_written(tmp_path, about):
    """Factors of two dtypes; scales that differ are folded into factors that are all float32."""
    wide = replace(ONE.modules[Q0], b=ONE.modules[Q0].b.astype(mx.float32))
    mixed = replace(ONE, modules={**ONE.modules, Q0: wide})
    line = f"{tmp_path}/pack/cluster-0/adapters.safetensors: dtypes is ['F16', 'F32']"
    refused(lambda: write_pack(tmp_path / "pack", [mixed, TWO], about), line)
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
    refused(lambda: verify(pack.path, "MNN"), words)
    manifest = json.loads((pack.path / "manifest.json").read_text())
    manifest["base"]["n_layers"] = 1
    (pack.path / "manifest.json").write_text(json.dumps(manifest))
    verify(pack.path)
    lines = [f"{pack.path}/cluster-{k}/adapter_config.json: num_layers is 1, " for k in (1, 2)]
    refused(lambda: verify(pack.path, "mlx-swift"), *lines)


def test_the_readers_are_those_of_the_documents_and_the_command():
    text = (ROOT / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")
    for name, to in READERS.items():
        assert f"\n| {name} | {to or '–'} | " in text
    assert [*READERS] == [*packs.READERS]


def test_what_a_reader_cannot_load_is_refused_by_name(tmp_path, two, about):
    for name in ("mlx-lm", "PEFT", "vllm-metal", "ExecuTorch", "MNN"):
        assert verify(two.path, name) == two
    refused(lambda: verify(two.path, "tvm"), "for: 'tvm', expected one of mlx-swift, mlx-lm, PEFT")
    refused(lambda: verify(two.path, "llama.cpp"), "the pack is for 'tiny/llama'")
    some = write_pack(tmp_path / "some", [SOME, TWO], about)
    for name in ("ExecuTorch", "MNN"):
        words = f"1 modules are in some blocks only (first: q_proj, in 1 of {LAYERS})"
        refused(lambda name=name: verify(some.path, name), words)
    verify(some.path, "PEFT")
    # Where all blocks are alike PEFT takes short names, and no patterns are needed.
    for pack, targets in ((two, ["q_proj", "v_proj"]), (some, sorted(SOME.modules))):
        export(pack, "peft", tmp_path / "peft")
        config = json.loads((tmp_path / "peft/cluster-0/adapter_config.json").read_text())
        assert config["target_modules"] == targets and not config["rank_pattern"]
    wide = LoRA(mx.ones((32, 513), mx.float16), mx.ones((513, 32), mx.float16))
    write_pack(some.path, [replace(ONE, modules={Q0: wide})], about)
    refused(lambda: verify(some.path, "vllm-metal"), "rank 513, at most 512 is taken")
