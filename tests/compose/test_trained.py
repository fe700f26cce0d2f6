"""What is trained beside a fresh LoRA: a projection on a merge, copies of a LoRA, a shift."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from d2c_mlx_methods.trained import adamix_gradient, calibrate, fold, train_adamix
from helpers.loras import dense
from mlx_lm import load as stock_load

from benchmarks.new_task.controls import CONTROLS
from d2c_mlx.compose.methods import as_adapter, as_factors, find_method, mix
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.refine.refine import TrainOptions

TOKENS = [[5, 9, 3, 17, 8, 30, 2]]


class Beside(nn.Module):
    """A linear module with a merge and a projection beside each other."""

    def __init__(self, linear, merge, projection):
        super().__init__()
        self.linear, self.updates = linear, [merge, projection]

    def __call__(self, x):
        return self.linear(x) + sum((x @ a[0]) @ b[0] for a, b in self.updates)


def test_a_folded_projection_is_one_that_runs_beside(paths, tiny_base, adapters):
    merge = mix(adapters[:2], [0.5, 0.5], 100)
    frozen = as_factors(merge)
    rng = np.random.default_rng(0)
    model, _ = stock_load(str(paths.model))
    model.set_dtype(mx.float32)
    projections, beside = {}, []
    for path, (a, b) in frozen.items():
        kind = f"{path.split('.', 3)[3]} {a.shape[1]} {b.shape[2]}"
        if kind not in projections:
            shapes = (1, a.shape[1], 4), (1, 4, b.shape[2])
            projections[kind] = tuple(mx.array(rng.normal(0, 0.2, s), mx.float32) for s in shapes)
        linear = dict(model.named_modules())[path]
        beside.append((path, Beside(linear, (a, b), projections[kind])))
    assert len(projections) == 2 < len(frozen)
    folded = fold(frozen, projections)
    tiny_base.attach(None)
    bare = np.array(tiny_base.model(mx.array(TOKENS)))
    tiny_base.attach(as_adapter("folded", folded))
    found = np.array(tiny_base.model(mx.array(TOKENS)))
    model.update_modules(nn.utils.tree_unflatten(beside))
    wanted = np.array(model(mx.array(TOKENS)))
    # Sums over r + s in one or in two: float32 rounds them apart, no number differs.
    assert np.abs(wanted - bare).max() > 0.5
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    for path, (a, b) in folded.items():
        assert (a[:, :, :-4] == frozen[path][0]).all() and (b[:, :-4] == frozen[path][1]).all()


def test_a_projection_is_trained_on_a_merge_that_stays(new_task, answered, adapters):
    rows = answered(adapters[2])
    merge = mix(adapters[:2], [0.5, 0.5], 3)
    task = replace(new_task, training=TrainOptions(20, 0.02, 10))
    found = calibrate(task, merge, rows, 2)
    losses = new_task.losses([merge, found], rows)
    assert losses[1] < losses[0] - 0.1
    added = {}
    for path, (a, b) in as_factors(merge).items():
        lora = found.modules[path]
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
