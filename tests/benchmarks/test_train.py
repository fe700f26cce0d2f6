"""library/train.py: what PEFT trains on torch is read, and as good as it says; resumed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from helpers.tiny import library, log_probabilities, write_jsonl

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.model import Model
from d2c_mlx.utils.files import hash_file

pytestmark = pytest.mark.slow


@pytest.fixture
def paths(tmp_path):
    found = library(tmp_path, [])
    for name, word in (("one", "yes"), ("two", "no")):
        rows = [{"prompt": f"Question {i}?", "completion": word} for i in range(24)]
        write_jsonl(found.tasks / name / "train.jsonl", rows[:16])
        write_jsonl(found.tasks / name / "test.jsonl", rows[16:])
    return found


def train(paths, *options):
    command = [sys.executable, "-m", "benchmarks.library.train", "--model", paths.model, "--tasks",
               paths.tasks, "--output", paths.tasks.parent, "--steps", "30", *options]  # fmt: skip
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ""},  # with torch
    )  # fmt: skip


def test_adapters_are_as_good_as_their_lines_say(paths, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    lines = ("{task: one, rank: 4, alpha: 8}",
             "{task: two, rank: 2, alpha: 2, rslora: true, dtype: bfloat16}")  # fmt: skip
    recipe.write_text("adapters:\n" + "".join(f"  - {line}\n" for line in lines))
    result = tmp_path / "result.json"
    command = ("--recipe", recipe, "--targets", "q,v", "--dtype", "float32", "--result", result)
    train(paths, *command)
    rows = json.loads(result.read_text())["rows"]
    assert [(row["name"], row["rank"], row["dtype"]) for row in rows] == [
        ("one", 4, "float32"), ("two", 2, "bfloat16"),
    ]  # fmt: skip
    base = Model(str(paths.model))
    for row in rows:
        directory = paths.adapters / row["name"]
        assert row["sha256"] == hash_file(directory / "adapter_model.safetensors")
        assert row["beats_base"] and row["loss"] < row["base"]
        test = (paths.tasks / row["name"] / "test.jsonl").read_text().splitlines()
        examples = base.encode(row["name"], list(map(json.loads, test))).examples
        for adapter, loss in (
            (None, row["base"]),
            (read_adapter(directory, base.module_shapes), row["loss"]),
        ):
            found = [
                -log_probabilities(base, adapter, x)[range(x.n_targets), x.tokens[x.first_target :]]
                for x in examples
            ]
            # Weights are rounded to 16 bit, lines to four digits.
            assert np.concatenate(found).mean() == pytest.approx(loss, abs=2e-3)
    before = result.read_text()
    assert "{" not in train(paths, *command).stdout and result.read_text() == before
