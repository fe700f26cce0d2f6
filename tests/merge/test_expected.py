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
    share = shrinkage(shifts, [1] * len(shifts))
    if np.ptp(shifts) == 0:
        assert share == (shifts[0] != 0)
        return
    low, high = ttest_1samp(shifts, 0).confidence_interval(0.95)
    mean, half = (low + high) / 2, (high - low) / 2
    expected = max(0.0, 1 - (half / mean) ** 2) if abs(mean) > 1e-12 else 0.0
    assert share == pytest.approx(expected, abs=1e-9)
    # Nothing but the ratio of mean and spread counts.
    assert shrinkage(-3 * shifts, [5] * len(shifts)) == pytest.approx(share, abs=1e-9)


def test_long_rows_weigh_more_and_a_single_one_nothing():
    assert shrinkage(np.array([2.0, 4.0, 6.0]), [1, 2, 3]) == 1
    assert shrinkage(np.array([3.0]), [1]) == 0


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Two adapters of rank 4 on a tiny model, with their probes; ten rows each."""
    root = tmp_path_factory.mktemp("expected")
    paths = library(root, ["a", "b"])
    config = config_of(paths, root / "run", budget="60%", probe_examples=4, test_examples=2)
    return run(config, until="probe", quiet=True)


@pytest.fixture(scope="module")
def rows_of(session):
    """`rows_of(seed)`: ten rows per adapter, their answers drawn from what it says."""
    base = session.library.base

    def answered(adapter, probe, rng):
        base.attach(adapter)
        rows = []
        for example in itertools.islice(itertools.cycle(probe.examples), 10):
            tokens = list(example.tokens[: example.offset])
            tokens[-1] = int(rng.integers(3, 300))
            for _ in range(12):
                logits = base.model(mx.array([tokens]))[0, -1].astype(mx.float32)
                noise = rng.gumbel(size=logits.size)
                tokens.append(int(np.argmax(np.array(logits, np.float64) + noise)))
            rows.append(Example(tuple(tokens), example.offset))
        return replace(probe, examples=tuple(rows), cuts=())

    def rows(seed):
        pairs = zip(session.library.adapters, session.library.calibration)
        return [answered(*pair, np.random.default_rng(seed)) for pair in pairs]

    return rows


def library_of(session, adapters, sets):
    tasks = [replace(task, calibration=rows) for task, rows in zip(session.library.tasks, sets)]
    return replace(session.library, adapters=adapters, tasks=tasks)


def test_rows_that_say_weaker_are_believed_and_those_of_the_adapter_have_no_say(session, rows_of):
    adapters = session.library.adapters
    taught = library_of(session, adapters, rows_of(1)).by_teacher
    assert taught.trust == [0, 0]
    assert [rows.teacher for rows in taught.calibration] == [each.digest for each in adapters]
    # Twice as strong as what answered their rows.
    strong = [scaled(adapter, 2.0) for adapter in adapters]
    taught = library_of(session, strong, rows_of(0)).by_teacher
    for i, trust in enumerate(taught.trust):
        own, weaker = (float(taught.regrets(x[i], [i])[0]) for x in (strong, adapters))
        assert 0.3 < trust < 1 and own == pytest.approx(0, abs=1e-4) and weaker < -0.01


def test_a_teacher_regret_is_never_below_minus_1(session):
    losses = session.library.by_teacher.losses
    regrets = losses.regret(session.library.losses.gain * [0.5, -3], np.arange(2))
    assert regrets == pytest.approx([0.5, -1])


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


@pytest.mark.parametrize("trust", [0.0, 0.4, 1.0])
def test_a_trusted_row_enters_by_its_weight(session, trust):
    """Against rows of logits in float64; another weight is another set."""
    library = session.library
    base, (own, other), probe = library.base, library.adapters, library.calibration[0]
    model, n = Distiller(base), library.calibration[0].n_targets
    taught = model.with_teacher(own, probe, trust)
    (losses,) = library.scorer.losses([(other, [taught])])
    rows = model.compare(other, model.teacher_rows(own, probe))
    nll = [sum(library.scorer.losses([(adapter, [probe])])[0]) for adapter in (own, other)]
    assert rows[:, 0].sum() / n == pytest.approx(nll[1] - nll[0], abs=1e-4)
    kl = divergence(base, own, other, probe) / n
    assert rows[:, 1].sum() / n == pytest.approx(kl, abs=1e-4)
    assert losses[0] == pytest.approx((1 - trust) * kl + trust * (nll[1] - nll[0]), abs=1e-4)
    divergences = model.divergence(other, model.teacher_rows(own, probe))
    assert divergences == pytest.approx(kl, abs=1e-4)
    again = model.with_teacher(own, probe, trust + 0.1)
    assert len({taught.digest, again.digest, probe.digest}) == 3
