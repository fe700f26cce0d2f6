"""Multi-head routing: PEFT's Poly layer on the same weights, dW by loops, and training."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from d2c_mlx_methods.trained import block_weights, route, train_routing
from helpers.loras import dense, lora_of
from peft import PolyConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.new_task.controls import route_factors
from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.refine.refine import TrainOptions

RANK, SKILLS, BLOCKS = 3, 5, 4
TOKENS = [[5, 9, 3, 17, 8, 30, 2]]


@pytest.fixture(scope="module")
def poly(paths):
    """PEFT's model with Poly layers of random values, and its path -> layer."""
    torch.manual_seed(1)
    stock = AutoModelForCausalLM.from_pretrained(paths.model, dtype=torch.float32)
    config = PolyConfig(task_type="CAUSAL_LM", r=RANK, n_tasks=2, n_skills=SKILLS, n_splits=BLOCKS,
                        target_modules=["q_proj", "v_proj", "down_proj"])  # fmt: skip
    model = get_peft_model(stock, config).eval()
    for name, values in model.named_parameters():
        if "poly_" in name:
            values.data = torch.randn_like(values) * (1.0 if "logits" in name else 0.3)
    layers = {name.removeprefix("base_model.model."): one
              for name, one in model.named_modules() if hasattr(one, "poly_lora_A")}  # fmt: skip
    return model, layers


def skills_of(layer):
    """a `(s, in, r)` and b `(s, r, out)` of a Poly layer, which keeps them in blocks."""
    a = layer.poly_lora_A["default"].detach().numpy()
    b = layer.poly_lora_B["default"].detach().numpy()
    a = np.concatenate(list(a), axis=1)
    b = np.concatenate(list(b), axis=-1) / RANK
    return mx.array(a), mx.array(b)


@pytest.mark.parametrize("task", [0, 1])
def test_factors_are_those_of_pefts_poly_layer(poly, tiny_base, task):
    model, layers = poly
    modules = {}
    for path, layer in layers.items():
        logits = layer.poly_router["default"].module_logits[task].detach().numpy()
        weights = block_weights(mx.array(logits.reshape(BLOCKS, SKILLS)))
        modules[path] = LoRA(*route_factors(skills_of(layer), weights))
    tiny_base.attach(Adapter("poly", modules))
    ours = np.array(tiny_base.model(mx.array(TOKENS)))
    with torch.no_grad():
        given = {"input_ids": torch.tensor(TOKENS), "task_ids": torch.tensor([task])}
        theirs = model(**given).logits.numpy()
        with model.disable_adapter():
            bare = model(**given).logits.numpy()
    assert np.abs(theirs - bare).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_every_block_of_an_update_has_the_root_of_its_two_weights():
    rng, width = np.random.default_rng(0), 3
    loras = [lora_of(rng, (8, 12), rank) for rank in (3, 1, 2)]
    updates = [dense(lora) for lora in loras]
    a = mx.stack([mx.pad(lora.a, [(0, 0), (0, width - lora.rank)]) for lora in loras])
    b = mx.stack([mx.pad(lora.b, [(0, width - lora.rank), (0, 0)]) for lora in loras])
    weights = rng.random((4, 3))
    routed = dense(LoRA(*route((a, b), mx.array(weights, mx.float32))))
    for i, j in np.ndindex(12, 8):
        both = np.sqrt(weights[i // 3] * weights[j // 2])
        assert routed[i, j] == pytest.approx(sum(both * [x[i, j] for x in updates]), abs=1e-4)


@pytest.mark.parametrize("how", [route, route_factors])
def test_training_finds_the_skill_that_the_rows_need(adapters, answered, new_task, how):
    rows = answered(adapters[1])
    task = replace(new_task, training=TrainOptions(15, 0.3, 10))
    routed = train_routing(task, adapters, rows, how, None)
    assert routed.rank == adapters[0].rank * (3 if how is route else 1)
    start = train_routing(new_task, adapters, rows, how, 1e-9)
    losses = new_task.losses([start, routed, adapters[1]], rows)
    assert losses[1] < losses[0] - 0.3 * (losses[0] - losses[2])
