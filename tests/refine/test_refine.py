"""Refining: gradients and divergence against references, what may be touched, what is kept."""

import itertools
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import log_probabilities, refinable
from mlx.utils import tree_flatten

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.models.kernels import use_fast_exponentials
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.refine.refine import Member, TrainOptions, refine, student_of
from d2c_mlx.utils.errors import ModelError

NAMES = ["a", "b"]


@pytest.fixture
def paths(tmp_path):
    return refinable(tmp_path, NAMES)


@pytest.fixture
def base(paths):
    return Model(str(paths.model))


@pytest.fixture
def members(paths, base):
    return [
        Member(
            read_adapter(paths.adapters / name, base.module_shapes),
            base.encode(name, load_task(paths.tasks / name).probe),
            gain=1.0,
        )
        for name in NAMES
    ]


@pytest.fixture
def merged(base, members):
    return merge_adapters([one.adapter for one in members]).uniform(base.dtype)


FAST = TrainOptions(steps=20, rate=5e-3)


def _student(base, merged, member):
    model = Distiller(base)
    rows = model.teacher_rows(member.adapter, member.probe)
    base.attach(merged)
    return model, rows, student_of(merged, base.dtype).start


def test_loss_is_nll_and_divergence_over_the_whole_vocabulary(base, members, merged):
    """Against log-softmax in float64 numpy of the whole model's logits, row by row."""
    model, rows, factors = _student(base, merged, members[0])

    for row in rows:
        example = row.example
        own = log_probabilities(base, members[0].adapter, example)
        q = log_probabilities(base, merged, example)
        targets = list(example.tokens[example.first_target :])
        nll = -q[np.arange(len(targets)), targets]
        divergence = (np.exp(own) * (own - q)).sum(axis=-1)
        assert divergence.max() > 0.01
        assert row.nll == pytest.approx(-own[np.arange(len(targets)), targets].sum(), abs=1e-4)
        for i in range(len(targets)):
            one = np.zeros((len(targets), 2), np.float32)
            one[i] = 2.0, 3.0
            loss = float(model.loss(factors, [row], mx.array(one)))
            assert loss == pytest.approx(2 * nll[i] + 3 * divergence[i], abs=2e-4)


def test_gradient_against_finite_differences(base, members, merged):
    model, rows, factors = _student(base, merged, members[0])
    weights = [(0.7, 1.3)] * len(rows)
    each = mx.array(np.repeat(weights, [r.example.n_targets for r in rows], axis=0), mx.float32)
    gradient = model.gradient(factors, rows, weights)
    rng = np.random.default_rng(0)
    for path, side in itertools.product(factors, (0, 1)):
        step = mx.array(rng.normal(0, 1, factors[path][side].shape), mx.float32)
        step = step / mx.linalg.norm(step)
        expected = float((gradient[path][side] * step).sum())

        def at(t, path=path, side=side, step=step):
            pair = list(factors[path])
            pair[side] = pair[side] + t * step
            return float(model.loss({**factors, path: tuple(pair)}, rows, each))

        found = (at(5e-3) - at(-5e-3)) / 1e-2
        assert found == pytest.approx(expected, rel=2e-2, abs=2e-2)


def test_gradient_through_our_exponentials_is_that_of_stock_mlx_lm(base, members, merged):
    found = []
    for fast in (True, False):
        use_fast_exponentials(base.model, fast)
        model, rows, factors = _student(base, merged, members[0])
        model._fast = fast
        found.append(model.gradient(factors, rows, [(1.0, 1.0)] * len(rows)))
    for ours, stock in zip(*map(tree_flatten, found)):
        assert float(mx.abs(stock[1]).max()) > 0
        np.testing.assert_allclose(ours[1], stock[1], rtol=1e-3, atol=1e-3)


def test_a_gradient_of_small_weights_is_none_of_zeros_in_float16(base, members, merged):
    """As on Metal, and as with many tasks or long answers: against the same in float32."""
    small = 2.0**-20
    found = []
    for dtype, weight in ((mx.float32, 1.0), (mx.float16, small)):
        base.compute_dtype = dtype
        base.model.set_dtype(dtype)
        model, rows, factors = _student(base, merged, members[0])
        gradient = model.gradient(factors, rows, [(weight, weight)] * len(rows))
        found.append(np.concatenate([np.ravel(x) for _, x in tree_flatten(gradient)]))
    exact, rounded = found
    cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
    assert cosine > 0.999
    assert np.linalg.norm(rounded) == pytest.approx(small * np.linalg.norm(exact), rel=0.02)


def test_it_comes_closer_by_what_an_independent_evaluation_measures(base, members, merged):
    """The divergence in float64 numpy, over the whole model's logits."""
    refined = refine(base, merged, members, FAST)
    assert refined.after < 0.8 * refined.before
    for said, adapter in ((refined.before, merged), (refined.after, refined.adapter)):
        found = []
        for one in members:
            own, theirs = (
                np.concatenate(
                    [log_probabilities(base, teacher, row) for row in one.probe.examples]
                )
                for teacher in (one.adapter, adapter)
            )
            found.append((np.exp(own) * (own - theirs)).sum(axis=-1).mean() / one.gain)
        assert np.mean(found) == pytest.approx(said, abs=1e-4)
    assert refined.adapter.rank == merged.rank
    assert {x.dtype for m in refined.adapter.modules.values() for x in (m.a, m.b)} == {base.dtype}


@pytest.mark.parametrize("rate", [1e-12, 1e30])
def test_the_merge_itself_is_kept_when_nothing_helps(base, members, merged, rate):
    refined = refine(base, merged, members, replace(FAST, rate=rate, steps=8))
    assert refined.adapter is merged


def test_tasks_weigh_alike_whatever_their_answers_and_gains(base, members, merged, monkeypatch):
    """Weights times targets sum to one over the gain, for every task."""
    seen = []
    gradient = Distiller.gradient

    def spy(self, factors, rows, weights):
        seen.append([(row.example, w) for row, w in zip(rows, weights)])
        return gradient(self, factors, rows, weights)

    monkeypatch.setattr(Distiller, "gradient", spy)
    members[1] = replace(members[1], gain=0.25)
    refine(base, merged, members, replace(FAST, steps=3))
    for one in members:
        for step in seen:
            mine = [(e.n_targets, w) for e, w in step if e in one.probe.examples]
            assert sum(n * w[1] for n, w in mine) == pytest.approx(0.5 / one.gain)
            assert all(w[0] == 0 for _, w in mine)


def test_every_row_is_trained_on_as_often_as_any_other(base, members, merged, monkeypatch):
    """The merge is fitted to all of them, so none could judge both."""
    trained = Counter()
    gradient = Distiller.gradient

    def spy(self, factors, rows, weights):
        trained.update(row.example for row in rows)
        return gradient(self, factors, rows, weights)

    monkeypatch.setattr(Distiller, "gradient", spy)
    refine(base, merged, members, FAST)
    for one in members:
        times = [trained[row] for row in one.probe.examples]
        assert sum(times) == FAST.steps * FAST.rows and max(times) - min(times) <= 1


def test_one_row_of_a_task_is_trained_on_and_one_member_is_not(base, members, merged):
    few = [
        replace(one, probe=replace(one.probe, examples=one.probe.examples[:1])) for one in members
    ]
    refined = refine(base, merged, few, FAST)
    assert refined.adapter is not merged and refined.after < refined.before
    alone = refine(base, members[0].adapter, members[:1], FAST)
    assert alone.adapter is members[0].adapter and alone.before == alone.after == 0


def test_the_same_seed_gives_the_same_bytes(base, members, merged):
    def digest(adapter, seed=0):
        return refine(base, adapter, members, replace(FAST, seed=seed)).adapter.digest

    other_order = replace(merged, modules=dict(reversed(merged.modules.items())))
    first = digest(merged)
    assert digest(merged) == first == digest(other_order)
    assert digest(merged, seed=1) != first


@pytest.mark.parametrize("bits", [16, 4])
def test_a_base_in_16_or_4_bit_is_refined_in_float32(base, members, merged, bits):
    """As on Metal, where the base keeps its own dtype."""
    base.model.set_dtype(mx.bfloat16)
    base.compute_dtype = mx.bfloat16
    if bits == 4:
        nn.quantize(base.model, group_size=32, bits=4)
    model, rows, factors = _student(base, merged, members[0])
    gradient = model.gradient(factors, rows, [(1.0, 1.0)] * len(rows))
    assert {x.dtype for _, x in tree_flatten(gradient)} == {mx.float32}
    refined = refine(base, merged, members, FAST)
    assert refined.after < refined.before


def test_a_head_that_cannot_be_separated_is_refused(base, members, merged, monkeypatch):
    monkeypatch.setattr("d2c_mlx.evaluate.distill.find_head", lambda model: None)
    with pytest.raises(ModelError, match="scales or caps its logits"):
        refine(base, merged, members, FAST)


def test_a_step_has_rows_of_both_kinds_given_answers_and_own_ones(
    base, members, merged, monkeypatch
):
    own = base.encode("a", [{"prompt": "What is a question?", "completion": "An answer."}])
    one = members[0]
    gradient, steps = Distiller.gradient, []

    def spy(self, factors, rows, weights):
        steps.append({row.example for row in rows})
        return gradient(self, factors, rows, weights)

    monkeypatch.setattr(Distiller, "gradient", spy)
    found = refine(base, merged, [replace(one, own=own), members[1]], FAST)
    for rows in steps:
        assert own.examples[0] in rows and rows & {*one.probe.examples}
    assert found.adapter.digest != refine(base, merged, members, FAST).adapter.digest


def test_what_the_rows_answer_does_not_count_but_their_tokens_do(base, members, merged):
    """A merge whose members agree with the merge is kept, whatever the rows' answers are."""
    same = [replace(one, adapter=merged) for one in members]
    found = refine(base, merged, same, FAST)
    assert found.adapter is merged
    assert found.before == pytest.approx(0, abs=1e-6)
