"""Losses kept by content, and what a machine says of itself."""

import mlx.core as mx
import pytest
from tiny import library

from d2c_mlx.cache import LossCache
from d2c_mlx.convert import read_adapter
from d2c_mlx.doctor import diagnose, machine
from d2c_mlx.engine import Engine
from d2c_mlx.merge import scaled
from d2c_mlx.model import BaseModel
from d2c_mlx.probe import Evaluator
from d2c_mlx.tasks import load_task


@pytest.fixture
def tiny(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    base = BaseModel(str(paths.model))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "ab"]
    sets = [base.encode(name, load_task(paths.tasks / name).test) for name in "ab"]
    return base, adapters, sets


def test_losses_are_computed_once_and_survive_on_disk(tiny, tmp_path):
    base, (first, second), sets = tiny
    engine, path = Engine(base), tmp_path / "losses.sqlite"
    evaluator = Evaluator(engine, LossCache(path))
    before = evaluator.losses([(first, sets), (None, sets[:1]), (first, sets)])
    assert (evaluator.counts.asked, evaluator.counts.done) == (5, 3)
    again = Evaluator(engine, LossCache(path))
    after = again.losses([(first, sets), (None, sets[:1])])
    assert [x.tolist() for x in after] == [x.tolist() for x in before[:2]]
    assert again.counts.done == 0
    again.losses([(second, sets)])
    assert again.counts.done == 2


def test_without_a_cache_everything_is_asked_again(tiny):
    base, (first, _), sets = tiny
    evaluator = Evaluator(Engine(base))
    values = [evaluator.losses([(first, sets)])[0].tolist() for _ in range(2)]
    assert values[0] == values[1] and evaluator.counts.done == 4


def test_the_digest_follows_content_not_names(tiny):
    _, (first, second), _ = tiny
    assert first.digest != second.digest != scaled(second, 2.0).digest
    assert type(first)("other", first.modules, None, ("x",)).digest == first.digest


@pytest.mark.parametrize("metal", [True, False])
def test_machine_reports_what_the_device_knows(monkeypatch, metal):
    """Both sides of the Apple-only keys: `mx.device_info` has more of them on Metal."""
    info = {"device_name": "Apple M9", "memory_size": 8 << 30}
    info["max_recommended_working_set_size"] = 6 << 30
    monkeypatch.setattr(mx, "device_info", lambda: info if metal else {"device_name": "x"})
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    facts = machine()
    assert (facts["backend"] == "metal") is metal
    assert ("working_set" in facts) is metal
    assert facts["memory"] == 8 << 30 if metal else facts["memory"] > 1 << 30
    names = {finding.name for finding in diagnose()}
    assert ("gpu memory" in names) is metal
