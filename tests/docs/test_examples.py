"""The examples run as they stand, in a process of their own."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers.phone import make_pack
from helpers.tiny import library

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


def start(name, *args, **environment):
    argv = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **environment})


def test_two_adapters_become_a_pack_that_mlx_lm_generates_with(base, tmp_path):
    """The embedded model: the answers are the adapters' short ones, not the chatter of the base."""
    done = start("two_adapters.py", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    loss, bare = (float(part.split()[-1]) for part in lines[0].split(";")[1].split(",")[:2])
    assert loss < bare / 2
    answers = [line for line in lines if line.startswith("  answered")]
    assert len(answers) == 2 and all(len(answer) < 60 for answer in answers)
    assert (tmp_path / "two" / "run" / "pack" / "manifest.json").is_file()


def test_a_new_task_is_composed_added_and_answered(tmp_path):
    paths = library(tmp_path, ["a", "b", "c"])
    done = start("new_task.py", tmp_path / "out", tmp_path, "c", paths.model)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("as good: ") and lines[-2].startswith("  answered ")
    tasks = json.loads((tmp_path / "out" / "run" / "pack" / "manifest.json").read_text())["tasks"]
    assert len({tasks[name] for name in "abc"}) == 3


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    """Its cells in their order in one namespace, as a kernel runs them."""
    notebook = json.loads((EXAMPLES / "compare.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [one for one in notebook["cells"] if one["cell_type"] == "code"]
    assert len({one["id"] for one in notebook["cells"]}) == len(notebook["cells"])
    code = "\n".join("".join(one["source"]) for one in cells)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=EXAMPLES, env={**os.environ, "OUTPUT": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "|  | 1 | tsv |" in done.stdout and "tsv less linear: " in done.stdout
    # What the file shows is what it prints.
    shown = "".join(text for one in cells for out in one["outputs"] for text in out["text"])
    assert [line.split("|")[1:4] for line in shown.splitlines() if "|" in line] == [
        line.split("|")[1:4] for line in done.stdout.splitlines() if "|" in line]  # fmt: skip


def test_a_hub_model_without_a_network_is_one_line(tmp_path):
    paths = library(tmp_path, ["a", "b", "c"])
    pack = make_pack(paths, tmp_path / "pack").path
    done = start("bench_hub_model.py", pack, "no-such-owner/no-such-model", HF_HUB_OFFLINE="1",
                 HF_HOME=str(tmp_path / "hub"))  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model: 'no-such-owner/no-such-model' is no local path")
    assert done.stderr.count("\n") == 1


def test_a_model_in_a_directory_is_benched(tmp_path):
    """What the example does once the hub has given the model."""
    paths = library(tmp_path, ["a", "b", "c"])
    done = start("bench_hub_model.py", make_pack(paths, tmp_path / "pack").path, paths.model)
    assert done.returncode == 0, done.stderr
    assert "# 3 tasks on model (4 bit), as on iphone-6gb" in done.stdout
