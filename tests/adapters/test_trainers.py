"""Adapters as trainers write them: their own fields and values, over tiny tensors.

Fields are those of unsloth 2026.10, llamafactory 0.9.5, axolotl 0.19, torchtune 0.6.1, mlx-tune
0.6.0, mlx-lm-lora 5.10.2, the PEFT that is installed and the versions of mlx-lm that are named.
"""

import json
import math
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import ALL, Gpu, library, peft_adapter, quantized
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.tuner.utils import linear_to_lora_layers
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from d2c_mlx.adapters.checks import DoraBase
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.adapters.tensor_file import left_in_file
from d2c_mlx.models.model import Model
from d2c_mlx.utils.errors import AdapterError

# What PEFT itself writes, whoever calls it.
PEFT = LoraConfig(
    r=4, lora_alpha=8, lora_dropout=0.05, task_type="CAUSAL_LM", inference_mode=True,
    base_model_name_or_path="meta-llama/Llama-3.2-1B-Instruct",
).to_dict() | {"target_modules": ["v_proj", "q_proj"]}  # fmt: skip
UNSLOTH = {
    **PEFT, "lora_alpha": 16, "lora_dropout": 0, "loftq_config": None,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn).*?(?:q_proj|v_proj).*?)",
}  # fmt: skip
TORCHTUNE = {
    "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA",
    "base_model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct",
}  # fmt: skip
# Trainer -> (its config, scale, or words of the refusal).
PEFT_TRAINERS = {
    "Unsloth": (UNSLOTH, 4.0),
    "LLaMA-Factory": ({**PEFT, "use_rslora": True}, 8 / math.sqrt(4)),
    "LLaMA-Factory, PiSSA": ({**PEFT, "init_lora_weights": "pissa_niter_16"}, "path_initial_model"),
    "LLaMA-Factory, new tokens": ({**PEFT, "modules_to_save": ["lm_head"]}, "modules_to_save is"),
    "axolotl": ({**PEFT, "target_parameters": [], "fan_in_fan_out": None}, 2.0),
    "torchtune": (TORCHTUNE, 2.0),
}
MLX_LM = {
    "adapter_path": "adapters", "data": "data/", "iters": 1000, "learning_rate": 1e-5,
    "lr_schedule": None, "max_seq_length": 2048, "model": "mlx-community/m", "seed": 0,
    "resume_adapter_file": None, "num_layers": 16, "test": False, "train": True,
}  # fmt: skip
OLD = {**MLX_LM, "lora_parameters": {"rank": 4, "alpha": 16, "dropout": 0.0, "scale": 10.0}}
PLAIN = {"rank": 4, "dropout": 0.0, "scale": 20.0}
NEW = {**MLX_LM, "fine_tune_type": "lora", "optimizer": "adam", "lora_parameters": PLAIN}
KEYS = {"rank": 4, "scale": 4.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
MLX_TRAINERS = {
    "mlx-lm 0.10": ({**OLD, "lora_layers": 16}, 10.0),
    "mlx-lm 0.16, DoRA": ({**OLD, "use_dora": True}, "--accept-dora RANK"),
    "mlx-lm 0.32": (NEW, 20.0),
    "mlx-lm 0.32, full": ({**NEW, "fine_tune_type": "full"}, "only a plain LoRA"),
    "mlx-tune": ({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": KEYS}, 4.0),
    # It tells what it trained among the parameters, and no base.
    "mlx-lm-lora": ({"lora_parameters": {**PLAIN, "use_dora": False}, "num_layers": -1}, 20.0),
    "mlx-lm-lora, DoRA": ({"lora_parameters": {**PLAIN, "use_dora": True}}, "--accept-dora RANK"),
}


@pytest.mark.parametrize("trainer", [*PEFT_TRAINERS, *MLX_TRAINERS])
def test_what_a_trainer_writes_has_its_scale_or_is_refused(tmp_path, trainer):
    config, expected = {**PEFT_TRAINERS, **MLX_TRAINERS}[trainer]
    path = peft_adapter(tmp_path, "a")
    if trainer in MLX_TRAINERS:
        read_adapter(path, ALL).save(tmp_path / "mlx", 2)
        path = tmp_path / "mlx"
    (path / "adapter_config.json").write_text(json.dumps(config))
    if isinstance(expected, str):
        with pytest.raises(AdapterError, match=expected) as caught:
            read_adapter(path, ALL)
        assert len(caught.value.problems) == 1
        return
    adapter = read_adapter(path, ALL)
    assert {lora.scale for lora in adapter.modules.values()} == {expected}
    named = config.get("base_model_name_or_path") or config.get("model")
    assert (len(adapter.modules), adapter.rank, adapter.base) == (4, 4, named)


# Transformers since 4.52 and before, Idefics 3 and SmolVLM; mlx-lm's vision-language models.
@pytest.mark.parametrize("there", ["model.language_model", "language_model.model",
                                   "model.text_model", "model"])  # fmt: skip
@pytest.mark.parametrize("here", ["model", "language_model.model"])
def test_the_text_model_of_a_vision_language_model(tmp_path, here, there):
    pattern = {rf"{re.escape(there)}.layers.1.*": 3}
    path = peft_adapter(tmp_path, "a", alpha_pattern=pattern)
    file = path / "adapter_model.safetensors"
    moved = {k.replace(".model.layers", f".{there}.layers"): x for k, x in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    named = {name: f"{here}.{name.removeprefix('model.')}" for name in ALL}
    shapes = {named[name]: shape for name, shape in ALL.items()}
    adapter = left_in_file(read_adapter(path, shapes), path)
    plain = read_adapter(peft_adapter(tmp_path, "b", alpha_pattern={r".*layers.1.*": 3}), ALL)
    assert {named[name] for name in plain.modules} == set(adapter.modules)
    for name, lora in plain.modules.items():
        other = adapter.modules[named[name]]
        assert lora.scale == other.scale == (0.75 if ".1." in name else 2)
        assert mx.array_equal(lora.a, other.a) and mx.array_equal(lora.b, other.b)


# DoRAs as LoRAs against stock mlx-lm; PEFT's are in test_families

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
    whole, less = (
        read_adapter(paths.adapters / "a", base.module_shapes, dora=DoraBase(base.weight, rank))
        for rank in (32, 8)
    )
    assert (whole.rank, less.rank) == (32, 8) and whole.dora_error < 1e-5 < less.dora_error < 1
    base.attach(whole)
    np.testing.assert_allclose(logits(base.model), logits(stock), rtol=0, atol=1e-5)


def test_on_a_quantized_base_one_module_at_a_time_is_dequantized(paths, tmp_path, monkeypatch):
    small = str(quantized(paths.model, tmp_path / "small"))
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
