"""benchmarks/library/decay.py against numpy's SVD of the dense updates."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from helpers.tiny import SHAPES, peft_adapter, tiny_model, write_jsonl

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.model import Model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Lines by name, what was printed, and the adapters that were read."""
    root = tmp_path_factory.mktemp("decay")
    model = tiny_model(root / "model")
    library = root / "library"
    peft_adapter(library / "adapters", "small", rank=4)
    # Of the full rank of most modules, beyond that of k_proj and v_proj.
    peft_adapter(library / "adapters", "large", rank=32, targets=tuple(SHAPES), seed=1)
    peft_adapter(library / "adapters", "short", rank=32, targets=tuple(SHAPES), seed=2)
    write_jsonl(library / "training.jsonl", [{"name": "short", "steps": 100},
                                             {"name": "large", "steps": 300}])  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.library.decay", library, "--model", model,
               "--output", root / "decay.json"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120,
                          cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = json.loads((root / "decay.json").read_text())["adapters"]
    shapes = Model(str(model)).module_shapes
    adapters = {line["name"]: read_adapter(library / "adapters" / line["name"], shapes)
                for line in lines}  # fmt: skip
    return {line["name"]: line for line in lines}, done.stdout, adapters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("part", [None, "attention"])
def test_spectra_are_those_of_the_dense_update(measured, name, part):
    lines, _, adapters = measured
    line = lines[name] if part is None else lines[name].get(part)
    if line is None:
        return  # it has nothing else
    loras = [lora for path, lora in adapters[name].modules.items()
             if part is None or "self_attn" in path]  # fmt: skip
    rank = adapters[name].rank
    curves, effective, stable, for_90, for_99 = [], [], [], [], []
    for lora in loras:
        values = np.linalg.svd(lora.delta().astype(np.float64), compute_uv=False)[:rank]
        values = np.pad(values, (0, rank - len(values)))
        energy = values**2 / (values**2).sum()
        curves.append(energy.cumsum())
        shares = values[values > 1e-9] / values.sum()
        effective.append(np.exp(-(shares * np.log(shares)).sum()))
        stable.append(np.linalg.norm(lora.delta()) ** 2 / np.linalg.norm(lora.delta(), 2) ** 2)
        for_90.append(sum(curves[-1] < 0.9) + 1)
        for_99.append(sum(curves[-1] < 0.99) + 1)
    assert line["modules"] == len(loras) and line["zero_modules"] == 0
    assert line["cumulative"] == pytest.approx(np.mean(curves, axis=0), abs=2e-6)
    assert line["effective_rank"] == pytest.approx(np.mean(effective), rel=1e-4)
    assert line["stable_rank"] == pytest.approx(np.mean(stable), rel=1e-4)
    assert (line["rank_90"], line["rank_99"]) == (np.mean(for_90), np.mean(for_99))
