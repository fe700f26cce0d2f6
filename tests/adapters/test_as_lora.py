"""DoRAs as LoRAs against stock mlx-lm; PEFT's are in test_families."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import Gpu, library
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load, quantize_model, save

from d2c_mlx.adapters.checks import DoraBase
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.model import Model
from d2c_mlx.utils.errors import AdapterError

TOKENS = mx.array([[3, 14, 15, 92, 65, 35]])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A tiny library; the adapter a is a DoRA that mlx-lm made, trained by chance."""
    paths = library(tmp_path_factory.mktemp("dora"), ("a", "b"))
    shutil.rmtree(paths.adapters / "a")
    dora(paths.model, paths.adapters / "a")
    return paths


def dora(model, directory):
    """Save a DoRA as mlx-lm does."""
    directory.mkdir(exist_ok=True)
    loaded, _ = stock_load(str(model))
    loaded.freeze()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(loaded, 2, parameters, use_dora=True)
    mx.random.seed(0)
    tensors = {
        name: x * (1 + 0.1 * mx.random.normal(x.shape)) if name.endswith(".m")
        else 0.1 * mx.random.normal(x.shape)
        for name, x in tree_flatten(loaded.trainable_parameters())
    }  # fmt: skip
    mx.save_safetensors(str(directory / "adapters.safetensors"), tensors)
    config = {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))


def test_a_dora_of_mlx_lm_at_full_rank_is_the_dora(paths):
    base = Model(str(paths.model))
    stock, _ = stock_load(str(paths.model), adapter_path=str(paths.adapters / "a"))
    stock.set_dtype(mx.float32)
    expected, errors = logits(stock), []
    for rank in (32, 8, 4):
        dora = DoraBase(base.weight, rank)
        adapter = read_adapter(paths.adapters / "a", base.module_shapes, dora=dora)
        assert adapter.rank == rank
        base.attach(adapter)
        difference = np.abs(logits(base.model) - expected).max()
        assert (difference < 1e-5 * np.abs(expected).max()) == (rank == 32)
        errors.append(adapter.dora_error)
    assert errors[0] < 1e-5 < errors[1] < errors[2] < 1


def test_on_a_quantized_base_one_module_at_a_time_is_dequantized(paths, tmp_path, monkeypatch):
    loaded, tokenizer, config = load(str(paths.model), return_config=True)
    loaded, config = quantize_model(loaded, config, group_size=32, bits=4)
    save(tmp_path / "small", str(paths.model), loaded, tokenizer, config)
    small = str(tmp_path / "small")
    dora(small, tmp_path / "a")
    monkeypatch.setattr(mx, "default_device", Gpu)  # By name: weights stay as they are stored.
    base, path = Model(small), "model.layers.1.mlp.up_proj"
    assert isinstance(dict(base.model.named_modules())[path], nn.QuantizedLinear)
    whole = DoraBase(base.weight, 32)
    base.attach(read_adapter(tmp_path / "a", base.module_shapes, dora=whole))
    assert base.weight(path).shape == (64, 32)
    expected = logits(stock_load(small, adapter_path=str(tmp_path / "a"))[0])
    # In 16 bit.
    assert np.abs(logits(base.model) - expected).max() < 1e-2 * np.abs(expected).max()


def test_convert_tells_what_is_lost(paths, tmp_path, command):
    options = ["--model", paths.model, "--adapters", paths.adapters]
    code, out, _ = command("convert", *options, "--accept-dora", 8, "--output", tmp_path / "out")
    lossy, exact, _ = out.splitlines()
    assert code == 0 and 0 < float(lossy.rpartition(" ")[2]) < 1
    assert "relative error of dW" in lossy and "error" not in exact
    assert read_adapter(tmp_path / "out" / "a").rank == 8


@pytest.mark.parametrize("module", ["up_proj", "nope"])
def test_a_dora_without_its_magnitudes(paths, tmp_path, module):
    tensors = mx.load(str(paths.adapters / "a" / "adapters.safetensors"))
    tensors[f"model.layers.0.mlp.{module}.m"] = mx.ones((3,))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    shutil.copy(paths.adapters / "a" / "adapter_config.json", tmp_path)
    whole = DoraBase(lambda path: None, 4)
    with pytest.raises(AdapterError, match=r"mlp\.\w+: found ") as caught:
        read_adapter(tmp_path, dora=whole)
    assert len(caught.value.problems) == 1
    other = dict.fromkeys(Model(str(paths.model)).module_shapes, (48, 32))
    with pytest.raises(AdapterError, match="shape of another base model"):
        read_adapter(paths.adapters / "a", other, dora=whole)
