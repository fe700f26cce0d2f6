"""What the phone benchmark reads: profiles of devices, models that it quantizes, its results."""

import json

import mlx.core as mx
import pytest
from helpers import ROOT
from helpers.tiny import tiny_model
from mlx_lm import load

from d2c_mlx.phone.benchmark import quantized_model
from d2c_mlx.phone.config import find_profile
from d2c_mlx.phone.tables import read_phone
from d2c_mlx.utils.errors import InputError

GOOD = "memory: 2.1GB\n  memory_source: measured\n  storage: 500MB\n  storage_source: store\n"


def test_builtin_profiles():
    for name in ("iphone-6gb", "iphone-8gb", "iphone-12gb", "mac-8gb", "mac-16gb", "android-8gb"):
        _, profile = find_profile(name)
        assert 0 < profile.memory < int(name.split("-")[1].removesuffix("gb")) * 1_000_000_000
        for source in (profile.memory_source, profile.storage_source):
            assert "https://" in source or source.startswith("estimate")


def test_the_profile_in_the_documents_is_one(tmp_path):
    text = (ROOT / "docs" / "how-to" / "ios.md").read_text().split("```yaml\n")[1]
    (tmp_path / "phone.yaml").write_text(text.split("```")[0])
    name, profile = find_profile(str(tmp_path / "phone.yaml"))
    assert (name, profile.memory, profile.storage) == ("my-phone", 2_400_000_000, 500_000_000)


def test_every_problem_of_a_profile_is_told(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("one:\n  memory: 3\n  memory_source: ''\n  ram: 4GB\n  storage: 50%\n")
    with pytest.raises(InputError) as caught:
        find_profile(str(path))
    fields = [line.removeprefix(f"{path}: one: ").split(": ")[0] for line in caught.value.problems]
    assert fields == ["ram", "memory", "memory_source", "storage", "storage_source"]
    assert 'found 3, expected bytes such as "4.2GB"' in str(caught.value)


BAD = [(find_profile, text) for text in
       (None, "a: [", "", "- 1", "a: 5", f"a:\n  {GOOD}b:\n  {GOOD}")]  # fmt: skip
BAD += [(read_phone, text) for text in (None, "{}", "not JSON", '{"format": "d2c-mlx-phone"}')]


@pytest.mark.parametrize("read, text", BAD)
def test_files_that_are_no_profile_and_no_result(tmp_path, read, text):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        read(str(path) if read is find_profile else path)
    (line,) = caught.value.problems
    assert line.startswith(f"{path}: ")


def test_quantizing_is_done_once_by_mlx_lm(tmp_path, monkeypatch):
    """Whatever decides besides the weights gives a copy of its own."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    source = tiny_model(tmp_path / "model")
    name, directory = quantized_model(str(source), 4)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert quantized_model(str(source), 4) == (name, directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    quantization = json.loads((directory / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    module = "model.layers.0.mlp.up_proj"
    whole = mx.load(str(source / "model.safetensors"))[f"{module}.weight"]
    stored = mx.load(str(directory / "model.safetensors"))
    for leaf, expected in zip(("weight", "scales", "biases"), mx.quantize(whole, 32, 4)):
        assert mx.array_equal(stored[f"{module}.{leaf}"], expected)
    # As it is: nothing is quantized, and what is quantized already is left as it is.
    assert quantized_model(str(source), None)[1] == source
    assert quantized_model(str(directory), 4)[1] == directory

    copies = [directory]
    (source / "chat_template.jinja").write_text("another")
    copies.append(quantized_model(str(source), 4)[1])
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0}))
    copies.append(quantized_model(str(source), 4)[1])
    monkeypatch.setattr("d2c_mlx.phone.benchmark.version", lambda package: "another")
    copies.append(quantized_model(str(source), 4)[1])
    assert len(set(copies)) == 4
    model, tokenizer = load(str(copies[-1]))
    assert model.args.rope_theta == 500000.0 and tokenizer.chat_template == "another"
