"""Training, choosing and mixing: what is planted is found."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from d2c_mlx_methods.compose import continual_weights, search_weights
from helpers import ROOT
from helpers.loras import P, Q, adapters_of, assert_close, dense, lora_of, truncated
from helpers.losses import plain_loss

from benchmarks.new_task.controls import mix_factors, random_like
from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.compose import Score, choose, compose_adapter, cross_validate, split
from d2c_mlx.compose.methods import METHODS, Method, mix, new_lora, similarity_weights
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
    assert "base" in compose_adapter(new_task, answered(None))[1]["as_good"]


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

    found = search_weights(loss, 3, seed=0, evaluations=200)
    assert np.abs(found - planted).max() < 0.15
    assert len(asked) == 200 and not asked[0].any() and np.abs(asked).max() <= 1.5
    assert (search_weights(loss, 3, seed=0, evaluations=200) == found).all()
    # Where nothing is better than the base model, it stays at it.
    assert not search_weights(lambda weights: 1.0, 3).any()
