"""Merges against PEFT's own, on a tiny random model: where PEFT is right, and factor by factor."""

import numpy as np
import pytest
import torch
from helpers.loras import assert_close, dense
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.merge.methods import merge_adapters

NAMES, WEIGHTS = ["one", "three", "two"], [0.7, -0.4, 1.3]


def peft_model(ranks, targets, alphas=(9, 3, 16)):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    configs = [
        LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, r=rank, lora_alpha=alpha,
            target_modules=target,
        )
        for rank, alpha, target in zip(ranks, alphas, targets)
    ]  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), configs[0], adapter_name=NAMES[0])
    for name, config in zip(NAMES[1:], configs[1:]):
        model.add_adapter(name, config)
    return model


def delta_weights(model, name):
    return {
        path.removeprefix("base_model.model."): module.get_delta_weight(name).detach().numpy()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.lora_A
    }


def ours(model, directory):
    model.save_pretrained(directory, selected_adapters=NAMES)
    shapes = {}
    for name in NAMES:
        shapes |= {path: delta.shape[::-1] for path, delta in delta_weights(model, name).items()}
    return [read_adapter(directory / name, shapes) for name in NAMES]


def assert_peft(merged, theirs, rtol=1e-5):
    assert set(merged.modules) == set(theirs)
    for path, delta in theirs.items():
        assert_close(dense(merged.modules[path]), delta, np.linalg.norm(delta), rtol)


MIXED = [["q_proj", "v_proj"], ["q_proj", "down_proj"], ["v_proj", "o_proj", "q_proj"]]


def test_concat_is_peft_cat(tmp_path):
    model = peft_model((4, 2, 5), MIXED)
    adapters = ours(model, tmp_path)
    model.add_weighted_adapter(NAMES, WEIGHTS, "cat", combination_type="cat")
    theirs = delta_weights(model, "cat")
    assert_peft(merge_adapters(adapters, "concat", weights=WEIGHTS), theirs)
    # And linear is its truncation.
    whole = merge_adapters(adapters, "linear", weights=WEIGHTS, rank=11)
    assert_peft(whole, theirs)


@pytest.mark.parametrize("targets", [[["q_proj", "v_proj"]] * 3, MIXED])
def test_factor_linear_is_peft_linear(targets, tmp_path):
    model = peft_model((4, 4, 4), targets)
    adapters = ours(model, tmp_path)
    model.add_weighted_adapter(NAMES, WEIGHTS, "sum", combination_type="linear")
    merged = merge_adapters(adapters, "factor-linear", weights=WEIGHTS)
    assert_peft(merged, delta_weights(model, "sum"))
    # PEFT refuses what we pad.
    with pytest.raises(ValueError, match="same r"):
        peft_model((4, 2, 5), MIXED).add_weighted_adapter(NAMES, WEIGHTS, "x", "linear")


def test_linear_is_peft_svd(tmp_path):
    """PEFT's svd sums dW and truncates it; `assert_close` allows for nearly equal directions."""
    model = peft_model((4, 2, 5), MIXED)
    adapters = ours(model, tmp_path)
    model.add_weighted_adapter(NAMES, WEIGHTS, "svd", combination_type="svd", svd_rank=5)
    merged = merge_adapters(adapters, "linear", weights=WEIGHTS, rank=5)
    assert_peft(merged, delta_weights(model, "svd"), 1e-4)
