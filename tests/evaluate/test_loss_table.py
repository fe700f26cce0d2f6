"""Regret: losses on a scale that tasks share."""

import numpy as np
import pytest
from helpers.tiny import library

from d2c_mlx.evaluate.scorer import LossTable
from d2c_mlx.merge.methods import scaled
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig


def table_of(base, values):
    names = tuple("abcdefgh"[: len(base)])
    return LossTable(names, np.diagonal(values).astype(float), np.asarray(base, float))


def random_table(n=5):
    """Tasks that differ in difficulty and in what there is to gain."""
    rng = np.random.default_rng(0)
    own, gain = rng.uniform(0.2, 4, n), rng.uniform(0.2, 3, n)
    regret = rng.uniform(0, 2, (n, n))
    np.fill_diagonal(regret, 0)
    return table_of(own + gain, np.diag(own)), regret


def test_regret_is_0_at_the_own_adapter_and_1_at_the_base():
    table, regret = random_table()
    assert table.regret(table.individual) == pytest.approx(np.zeros(5))
    assert table.regret(table.base) == pytest.approx(np.ones(5))
    both = table.regret(np.stack([table.base, table.individual], axis=1))
    assert both == pytest.approx(np.tile([1.0, 0.0], (5, 1)))
    assert table.regret(table.base[[3, 1]], np.array([3, 1])) == pytest.approx(np.ones(2))


def test_regret_counts_gains_below_a_floor_as_the_floor():
    # Gains of 0.5, 0.05, 0.01, 0 and -1 nats.
    table = table_of([1.5, 1.05, 1.01, 1.0, 0.0], np.eye(5))
    assert table.regret(np.full(5, 1.1)) == pytest.approx([0.2, 2.0, 2.0, 2.0, 2.0])
    assert table.gain == pytest.approx([0.5, 0.05, 0.05, 0.05, 0.05])


def test_regret_is_never_below_minus_1():
    # The second adapter is 1.3 nats worse than the base model.
    table = table_of([5.0, 1.0], np.diag([0.5, 2.3]))
    assert table.regret(table.base) == pytest.approx([1.0, -1.0])
    table = table_of([5.0, 5.0], np.diag([0.5, 0.5]))
    both = np.array([[0.5, 0.0], [0.25, -9.0]])
    assert table.regret(both) == pytest.approx(np.array([[0, -1 / 9], [-1 / 18, -1]]))


def test_a_run_measures_task_adapters_at_several_strengths(tmp_path):
    paths = library(tmp_path, list("abcd"))
    config = RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        budget="2", output=str(tmp_path / "run"), probe_examples=2, test_examples=2,
    )  # fmt: skip
    session = run(config, until="probe", quiet=True)
    table = LossTable.from_json(session.read("losses.json"))
    assert table.tasks == tuple("abcd") and table.weakened.shape == (4, 2)
    scorer, probes = session.library.scorer, session.library.calibration
    columns = zip((*table.strengths, 1.0), (*table.weakened.T, table.individual))
    for strength, losses in columns:
        for adapter, probe, loss in zip(session.library.adapters, probes, losses):
            weaker = scaled(adapter, strength).uniform(session.library.base.dtype)
            ((found,),) = scorer.losses([(weaker, [probe])])
            assert loss == pytest.approx(found, rel=1e-6)
    assert table.base == pytest.approx(scorer.losses([(None, probes)])[0], rel=1e-6)
