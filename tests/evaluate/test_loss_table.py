"""Regret: losses on a scale that tasks share."""

import numpy as np
import pytest
from helpers.tiny import library

from d2c_mlx.evaluate.scorer import LossTable
from d2c_mlx.merge.methods import scaled
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig


def test_regret_is_0_at_the_own_adapter_and_1_at_the_base_and_has_two_floors():
    def table(own, base):
        return LossTable(tuple("abcdefgh"[: len(base)]), np.array(own), np.array(base))

    some = table([0.5, 2.0, 3.0], [1.5, 4.0, 3.5])
    both = some.regret(np.stack([some.base, some.individual], axis=1))
    assert both == pytest.approx(np.tile([1.0, 0.0], (3, 1)))
    assert some.regret(np.array([3.75, 0.5]), np.array([2, 0])) == pytest.approx([1.5, 0.0])
    # Gains of 0.5, 0.05, 0.01, 0 and -1 nats.
    small = table([1.0] * 5, [1.5, 1.05, 1.01, 1.0, 0.0])
    assert small.regret(np.full(5, 1.1)) == pytest.approx([0.2, 2.0, 2.0, 2.0, 2.0])
    assert small.gain == pytest.approx([0.5, 0.05, 0.05, 0.05, 0.05])
    # The second adapter is 1.3 nats worse than the base model.
    worse = table([0.5, 2.3], [5.0, 1.0])
    assert worse.regret(worse.base) == pytest.approx([1.0, -1.0])


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
