"""Merges against PEFT's own on torch: where PEFT is right, and factor by factor."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.loras import assert_close, dense
from peft import LoraConfig, get_peft_model

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.merge.methods import merge_adapters

NAMES, WEIGHTS = ["two", "one", "three"], [0.7, -0.4, 1.3]
SAME, MIXED = ["qv", "qv", "qv"], ["qv", "qk", "vkq"]


@pytest.mark.parametrize(
    "method, ranks, targets, theirs, rank",
    [
        ("concat", (4, 2, 5), MIXED, "cat", None),
        ("linear", (4, 2, 5), MIXED, "cat", 11),
        # PEFT's svd sums dW and truncates it.
        ("linear", (4, 2, 5), MIXED, "svd", 5),
        # It refuses other ranks, which we pad.
        ("factor-linear", (4, 4, 4), SAME, "linear", None),
        ("factor-linear", (4, 4, 4), MIXED, "linear", None),
    ],
)
def test_a_merge_is_pefts(method, ranks, targets, theirs, rank):
    torch.manual_seed(0)
    linears = {name: torch.nn.Linear(24, n, bias=False) for name, n in zip("qkv", (24, 12, 40))}
    first, *others = (
        LoraConfig(r=r, lora_alpha=alpha, target_modules=[*target], init_lora_weights=False)
        for r, alpha, target in zip(ranks, (9, 3, 16), targets)
    )
    model = get_peft_model(torch.nn.ModuleDict(linears), first, NAMES[0])
    for name, config in zip(NAMES[1:], others):
        model.add_adapter(name, config)
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "scaling")}
    adapters = []
    for name in NAMES:
        modules = {}
        for path, layer in layers.items():
            if name in layer.lora_A:
                a, b = (x[name].weight.detach().numpy().T for x in (layer.lora_A, layer.lora_B))
                modules[path] = LoRA(mx.array(a), mx.array(b), layer.scaling[name])
        adapters.append(Adapter(name, modules))
    model.add_weighted_adapter(NAMES, WEIGHTS, "merge", theirs, svd_rank=5)
    merged = merge_adapters(adapters, method, weights=WEIGHTS, rank=rank)
    assert set(merged.modules) == set(layers)
    for path, layer in layers.items():
        delta = layer.get_delta_weight("merge").detach().numpy()
        rtol = 1e-4 if theirs == "svd" else 1e-5  # nearly equal directions
        assert_close(dense(merged.modules[path]), delta, np.linalg.norm(delta), rtol)
