"""The stress test of benchmarks/, in small, on the tiny model."""

from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.adapters import ADAPTERS
from helpers.served import counted, evictions, idle, serving, text

from benchmarks.serving.stress import PROMPTS, TOKEN, TOKENS, Stress
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.serve.adapters import Adapters
from d2c_mlx.serve.jobs import Limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("pack", ["plain"], indirect=True),
]


def test_the_right_adapter_in_every_answer_and_nothing_left(
    pack, model_path, tmp_path, answer, request
):
    """Loads, first uses, reloads, clients that leave and garbage at once, beyond memory."""
    adapters = {one.name: one for one in ADAPTERS}
    for one in ADAPTERS:
        modules = {k: replace(x, scale=2 * x.scale) for k, x in one.modules.items()}
        adapters[f"file-{one.name}"] = replace(one, modules=modules)
        adapters[f"file-{one.name}"].save(tmp_path / f"file-{one.name}", 2)
    answers = {name: {prompt: text(answer, one, prompt, TOKENS) for prompt in PROMPTS}
               for name, one in adapters.items()}  # fmt: skip
    # Else an adapter that is mixed up might not show.
    assert len({str(one) for one in answers.values()}) == len(answers)
    found = Adapters(BaseModel(str(model_path)), pack, 100_000)
    limits = Limits(batch=4, queue=8, seconds=2)
    files = [name for name in answers if name.startswith("file-")]
    options = {"token": TOKEN, "changes": True, "directory": tmp_path, "limits": limits}
    with serving(pack, found, **options) as server:
        stress = Stress(server.address, answers, [one.name for one in ADAPTERS], files)
        n = request.config.getoption("--requests") // 2
        before = 0
        for half in range(2):
            outcomes = stress.run(range(half * n, (half + 1) * n), 8)
            assert set(outcomes) <= {"right", "left", "garbage", "reloaded"}, outcomes
            assert outcomes["right"] > n // 2
            idle(server)
            grown, before = mx.get_active_memory() - before, mx.get_active_memory()
        assert grown < 2e6 and evictions(server)
        assert any(n for key, n in counted(server).items() if "prefix_cache_hits_total" in key)
        assert not [name for name in found.names if name.startswith("own-")]
        assert all(not one.users and not one.rows for one in found.names.values())
        assert not any("own-" in key for key in counted(server))
