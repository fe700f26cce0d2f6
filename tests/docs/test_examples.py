"""The examples run as they stand, in a process of their own."""

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
