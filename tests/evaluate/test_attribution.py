"""What modules contribute: against losses of the engine, by finite differences."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import library

from d2c_mlx.adapters.adapter import LoRA
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.distill import POINTS, module_gains
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task


def test_a_gain_is_the_integral_of_the_derivative_by_the_scale_of_its_module(tmp_path, monkeypatch):
    paths = library(tmp_path, ["a"])
    base = Model(str(paths.model))
    adapter = read_adapter(paths.adapters / "a", base.module_shapes)
    examples = base.encode("a", load_task(paths.tasks / "a").probe)
    scorer, step = Scorer(Engine(base)), 0.05

    def loss(path, at, scale):
        """With all modules scaled alike, but one."""
        modules = {}
        for name, lora in adapter.modules.items():
            a, b = lora.a.astype(mx.float32), lora.b.astype(mx.float32)
            modules[name] = LoRA(a, b, lora.scale * (scale if name == path else at))
        return scorer.losses([(replace(adapter, modules=modules), [examples])])[0][0]

    gains = module_gains(base, adapter, examples)
    assert gains.keys() == adapter.modules.keys() and not base.attached_factors
    for path in adapter.modules:
        slopes = [(loss(path, x, x + step) - loss(path, x, x - step)) / (2 * step) for x in POINTS]
        assert gains[path] == pytest.approx(-np.mean(slopes), rel=0.02, abs=1e-4)
    assert len({round(gain, 6) for gain in gains.values()}) == len(gains)
    # A head that is not linear goes through the whole model.
    monkeypatch.setattr("d2c_mlx.evaluate.distill.find_head", lambda model: None)
    assert module_gains(base, adapter, examples) == pytest.approx(gains, rel=1e-3, abs=1e-6)
