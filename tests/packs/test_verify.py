"""`verify` and the rules of mlx-lm's and mlx-swift's layout, each broken once."""

import hashlib
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from d2c_mlx_cli import formats
from helpers import ROOT
from helpers.tiny import LAYERS, SHAPES, TARGETS, peft_adapter
from safetensors.numpy import load_file, save_file

from d2c_mlx.adapters.adapter import LoRA
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.export import READERS, export, verify
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import write_compact_pack, write_pack
from d2c_mlx.utils.errors import InputError, PackError

ALL = {f"model.layers.{i}.{name}": SHAPES[name] for i in range(LAYERS) for name in SHAPES}
ABOUT = {"model": "m", "config_hash": "", "n_layers": LAYERS, "budget": "-", "max_bytes": None}
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapters(tmp_path):
    found = [
        read_adapter(peft_adapter(tmp_path / "in", n, seed=i), ALL) for i, n in enumerate("ab")
    ]
    return [replace(adapter, sources=(adapter.name,)) for adapter in found]


@pytest.mark.parametrize("name", ["verify", "list"])
def test_what_is_no_pack_is_refused_in_one_line(name, command, tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("{}")
    (folder / "manifest.json").mkdir(parents=True)
    for path, words in ((file, "missing; is this a pack?"), (folder, "no file that can be read")):
        code, _, err = command(name, path)
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith(f"error: {path / 'manifest.json'}: ") and words in line


@pytest.fixture
def directory(tmp_path, adapters):
    adapters[0].save(tmp_path / "one", LAYERS)
    return tmp_path / "one"


def change_config(directory, lora=None, **fields):
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= fields
    config["lora_parameters"] = config["lora_parameters"] | (lora or {})
    for part in (config, config["lora_parameters"]):
        for name in [name for name, value in part.items() if value is ...]:
            del part[name]
    path.write_text(json.dumps(config))


def change_tensors(directory, change):
    path = directory / "adapters.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename(tensors, old, new):
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def test_what_we_save_obeys_every_rule(directory):
    assert layout_problems(directory) == []


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"fine_tune_type": ...}, "fine_tune_type is None, expected 'lora'"),
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora'"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 1}, "num_layers is 1, but tensors belong to block 1"),
        ({"lora": {"rank": ...}}, "lora_parameters.rank is None"),
        ({"lora": {"rank": 8}}, "lora_parameters.rank is 8, but model.layers.0"),
        ({"lora": {"scale": "2"}}, "lora_parameters.scale is '2'"),
        ({"lora": {"scale": float("nan")}}, "NaN is no JSON"),
        ({"lora": {"dropout": ...}}, "lora_parameters.dropout is None"),
        ({"lora": {"keys": ...}}, "lora_parameters.keys is None"),
        ({"lora": {"keys": []}}, "lora_parameters.keys is []"),
        ({"lora": {"keys": [*TARGETS, "mlp.up_proj"]}}, ", 'mlp.up_proj'], expected"),
        (
            {"lora": {"keys": [TARGETS[0]]}},
            "have tensors: self_attn.q_proj, self_attn.v_proj",
        ),
    ],
)
def test_configs_that_break_a_rule(directory, fields, words):
    change_config(directory, **fields)
    (line,) = layout_problems(directory)
    assert str(directory) in line and words in line


def test_short_names_match_nothing(directory):
    change_config(directory, lora={"keys": ["q_proj", "v_proj"]})
    (line,) = layout_problems(directory)
    assert "lora_parameters.keys is ['q_proj', 'v_proj'], expected" in line


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.clear(), "holds no tensors"),
        (lambda t: t.pop(f"{Q0}.lora_b"), f"1 modules have one factor of two (first: {Q0})"),
        (lambda t: rename(t, Q0, "model.embed_tokens"), "2 tensors are no two-dimensional"),
        (lambda t: rename(t, Q0, "lm_head"), "(first: lm_head.lora_a)"),
        (lambda t: t.update({f"{Q0}.m": np.ones(4, "f2")}), f"(first: {Q0}.m)"),
        (
            lambda t: t.update({f"{Q0}.lora_a": np.ones((2, 4, 8), "f2")}),
            f"(first: {Q0}.lora_a)",
        ),
        (lambda t: t.update({f"{Q0}.lora_a": np.ones((32, 4), "f4")}), "dtypes F16, F32"),
        (lambda t: t.update({k: x.astype("f8") for k, x in t.items()}), "dtypes F64"),
        (lambda t: rename(t, Q0, f"language_{Q0}"), "blocks of language_model.layers and model."),
        # A factor in PEFT's orientation.
        (lambda t: t.update({f"{Q0}.lora_a": np.ones((4, 32), "f2")}), "shape (4, 32); expected"),
    ],
)
def test_tensors_that_break_a_rule(directory, change, words):
    change_tensors(directory, change)
    (line,) = layout_problems(directory)
    assert str(directory) in line and words in line


def test_all_problems_at_once(directory):
    change_config(directory, lora={"rank": 0}, num_layers=-1)
    change_tensors(directory, lambda t: t.pop(f"{Q0}.lora_b"))
    assert len(layout_problems(directory)) == 3
    (directory / "adapter_config.json").write_text("[]")
    (directory / "adapters.safetensors").write_bytes(b"x")
    assert len(layout_problems(directory)) == 2


def rehashed(pack):
    """The pack with a manifest that is true of its files again."""
    files = {}
    for name in pack.manifest.files:
        content = (pack.path / name).read_bytes()
        files[name] = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    nbytes = sum(entry["nbytes"] for entry in files.values())
    manifest = json.loads((pack.path / "manifest.json").read_text())
    manifest |= {"files": files, "nbytes": nbytes}
    (pack.path / "manifest.json").write_text(json.dumps(manifest))


def test_a_plain_pack_is_always_checked(tmp_path, adapters):
    pack = write_pack(tmp_path / "pack", adapters, Manifest(**ABOUT))
    assert verify(pack.path) == verify(pack.path, "mlx-swift") == pack
    change_config(pack.path / "cluster-0", num_layers=-1)
    change_config(pack.path / "cluster-1", lora={"keys": ["q_proj"]})
    rehashed(pack)
    for check in (load_pack, verify):
        with pytest.raises(PackError) as caught:
            check(pack.path)
        assert len(caught.value.problems) == 2
        assert "cluster-0/adapter_config.json: num_layers is -1" in caught.value.problems[0]
        assert "cluster-1/adapter_config.json: lora_parameters.keys is" in caught.value.problems[1]


def test_a_pack_that_would_not_load_elsewhere_is_not_written(tmp_path, adapters):
    """Factors of two dtypes; scales that differ are folded into factors that are all float32."""
    one, two = adapters
    wide = replace(one.modules[Q0], b=one.modules[Q0].b.astype(mx.float32))
    mixed = replace(one, modules={**one.modules, Q0: wide})
    with pytest.raises(PackError) as caught:
        write_pack(tmp_path / "pack", [mixed, two], Manifest(**ABOUT))
    (line,) = caught.value.problems
    assert f"{tmp_path}/pack/cluster-0/adapters.safetensors: dtypes F16, F32" in line
    assert not (tmp_path / "pack").exists()
    verify(write_pack(tmp_path / "pack", [mixed.uniform(mx.float16), two], Manifest(**ABOUT)).path)
    scaled = replace(one, modules={**one.modules, Q0: replace(one.modules[Q0], scale=3.0)})
    verify(write_pack(tmp_path / "scaled", [scaled, two], Manifest(**ABOUT)).path)


def test_values_that_are_not_finite(tmp_path, adapters):
    pack = write_pack(tmp_path / "pack", adapters, Manifest(**ABOUT))
    for k in (0, 1):
        infinite = {f"{Q0}.lora_a": np.full((32, 4), np.inf, "f2")}
        change_tensors(pack.path / f"cluster-{k}", lambda t, new=infinite: t.update(new))
    rehashed(pack)
    with pytest.raises(InputError) as caught:
        verify(pack.path)
    assert [f"cluster-{k}/" in line and "NaN" in line for k, line in
            enumerate(caught.value.problems)] == [True, True]  # fmt: skip


def test_a_compact_pack_is_checked_as_it_unpacks(tmp_path, adapters):
    small = [compress(one, dict.fromkeys(one.modules, [(4, 4)])) for one in adapters]
    pack = write_compact_pack(
        tmp_path / "pack", small, {"a": 0, "b": 1, "c": None}, Manifest(**ABOUT, dtype=mx.bfloat16)
    )
    assert verify(pack.path, "mlx-swift") == verify(pack.path) == pack
    # A manifest can say too few blocks; no hash covers it.
    manifest = json.loads((pack.path / "manifest.json").read_text())
    manifest["base"]["n_layers"] = 1
    (pack.path / "manifest.json").write_text(json.dumps(manifest))
    verify(pack.path)
    with pytest.raises(PackError) as caught:
        verify(pack.path, "mlx-swift")
    lines = caught.value.problems
    where = [line.split(": ")[0] for line in lines]
    assert where == [f"{pack.path}/cluster-{k}/adapter_config.json" for k in (0, 1)]
    assert all("num_layers is 1, but tensors belong to block 1" in line for line in lines)


def test_an_unknown_runtime(tmp_path):
    with pytest.raises(InputError, match="for: 'tvm', expected one of mlx-swift, mlx-lm, PEFT"):
        verify(tmp_path, "tvm")


def test_the_readers_are_those_of_the_documents_and_the_command():
    text = (ROOT / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")
    for name, (to, _) in READERS.items():
        assert f"\n| {name} | {to or '–'} | " in text
    assert [*READERS] == [*formats.READERS]


@pytest.mark.parametrize("name", ["mlx-lm", "PEFT", "vllm-metal", "ExecuTorch", "MNN"])
def test_a_pack_with_the_same_modules_in_every_block_goes_everywhere(tmp_path, adapters, name):
    pack = write_pack(tmp_path / "pack", adapters, Manifest(**ABOUT))
    assert verify(pack.path, name) == pack
    export(pack, "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "cluster-0" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]


def test_what_a_reader_cannot_load_is_refused_by_name(tmp_path, adapters):
    one = adapters[0]
    some = replace(one, modules={p: x for p, x in one.modules.items() if p != Q0})
    pack = write_pack(tmp_path / "pack", [some, adapters[1]], Manifest(**ABOUT))

    def refused(name, words):
        with pytest.raises(InputError) as caught:
            verify(pack.path, name)
        (line,) = caught.value.problems
        assert words in line, line

    for name in ("ExecuTorch", "MNN"):
        refused(name, f"1 modules are in some blocks only (first: q_proj, in 1 of {LAYERS})")
    refused("oMLX", "oMLX loads no adapters")
    refused("llama.cpp", "the pack is for 'm'; name that model")
    verify(pack.path, "PEFT")
    export(pack, "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "cluster-0" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(some.modules)
    wide = replace(one, modules={p: LoRA(mx.ones((32, 513), mx.float16), mx.ones(
        (513, x.shape[1]), mx.float16)) for p, x in one.modules.items()})  # fmt: skip
    write_pack(pack.path, [wide], Manifest(**ABOUT))
    refused("vllm-metal", "rank 513, at most 512 is taken")


def test_a_problem_is_of_its_adapter_beside_one_without_modules(tmp_path, adapters):
    one, two = (compress(one, dict.fromkeys(one.modules, [(4, 4)])) for one in adapters)
    some = {path: x for path, x in two.modules.items() if path != Q0}
    small = [replace(one, name="none", modules={}), one, replace(two, modules=some)]
    info = Manifest(**ABOUT, dtype=mx.float16)
    pack = write_compact_pack(tmp_path / "pack", small, {"none": 0, "a": 1, "b": 2}, info)
    with pytest.raises(PackError) as caught:
        verify(pack.path, "MNN")
    (line,) = caught.value.problems
    assert line.startswith(f"{pack.path}/cluster-2: 1 modules are in some blocks only")


def test_the_command(tmp_path, adapters, command):
    pack = write_pack(tmp_path / "pack", adapters, Manifest(**ABOUT))
    code, out, _ = command("verify", pack.path, "--for", "mlx-swift")
    assert code == 0
    assert out == (
        f"{pack.path}: plain, 2 adapters for 2 tasks, {pack.nbytes:,} bytes: verified for mlx-swift"
        "\n"
    )
    row = json.loads(command("verify", pack.path, "--json")[1])
    assert row["storage"] == "plain" and row["adapters"] == row["tasks"] == 2
    for k in (0, 1):
        change_config(pack.path / f"cluster-{k}", num_layers=-1)
    rehashed(pack)
    code, out, err = command("verify", pack.path)
    assert code == 2 and out == ""
    assert [line[:7] for line in err.splitlines()] == ["error: ", "error: "]
