"""What modules contribute: against losses of the engine, by finite differences."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import library

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.distill import POINTS, module_gains
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task


@pytest.fixture
def tiny(tmp_path):
    """A base model, an adapter, a task's probes, and the loss of adapters on them."""
    paths = library(tmp_path, ["a"])
    base = Model(str(paths.model))
    adapter = read_adapter(paths.adapters / "a", base.module_shapes)
    examples = base.encode("a", load_task(paths.tasks / "a").probe)
    scorer = Scorer(Engine(base))
    return base, adapter, examples, lambda one: scorer.losses([(one, [examples])])[0][0]


def scaled(adapter: Adapter, scales: dict[str, float]) -> Adapter:
    modules = {
        path: LoRA(lora.a.astype(mx.float32), lora.b.astype(mx.float32), lora.scale * scales[path])
        for path, lora in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def test_gains_add_up_to_what_the_adapter_gains(tiny):
    base, adapter, examples, loss = tiny
    gains = module_gains(base, adapter, examples, np.arange(0.0125, 1, 0.025).tolist())
    assert set(gains) == set(adapter.modules)
    assert sum(gains.values()) == pytest.approx(loss(None) - loss(adapter), abs=5e-5)


def test_a_gain_is_the_integral_of_the_derivative_by_the_scale_of_its_module(tiny):
    base, adapter, examples, loss = tiny
    found = module_gains(base, adapter, examples)
    step = 0.05
    for path in adapter.modules:
        slopes = []
        for x in POINTS:
            scales = dict.fromkeys(adapter.modules, x)
            above, below = (loss(scaled(adapter, {**scales, path: x + d})) for d in (step, -step))
            slopes.append((above - below) / (2 * step))
        assert found[path] == pytest.approx(-np.mean(slopes), rel=0.02, abs=1e-4)
    assert len({round(gain, 6) for gain in found.values()}) == len(found)


def test_a_head_that_is_not_linear_goes_through_the_whole_model(tiny, monkeypatch):
    base, adapter, examples, _ = tiny
    gains = module_gains(base, adapter, examples)
    assert not base.attached_factors  # always undone
    monkeypatch.setattr("d2c_mlx.evaluate.distill.find_head", lambda model: None)
    assert module_gains(base, adapter, examples) == pytest.approx(gains, rel=1e-3, abs=1e-6)
