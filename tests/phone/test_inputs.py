"""What the phone benchmark reads: profiles of devices, models that it quantizes, its results."""

import json

import mlx.core as mx
import pytest
from helpers import ROOT
from helpers.tiny import library, tiny_model
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
    text = (ROOT / "docs" / "how-to" / "ios.md").read_text()
    path = tmp_path / "phone.yaml"
    path.write_text(text.split("```yaml\n")[1].split("```")[0])
    name, profile = find_profile(str(path))
    assert (name, profile.memory, profile.storage) == ("my-phone", 2_400_000_000, 500_000_000)


def test_every_problem_of_a_profile_is_told(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("one:\n  memory: 3\n  memory_source: ''\n  ram: 4GB\n  storage: 50%\n")
    with pytest.raises(InputError) as caught:
        find_profile(str(path))
    fields = [line.removeprefix(f"{path}: one: ").split(": ")[0] for line in caught.value.problems]
    assert fields == ["ram", "memory", "memory_source", "storage", "storage_source"]
    assert 'found 3, expected bytes such as "4.2GB"' in str(caught.value)


@pytest.mark.parametrize(
    "read, text",
    [
        *(
            (find_profile, x)
            for x in (None, "a: [", "", "- 1", "a: 5", f"a:\n  {GOOD}b:\n  {GOOD}")
        ),
        *((read_phone, x) for x in (None, "{}", "not JSON", "[]", '{"format": "d2c-mlx-phone"}')),
    ],
)
def test_files_that_are_no_profile_and_no_result(tmp_path, read, text):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        read(str(path) if read is find_profile else path)
    (line,) = caught.value.problems
    assert caught.value.exit_code == 2 and line.startswith(f"{path}: ")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("quantized"), ["a", "b"])


def test_quantizing_is_done_once_by_mlx_lm(paths):
    name, directory = quantized_model(str(paths.model), 4)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert quantized_model(str(paths.model), 4) == (name, directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    config = json.loads((directory / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (4, 32)
    whole = mx.load(str(paths.model / "model.safetensors"))["model.layers.0.mlp.up_proj.weight"]
    stored = mx.load(str(directory / "model.safetensors"))
    for leaf, expected in zip(("weight", "scales", "biases"), mx.quantize(whole, 32, 4)):
        assert mx.array_equal(stored[f"model.layers.0.mlp.up_proj.{leaf}"], expected)
    # As it is: nothing is quantized, and what is quantized already is left as it is.
    assert quantized_model(str(paths.model), None)[1] == paths.model
    assert quantized_model(str(directory), 4)[1] == directory


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", ""])
def test_what_decides_besides_the_weights_is_a_copy_of_its_own(tmp_path, monkeypatch, name):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    source = tiny_model(tmp_path / "model")
    _, before = quantized_model(str(source), 4)
    assert quantized_model(str(source), 4)[1] == before
    if not name:
        monkeypatch.setattr("d2c_mlx.phone.benchmark.version", lambda package: "another")
    elif name == "config.json":
        config = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps(config | {"rope_theta": 500000.0}))
    else:
        (source / name).write_text("another")
    _, after = quantized_model(str(source), 4)
    assert after != before
    model, tokenizer = load(str(after))
    assert (model.args.rope_theta == 500000.0) == (name == "config.json")
    assert (tokenizer.chat_template == "another") == (name == "chat_template.jinja")
