"""What a task loses under an adapter: how far rows of its own are believed, and what that gives."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.runs import config_of
from helpers.tiny import divergence, library
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import ttest_1samp

from d2c_mlx.compress.plan import plan
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.merge.library import shrinkage
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.examples import Example
from d2c_mlx.pipeline import run


@given(arrays(np.float64, st.integers(2, 12), elements=st.floats(-2, 2, width=16)))
def test_shrinkage_is_what_the_confidence_interval_leaves(shifts):
    found = shrinkage(shifts, [1] * len(shifts))
    if np.ptp(shifts) == 0:
        assert found == (shifts[0] != 0)
        return
    low, high = ttest_1samp(shifts, 0).confidence_interval(0.95)
    mean, half = (low + high) / 2, (high - low) / 2
    expected = max(0.0, 1 - (half / mean) ** 2) if abs(mean) > 1e-12 else 0.0
    assert found == pytest.approx(expected, abs=1e-9)
    # Nothing but the ratio of mean and spread counts.
    assert shrinkage(-3 * shifts, [5] * len(shifts)) == pytest.approx(found, abs=1e-9)


def test_long_rows_weigh_more():
    assert shrinkage(np.array([2.0, 4.0, 6.0]), [1, 2, 3]) == 1


def test_luck_is_hardly_ever_believed_and_few_rows_never():
    draws = np.random.default_rng(0).normal(size=(2000, 10))
    found = np.array([shrinkage(draw, [1] * 10) for draw in draws])
    assert 0.02 < (found > 0).mean() < 0.08 and found.mean() < 0.03
    assert shrinkage(np.array([3.0]), [1]) == 0
    sure = np.array([shrinkage(draw, [1] * 10) for draw in draws + 4])
    assert sure.mean() > 0.9


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Two adapters of rank 4 on a tiny model, with their probes; ten rows each."""
    root = tmp_path_factory.mktemp("expected")
    paths = library(root, ["a", "b"])
    config = config_of(paths, root / "run", budget="60%", probe_examples=4, test_examples=2)
    return run(config, until="probe", quiet=True)


def answered(base, adapter, probe, seed):
    """Ten rows of the probe's prompts, their answers drawn from what the adapter says."""
    rng = np.random.default_rng(seed)
    base.attach(adapter)
    rows = []
    for one in itertools.islice(itertools.cycle(probe.examples), 10):
        tokens = list(one.tokens[: one.offset])
        tokens[-1] = int(rng.integers(3, 300))
        for _ in range(12):
            logits = base.model(mx.array([tokens]))[0, -1].astype(mx.float32)
            noise = rng.gumbel(size=logits.size)
            tokens.append(int(np.argmax(np.array(logits, np.float64) + noise)))
        rows.append(Example(tuple(tokens), one.offset))
    return replace(probe, examples=tuple(rows), cuts=())


@pytest.fixture(scope="module")
def rows_of(session):
    """`rows_of(seed)`: such rows of every adapter."""

    def make(seed):
        pairs = zip(session.library.adapters, session.library.calibration)
        return [answered(session.library.base, *pair, seed) for pair in pairs]

    return make


def library_of(session, adapters, sets):
    tasks = [replace(task, calibration=rows) for task, rows in zip(session.library.tasks, sets)]
    return replace(session.library, adapters=adapters, tasks=tasks)


def test_rows_that_say_weaker_are_believed(session, rows_of):
    """The adapters are twice as strong as what answered their rows."""
    strong = [scaled(adapter, 2.0) for adapter in session.library.adapters]
    taught = library_of(session, strong, rows_of(0)).by_teacher
    for i, trust in enumerate(taught.trust):
        assert 0.3 < trust < 1
        own, weaker = (
            float(taught.regrets(each[i], [i])[0]) for each in (strong, session.library.adapters)
        )
        assert own == pytest.approx(0, abs=1e-4) and weaker < -0.01


def test_a_teacher_regret_is_never_below_minus_1(session):
    gain = session.library.losses.gain
    losses = session.library.by_teacher.losses
    assert losses.regret(gain * [0.5, -3], np.arange(2)) == pytest.approx([0.5, -1])


@pytest.mark.slow
def test_forms_are_stored_weaker_where_rows_say_so(session, rows_of, tmp_path):
    """Scales below 1 are tried for such adapters, and for no others."""

    def forms(adapters, sets):
        library = library_of(session, adapters, sets)
        planned = plan(library, session.capacity, tmp_path, session.config.merging)
        trust = dict(zip(library.names, library.by_teacher.trust))
        assert planned.content["trust"] == {name: x for name, x in trust.items() if x}
        return zip(*((x.scale, x.regret) for x in planned.chosen if x.family == "own"))

    scales, _ = forms(session.library.adapters, rows_of(1))
    assert min(scales) >= 1
    scales, regrets = forms([scaled(x, 2.0) for x in session.library.adapters], rows_of(0))
    assert min(scales) < 1 and min(regrets) < 0


def test_rows_as_the_adapter_expects_have_no_say(session, rows_of):
    taught = library_of(session, session.library.adapters, rows_of(1)).by_teacher
    assert taught.trust == [0, 0]
    digests = [adapter.digest for adapter in session.library.adapters]
    assert [rows.teacher for rows in taught.calibration] == digests


@pytest.mark.parametrize("trust", [0.0, 0.4, 1.0])
def test_a_trusted_row_enters_by_its_weight(session, trust):
    """Against rows of logits in float64; another weight is another set."""
    base, (one, other), probe = (
        session.library.base,
        session.library.adapters,
        session.library.calibration[0],
    )
    model = Distiller(base)
    some = model.with_teacher(one, probe, trust)
    (found,) = session.library.scorer.losses([(other, [some])])
    rows = model.compare(other, model.teacher_rows(one, probe))
    nll = [sum(session.library.scorer.losses([(adapter, [probe])])[0]) for adapter in (one, other)]
    assert rows[:, 0].sum() / probe.n_targets == pytest.approx(nll[1] - nll[0], abs=1e-4)
    kl = divergence(base, one, other, probe)
    assert rows[:, 1].sum() == pytest.approx(kl, abs=1e-3)
    expected = (1 - trust) * kl / probe.n_targets + trust * (nll[1] - nll[0])
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert model.divergence(other, model.teacher_rows(one, probe)) == pytest.approx(
        kl / probe.n_targets, abs=1e-4
    )
    assert len({some.digest, model.with_teacher(one, probe, trust + 0.1).digest, probe.digest}) == 3
