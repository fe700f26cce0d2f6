"""library/train_mlx.py: what mlx-lm's own trainer writes is read, and judged as mlx-lm does."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.tiny import LAYERS, SHAPES, tiny_model, write_jsonl

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.model import Model

pytestmark = pytest.mark.slow

CONFIG = ROOT / "benchmarks" / "library" / "mlx.yaml"
FEW = ("iters=6", "num_layers=1", "learning_rate=0.01")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny model, and a task in the library's format."""
    root = tmp_path_factory.mktemp("mlx")
    tiny_model(root / "model")
    rows = [
        {"messages": [{"role": "system", "content": ""},
                      {"role": "user", "content": f"Question {i}"},
                      {"role": "assistant", "content": "The answer is the fox." * (1 + i % 3)}]}
        for i in range(24)
    ]  # fmt: skip
    for name in ("one", "two"):
        write_jsonl(root / "tasks" / name / "train.jsonl", rows[:16])
        write_jsonl(root / "tasks" / name / "test.jsonl", rows[16:])
    return root


def settings(*changes):
    return [word for one in changes for word in ("--set", one)]


def train(root, *options, names="one"):
    command = [sys.executable, "-m", "benchmarks.library.train_mlx", "--model", root / "model",
               "--tasks", root / "tasks", "--output", root / "library", "--names", names,
               *options]  # fmt: skip
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240,
                          cwd=ROOT)  # fmt: skip


@pytest.fixture(scope="module")
def line(root):
    """Of the log, and what was printed."""
    done = train(root, *settings(*FEW), "--result", root / "result.json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_adapter_of_mlx_lm_is_read_and_has_the_loss_that_mlx_lm_gives(root, line):
    assert line["stock_difference"] < 1e-4 and line["beats_base"]
    assert line["loss"] < line["base"] - 0.01
    config = yaml.safe_load(CONFIG.read_text())
    assert (line["rank"], line["steps"], line["layers"]) == (8, 6, 1)
    assert line["alpha"] == 8 * config["lora_parameters"]["scale"] and line["rows"] == 16
    result = json.loads((root / "result.json").read_text())
    assert result["rows"] == [line] and result["machine"]["cores"]
    directory = root / "library" / "adapters" / "one"
    # No checkpoints, nothing hidden beside it.
    files = {path.name for path in directory.iterdir()}
    assert files == {"adapters.safetensors", "adapter_config.json"}
    assert [path.name for path in directory.parent.iterdir()] == ["one"]
    adapter = read_adapter(directory, Model(str(root / "model")).module_shapes)
    assert set(adapter.modules) == {f"model.layers.{LAYERS - 1}.{name}" for name in SHAPES}
    assert adapter.base == "model" and adapter.rank == 8
    assert all(np.abs(lora.delta()).max() > 0 for lora in adapter.modules.values())


def test_what_is_there_stays_and_a_failure_leaves_nothing(root, line):
    done = train(root, *settings(*FEW, "batch_size=1000"), names="one,two")
    assert done.returncode == 1 and "at least batch_size=1000" in done.stderr
    assert done.stderr.splitlines()[-1] == "two: mlx-lm's trainer ended with code 1"
    assert [path.name for path in (root / "library" / "adapters").iterdir()] == ["one"]
    assert (root / "library" / "training.jsonl").read_text() == json.dumps(line) + "\n"
