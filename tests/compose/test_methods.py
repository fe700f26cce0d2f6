"""Ways to compose on a tiny model: choosing, mixing, and what is trained beside a fresh LoRA."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from d2c_mlx_methods.compose import continual_weights, search_weights
from d2c_mlx_methods.trained import (
    adamix_gradient,
    block_weights,
    calibrate,
    route,
    train_adamix,
    train_routing,
)
from helpers import ROOT
from helpers.loras import P, Q, adapters_of, assert_close, dense, lora_of, truncated
from helpers.losses import plain_loss
from peft import PolyConfig, inject_adapter_in_model

from benchmarks.new_task.controls import CONTROLS, mix_factors, random_like, route_factors
from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compose.compose import Score, choose, compose_adapter, cross_validate, split
from d2c_mlx.compose.methods import (
    METHODS,
    Method,
    as_factors,
    find_method,
    mix,
    new_lora,
    similarity_weights,
)
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.merge.methods import scaled
from d2c_mlx.plugins import COMPOSE_METHODS, names
from d2c_mlx.refine.refine import TrainOptions


def mean_nll(base, adapter, rows):
    return plain_loss(base, adapter, rows) / rows.n_targets


def test_auto_has_at_most_eight_candidates_and_the_page_all_methods():
    assert len(METHODS) <= 8
    page = (ROOT / "docs" / "how-to" / "new-task.md").read_text(encoding="utf-8")
    assert not [name for name in (*METHODS, *names(COMPOSE_METHODS)) if f"`{name}`" not in page]


def test_a_planted_adapter_is_chosen(new_task, answered, adapters):
    adapter, about = compose_adapter(new_task, answered(adapters[1]))
    assert (about["method"], about["choice"]) == ("best", "b")
    assert adapter.digest == adapters[1].uniform(new_task.base.dtype).digest
    assert adapter.name == "new" and about["as_good"] == []
    assert about["candidates"]["base"]["ahead"] > about["candidates"]["base"]["error"]
    # Where the base model is as good, that is told.
    fresh, about = compose_adapter(new_task, answered(None), "fresh")
    assert fresh.base == "tiny/llama" and "base" in about["as_good"]


def test_no_fold_chooses_for_itself(new_task, answered, adapters):
    """Against a loop over folds that asks the model row by row."""
    rows, seen = answered(adapters[2]), []

    def make(task, train, choice):
        seen.append((choice, {example.tokens for example in train.examples}))
        return scaled(task.library[2], choice)

    choices = (0.25, 0.5, 1.0, 2.0)
    folds = split(rows, seed=3)
    assert [len(fold.examples) for fold in folds] == [2] * 5
    score = cross_validate(new_task, {"m": Method(make, choices)}, folds)["m"]
    table = np.array([
        [mean_nll(new_task.base, scaled(adapters[2], c), fold) for c in choices]
        for fold in folds
    ])  # fmt: skip
    n = np.array([fold.n_targets for fold in folds])
    for k in range(len(folds)):
        others = np.delete(table, k, axis=0).T @ np.delete(n, k)
        assert score.losses[k] == pytest.approx(table[k, others.argmin()], abs=1e-4)
    assert score.choice == choices[(table.T @ n).argmin()]
    assert score.loss == pytest.approx(score.losses @ n / n.sum())
    held_back = [{example.tokens for example in fold.examples} for fold in folds for _ in choices]
    for (_, learned), held in zip(seen, held_back, strict=True):
        assert not learned & held and len(learned) + len(held) == 10


def test_the_simplest_within_a_standard_error_is_taken():
    n = np.full(5, 10)
    lowest = np.array([1.0, 1.2, 0.9, 1.1, 1.0])
    noise = np.array([0.1, -0.09, 0.1, -0.1, 0.02])
    scores = {
        "base": Score(lowest, n),
        "worse": Score(lowest + 0.2 + noise / 10, n),
        "simple": Score(lowest + noise, n),
        "lowest": Score(lowest, n),
    }
    assert choose(scores) == "simple"
    del scores["simple"]
    assert choose(scores) == "lowest"
    mean, error = Score(lowest + noise, n).minus(scores["lowest"])
    assert mean == pytest.approx(noise.mean())
    assert error == pytest.approx(noise.std(ddof=1) / np.sqrt(5))


def test_training_lowers_the_loss_of_its_rows_and_repeats_to_the_byte(new_task, answered, adapters):
    base, rows = new_task.base, answered(adapters[0])
    shapes = {path: lora.shape for path, lora in adapters[0].modules.items()}
    start = new_lora("new", shapes, 4, seed=1)
    bare, options = mean_nll(base, None, rows), TrainOptions(12, 1e-2, 4)
    assert mean_nll(base, start, rows) == pytest.approx(bare, abs=1e-6)
    first, again = (replace(new_task, training=options).trained(start, rows) for _ in range(2))
    assert mean_nll(base, first, rows) < bare - 0.5
    assert first.digest == again.digest


def test_a_mix_is_made_once_and_tells_of_what(new_task, adapters, answered):
    task, rows = replace(new_task), answered(adapters[1])
    merged = METHODS["uniform"](task, rows, 1.0)
    assert merged.digest == mix(adapters, [1 / 3] * 3, task.rank).digest
    assert merged.sources == ("a", "b", "c")
    assert METHODS["uniform"](task, split(rows)[0], 1.0) is merged


# Mixes against dense sums, and weights against their formulas

SHAPES = {P: (7, 9), Q: (5, 6)}


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [1.5, -0.7, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("rank", [2, 40])
def test_a_mix_is_the_dense_sum_in_its_rank(weights, rank):
    adapters = adapters_of(np.random.default_rng(0), 3, SHAPES, dtypes=(mx.float32,))
    mixed = mix(adapters, weights, rank)
    for path, shape in SHAPES.items():
        pairs = [(w, adapter.modules.get(path)) for w, adapter in zip(weights, adapters)]
        updates = [w * dense(lora) for w, lora in pairs if lora]
        expected = truncated(sum(updates), rank)
        got = dense(mixed.modules[path]) if path in mixed.modules else np.zeros(shape[::-1])
        assert_close(got, expected, max(1.0, np.linalg.norm(expected)))


def test_controls_mix_factors_apart_and_values_at_random():
    rng = np.random.default_rng(1)
    adapters = [Adapter(n, {P: lora_of(rng, SHAPES[P], 3, 0.5)}) for n in "xyz"]
    weights = [0.4, -1.2, 0.9]
    pairs = [[np.array(f, np.float64) for f in each.modules[P].factors()] for each in adapters]
    a, b = (sum(w * pair[k] for w, pair in zip(weights, pairs)) for k in (0, 1))
    assert_close(dense(mix_factors(adapters, weights).modules[P]), (a @ b).T, 1.0)
    large = Adapter("large", {P: lora_of(rng, (60, 50), 3, 0.5)})
    other = random_like(large, 1)
    old, new = dense(large.modules[P]), dense(other.modules[P])
    assert np.linalg.norm(new) == pytest.approx(np.linalg.norm(old), rel=1e-4)
    assert abs((old * new).sum()) < 0.1 * np.linalg.norm(old) ** 2


def test_the_nearest_tasks_share_the_weight():
    similarity = np.array([0.1, 0.9, 0.5, 0.7, -1.0])
    each = np.exp(np.array([0.9, 0.7, 0.5]) / 0.2)
    np.testing.assert_allclose(
        similarity_weights(similarity)[[1, 3, 2, 0, 4]], [*(each / each.sum()), 0, 0]
    )
    assert similarity_weights(np.array([-0.5])) == [1.0]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_continual_weights_are_those_of_merging_one_by_one(n):
    updates = np.random.default_rng(n).normal(size=(n, 4))
    merged = updates[0]
    for update in updates[1:]:
        merged = (merged + update) / 2
    if n > 1:
        np.testing.assert_allclose(continual_weights(n) @ updates, merged)
    assert continual_weights(n).sum() == pytest.approx(1)


def test_the_search_finds_a_planted_mix_and_counts_its_questions():
    planted, asked = np.array([1.0, 0.0, -0.5]), []

    def loss(weights):
        asked.append(weights.copy())
        return float(((weights - planted) ** 2).sum())

    weights = search_weights(loss, 3, seed=0, evaluations=200)
    assert np.abs(weights - planted).max() < 0.15
    assert len(asked) == 200 and not asked[0].any() and np.abs(asked).max() <= 1.5
    assert (search_weights(loss, 3, seed=0, evaluations=200) == weights).all()
    # Where nothing is better than the base model, it stays at it.
    assert not search_weights(lambda weights: 1.0, 3).any()


# Trained methods: a projection on a merge, copies of a LoRA, routing


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
    own = model.own_rows(rows)[:3]
    rng = np.random.default_rng(0)
    parameters = {
        path: (a + mx.array(rng.normal(0, 0.1, (2, *a.shape[1:])), mx.float32), b)
        for path, (a, b) in as_factors(adapters[0]).items()
    }
    draws = np.array([rng.permutation(2) for _ in parameters]).T
    base.attach(adapters[0])
    gradient = adamix_gradient(model, parameters, draws, own, 0.7)
    tokens = mx.array([row.example.tokens for row in own])
    first = own[0].example.first_target

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
        for x, y in zip(gradient[path], wanted[path]):
            np.testing.assert_allclose(np.array(x), np.array(y), atol=2e-5)


RANKS = {"shift": 1, "mean-trained": 4, "routed": 4, "calibrated": 8, "adamix": 4,
         "routed-factors": 4, "fresh-random": 4}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_every_method_makes_one_lora(new_task, answered, adapters, name):
    rows = answered(adapters[0])
    method = CONTROLS.get(name) or find_method(name)
    adapter = method(new_task, rows, method.choices[0])
    assert adapter.rank == RANKS[name]
    assert np.isfinite(new_task.losses([adapter], rows)).all()
    again = method(replace(new_task), rows, method.choices[0])  # nothing is kept
    assert again.digest == adapter.digest


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
