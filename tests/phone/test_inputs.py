"""What the phone benchmark reads: profiles of devices, models that it quantizes, its results."""

import json

import mlx.core as mx
import pytest
from helpers import ROOT
from helpers.command import problems_of
from helpers.tiny import edit_json, tiny_model
from mlx_lm import load
from mlx_lm.convert import QUANT_RECIPES

from d2c_mlx.phone.config import BITS, find_profiles
from d2c_mlx.phone.quantized import quantized_model
from d2c_mlx.phone.tables import read_phone

GOOD = """
  memory: 2.1GB
  memory_is: measured
  memory_source: by us
  storage: 500MB
  storage_is: estimated
  storage_source: half of it
"""


def test_builtin_profiles():
    """Every number is published or measured at an address, or estimated."""
    profiles = find_profiles(None)
    assert {name.split("-")[0] for name in profiles} == {"iphone", "ipad", "mac", "android"}
    for name, profile in profiles.items():
        assert find_profiles(name) == {name: profile} and profile.chips
        assert 0 < profile.memory < int(name.split("-")[1].removesuffix("gb")) * 1_000_000_000
        for known, source in ((profile.memory_is, profile.memory_source),
                              (profile.storage_is, profile.storage_source)):  # fmt: skip
            assert known == "estimated" or "https://" in source
    # The example is one.
    ((name, profile),) = find_profiles(str(ROOT / "examples" / "tiny-phone.yaml")).items()
    assert (name, profile.memory, profile.storage) == ("tiny-phone", 350_000_000, 200_000_000)


def test_every_problem_of_a_profile_is_told(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("one:\n  memory: 3\n  memory_is: guessed\n  memory_source: ''\n  ram: 4GB\n"
                    "  storage: 50%\n  storage_is: published\n")  # fmt: skip
    lines = problems_of(find_profiles, str(path))
    fields = [line.removeprefix(f"{path}: one: ").split(": ")[0] for line in lines]
    assert fields == ["ram", "memory", "memory_is", "memory_source", "storage", "storage_source"]
    assert 'found 3, expected bytes such as "4.2GB"' in lines[1]


BAD = [(find_profiles, text) for text in (None, "a: [", "", "- 1", "a: 5", f"a:{GOOD}b:\n  c: 1")]
BAD += [(read_phone, text) for text in (None, "{}", "not JSON", '{"format": "d2c-mlx-phone"}')]


@pytest.mark.parametrize("read, text", BAD)
def test_files_that_are_no_profile_and_no_result(tmp_path, read, text):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    lines = problems_of(read, str(path) if read is find_profiles else path)
    assert all(line.startswith(f"{path}: ") for line in lines)


def test_quantizing_is_done_once_by_mlx_lm(tmp_path, monkeypatch):
    """Whatever decides besides the weights gives a copy of its own."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    source = tiny_model(tmp_path / "model")
    name, directory, about = quantized_model(str(source), "4")
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert quantized_model(str(source), "4") == (name, directory, about)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    quantization = json.loads((directory / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    module = "model.layers.0.mlp.up_proj"
    whole = mx.load(str(source / "model.safetensors"))[f"{module}.weight"]
    stored = mx.load(str(directory / "model.safetensors"))
    for leaf, expected in zip(("weight", "scales", "biases"), mx.quantize(whole, 32, 4)):
        assert mx.array_equal(stored[f"{module}.{leaf}"], expected)
    assert about["weights_nbytes"] == sum(x.nbytes for x in stored.values())
    # As it is: nothing is quantized, and what is quantized already is left as it is.
    for path, bits in ((source, None), (source, "16"), (directory, None)):
        assert quantized_model(str(path), bits)[1] == path

    copies = [directory]
    (source / "chat_template.jinja").write_text("another")
    copies.append(quantized_model(str(source), "4")[1])
    edit_json(source / "config.json", rope_theta=500000.0)
    copies.append(quantized_model(str(source), "4")[1])
    monkeypatch.setattr("d2c_mlx.phone.quantized.version", lambda package: "another")
    copies.append(quantized_model(str(source), "4")[1])
    assert len(set(copies)) == 4
    model, tokenizer = load(str(copies[-1]))
    assert model.args.rope_theta == 500000.0 and tokenizer.chat_template == "another"


def test_few_bits_are_dequantized_first(tmp_path, monkeypatch):
    """A base that only exists in 4 bits: its 16 bits, and these rounded a second time."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    four = quantized_model(str(tiny_model(tmp_path / "model")), "4")[1]
    _, whole, about = quantized_model(str(four), "16")
    assert about["form"] == "dequantized from 4 bits"
    weight, module = mx.load(str(whole / "model.safetensors")), "model.layers.1.mlp.down_proj"
    packed = mx.load(str(four / "model.safetensors"))
    parts = [packed[f"{module}.{leaf}"] for leaf in ("weight", "scales", "biases")]
    assert mx.array_equal(weight[f"{module}.weight"], mx.dequantize(*parts, 32, 4))
    assert "quantization" not in json.loads((whole / "config.json").read_text())
    _, three, about = quantized_model(str(four), "3")
    assert about["form"] == "dequantized from 4 bits, then quantized by mlx-lm in groups of 32"
    stored = mx.load(str(three / "model.safetensors"))[f"{module}.weight"]
    assert mx.array_equal(stored, mx.quantize(weight[f"{module}.weight"], 32, 3)[0])
    # A recipe of mlx-lm: more bits for some modules.
    mixed = json.loads((quantized_model(str(four), "mixed_3_6")[1] / "config.json").read_text())
    entries = [entry for entry in mixed["quantization"].values() if isinstance(entry, dict)]
    assert {entry["bits"] for entry in entries} == {3, 6}
    assert BITS.issuperset(QUANT_RECIPES)
