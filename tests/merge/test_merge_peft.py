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


MIXED = [["q_proj", "v_proj"], ["q_proj", "down_proj"], ["v_proj", "o_proj", "q_proj"]]


@pytest.mark.parametrize(
    "method, ranks, targets, theirs, rank",
    [
        ("concat", (4, 2, 5), MIXED, "cat", None),
        ("linear", (4, 2, 5), MIXED, "cat", 11),
        # PEFT's svd sums dW and truncates it.
        ("linear", (4, 2, 5), MIXED, "svd", 5),
        # It refuses other ranks, which we pad.
        ("factor-linear", (4, 4, 4), [["q_proj", "v_proj"]] * 3, "linear", None),
        ("factor-linear", (4, 4, 4), MIXED, "linear", None),
    ],
)
def test_a_merge_is_pefts(method, ranks, targets, theirs, rank, tmp_path):
    model = peft_model(ranks, targets)
    model.save_pretrained(tmp_path, selected_adapters=NAMES)
    shapes = {}
    for name in NAMES:
        shapes |= {path: delta.shape[::-1] for path, delta in delta_weights(model, name).items()}
    adapters = [read_adapter(tmp_path / name, shapes) for name in NAMES]
    model.add_weighted_adapter(NAMES, WEIGHTS, "merge", theirs, svd_rank=5)
    merged = merge_adapters(adapters, method, weights=WEIGHTS, rank=rank)
    expected = delta_weights(model, "merge")
    assert set(merged.modules) == set(expected)
    for path, delta in expected.items():
        rtol = 1e-4 if theirs == "svd" else 1e-5  # nearly equal directions
        assert_close(dense(merged.modules[path]), delta, np.linalg.norm(delta), rtol)
