"""Requests of every kind at once, as benchmarks/serving/stress.py asks them, on the tiny model."""

from dataclasses import replace

import mlx.core as mx
import psutil
import pytest
from helpers.adapters import ADAPTERS
from helpers.served import idle, serving

from benchmarks.serving.stress import TOKEN, Stress, answers_of
from d2c_mlx.models.model import Model
from d2c_mlx.serve.scheduler import Limits

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("n", [50, pytest.param(5000, marks=pytest.mark.soak)])
def test_the_right_adapter_in_every_answer_and_nothing_left(packs, model_path, tmp_path, n):
    """Loads, first uses, reloads, clients that leave and garbage at once, beyond memory."""
    adapters = {adapter.name: adapter for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        modules = {k: replace(x, scale=2 * x.scale) for k, x in adapter.modules.items()}
        adapters[f"file-{adapter.name}"] = replace(adapter, modules=modules)
        adapters[f"file-{adapter.name}"].save(tmp_path / f"file-{adapter.name}", 2)
    # Raises if two cannot be told apart: one that is mixed up might not show.
    answers = answers_of(Model(str(model_path)), adapters)
    # The cache of prompts is full within the first half, so it grows no more in the second.
    limits = Limits(batch=4, queue=8, seconds=2, adapter_nbytes=40_000, prefix_nbytes=500_000)
    files = [name for name in answers if name.startswith("file-")]
    options = {"token": TOKEN, "directory": tmp_path, "limits": limits}
    with serving(packs["plain"], model_path, **options) as server:
        stress = Stress(server.address, answers, [adapter.name for adapter in ADAPTERS], files)
        stress.load()
        first, other, *_ = answers
        # An answer of another adapter is found to be wrong.
        assert (stress.ask(first, first), stress.ask(first, other)) == ("right", "wrong")
        before = 0
        for half in range(2):
            outcomes = stress.run(range(half * n, (half + 1) * n), 8)
            assert set(outcomes) <= {"right", "left", "garbage", "refused"}, outcomes
            assert outcomes["right"] > n // 2
            print(dict(outcomes), f"{psutil.Process().memory_info().rss / 1e6:.0f} MB")
            idle(server)
            grown, before = mx.get_active_memory() - before, mx.get_active_memory()
        served = server.service.adapters
        assert grown < 2e6 and served.n_evicted and server.service.scheduler.prefixes.nbytes
        assert not [name for name in served.names if name.startswith("own-")]
        assert not any(entry.rows for entry in served.names.values())
