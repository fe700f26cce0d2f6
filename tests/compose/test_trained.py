"""What is trained beside a fresh LoRA: a projection on a merge, copies of a LoRA, routing."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from d2c_mlx_methods.trained import (
    adamix_gradient,
    block_weights,
    calibrate,
    fold,
    route,
    train_adamix,
    train_routing,
)
from helpers.loras import dense, lora_of
from peft import PolyConfig, inject_adapter_in_model

from benchmarks.new_task.controls import CONTROLS, route_factors
from d2c_mlx.adapters.adapter import LoRA
from d2c_mlx.compose.methods import as_adapter, as_factors, find_method, mix
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.refine.refine import TrainOptions


def test_a_folded_projection_is_one_that_runs_beside(adapters):
    frozen, rng = as_factors(mix(adapters[:2], [0.5, 0.5], 100)), np.random.default_rng(0)
    projections, beside = {}, {}
    for path, (a, b) in frozen.items():
        kind = f"{path.split('.', 3)[3]} {a.shape[1]} {b.shape[2]}"
        if kind not in projections:
            shapes = (1, a.shape[1], 4), (1, 4, b.shape[2])
            projections[kind] = tuple(mx.array(rng.normal(0, 0.2, s), mx.float32) for s in shapes)
        beside[path] = sum(np.array((x @ y)[0]).T for x, y in ((a, b), projections[kind]))
    assert len(projections) == 2 < len(frozen)
    folded = fold(frozen, projections)
    for path, lora in as_adapter("folded", folded).modules.items():
        # Sums over r + s in one or in two: float32 rounds them apart, no number differs.
        np.testing.assert_allclose(dense(lora), beside[path], atol=1e-5)
        (a, b), (merge_a, merge_b) = folded[path], frozen[path]
        assert (a[:, :, :-4] == merge_a).all() and (b[:, :-4] == merge_b).all()


def test_a_projection_is_trained_on_a_merge_that_stays(new_task, answered, adapters):
    rows = answered(adapters[2])
    merge = mix(adapters[:2], [0.5, 0.5], 3)
    task = replace(new_task, training=TrainOptions(20, 0.02, 10))
    calibrated = calibrate(task, merge, rows, 2)
    losses = new_task.losses([merge, calibrated], rows)
    assert losses[1] < losses[0] - 0.1
    added = {}
    for path, (a, b) in as_factors(merge).items():
        lora = calibrated.modules[path]
        assert lora.rank == merge.modules[path].rank + 2
        assert (lora.a[:, :-2] == a[0]).all() and (lora.b[:-2] == b[0]).all()
        added.setdefault(path.split(".", 3)[3], []).append((lora.a[:, -2:], lora.b[-2:]))
    # One for all layers.
    for (a, b), *others in added.values():
        assert others and all((x == a).all() and (y == b).all() for x, y in others)


def test_one_copy_is_the_lora_itself(new_task, answered, adapters):
    rows, task = answered(adapters[1]), replace(new_task, training=TrainOptions(4, 1e-2))
    alone = task.trained(adapters[0], rows)
    mixed = train_adamix(task, adapters[0], rows, copies=1, consistency=0.0)
    for path, lora in alone.modules.items():
        np.testing.assert_allclose(dense(mixed.modules[path]), dense(lora), atol=1e-5)


def test_the_gradient_of_two_draws_is_that_of_the_dense_formula(new_task, answered, adapters):
    """Over whole logits, differentiated by MLX."""
    base, rows = new_task.base, answered(adapters[1])
    model = Distiller(base)
    some = model.own_rows(rows)[:3]
    rng = np.random.default_rng(0)
    parameters = {
        path: (a + mx.array(rng.normal(0, 0.1, (2, *a.shape[1:])), mx.float32), b)
        for path, (a, b) in as_factors(adapters[0]).items()
    }
    draws = np.array([rng.permutation(2) for _ in parameters]).T
    base.attach(adapters[0])
    found = adamix_gradient(model, parameters, draws, some, 0.7)
    tokens = mx.array([row.example.tokens for row in some])
    first = some[0].example.first_target

    def predicted(values, draw):
        factors = {path: (a[int(i)][None], b) for i, (path, (a, b)) in zip(draw, values.items())}
        with base.replaced_factors([factors[path] for path in base.attached_factors]):
            logits = base.model(tokens)[:, first - 1 : -1]
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def dense_loss(values):
        p, q = (predicted(values, draw) for draw in draws)
        nll = sum(-mx.take_along_axis(x, tokens[:, first:, None], axis=2).mean() for x in (p, q))
        fixed = [mx.stop_gradient(x) for x in (p, q)]
        kl = sum((mx.exp(x) * (x - y)).sum(axis=-1).mean() for x, y in zip(fixed, (q, p)))
        return nll / 2 + 0.7 * kl / 2

    wanted = mx.grad(dense_loss)(parameters)
    for path in parameters:
        for x, y in zip(found[path], wanted[path]):
            np.testing.assert_allclose(np.array(x), np.array(y), atol=2e-5)


RANKS = {"shift": 1, "mean-trained": 4, "routed": 4, "calibrated": 8, "adamix": 4,
         "routed-factors": 4, "fresh-random": 4}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_every_method_makes_one_lora(new_task, answered, adapters, name):
    rows = answered(adapters[0])
    method = CONTROLS.get(name) or find_method(name)
    made = method(new_task, rows, method.choices[0])
    assert made.rank == RANKS[name]
    assert np.isfinite(new_task.losses([made], rows)).all()
    again = method(replace(new_task), rows, method.choices[0])  # nothing is kept
    assert again.digest == made.digest


# Multi-head routing: PEFT's Poly layer on the same weights, and dW by loops


@pytest.mark.parametrize("task", [0, 1])
def test_factors_are_those_of_pefts_poly_layer(task):
    torch.manual_seed(1)
    config = PolyConfig(r=3, n_tasks=2, n_skills=5, n_splits=4, target_modules=["q"])
    linear = torch.nn.Linear(8, 12, bias=False)
    layer = inject_adapter_in_model(config, torch.nn.ModuleDict({"q": linear}))["q"].eval()
    for name, values in layer.named_parameters():
        if "poly_" in name:
            values.data = torch.randn_like(values)
    with torch.no_grad():
        outputs = layer(torch.eye(8)[None], task_ids=torch.tensor([task]))[0]
    # A Poly layer keeps its factors in blocks.
    a, b = (x["default"].detach().numpy() for x in (layer.poly_lora_A, layer.poly_lora_B))
    skills = mx.array(np.concatenate([*a], axis=1)), mx.array(np.concatenate([*b], axis=-1) / 3)
    logits = layer.poly_router["default"].module_logits[task].detach().numpy()
    left, right = route_factors(skills, block_weights(mx.array(logits.reshape(4, 5))))
    expected = (outputs - linear.weight.detach().T).numpy()
    np.testing.assert_allclose(np.array(left @ right), expected, atol=1e-5)


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
