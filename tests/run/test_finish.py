"""What a run would do, told by a dry run; a finished one does nothing, without a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import config_of, flags_of, stages_started
from helpers.tiny import library

from d2c_mlx.forecast import forecast
from d2c_mlx.pipeline import run
from d2c_mlx.run.run import Run

# The command, in a process where a model cannot even be imported.
WITHOUT_A_MODEL = """
import sys
sys.modules["mlx_lm"] = sys.modules["transformers"] = None
from d2c_mlx_cli.main import main
main()
"""


@pytest.fixture
def finished(config):
    config = config.replace(budget="2", merge_method="linear")
    return run(config, quiet=True)


def is_finished(session):
    return Run(session.config).finished()


@pytest.mark.slow
def test_a_finished_run_answers_without_a_model(finished):
    times = {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")}
    output = f"--output={finished.output}"
    for words in (
        ["run", output],
        ["run", "--until", "bench", output],
        ["verify", finished.path("pack")],
        ["list", finished.path("pack")],
    ):
        argv = [sys.executable, "-c", WITHOUT_A_MODEL, *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "| individual |" in done.stdout or words[0] != "run"
    assert {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")} == times


@pytest.mark.slow
def test_what_changed_is_seen(finished, tmp_path):
    assert is_finished(finished)
    assert not Run(finished.config.replace(seed=1)).finished()
    rows = tmp_path / "tasks" / "a" / "test.jsonl"
    text = rows.read_text(encoding="utf-8")
    rows.write_text(text + text.splitlines()[0] + "\n", encoding="utf-8")
    assert not is_finished(finished)
    # The stages judge by content: back as it was, nothing is repeated, and it is finished again.
    rows.write_text(text, encoding="utf-8")
    started = stages_started(finished.output)
    assert is_finished(run(finished.config, quiet=True))
    assert stages_started(finished.output) == started
    path = finished.path("bench.json")
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"}")
    assert not is_finished(finished)
    run(finished.config, quiet=True)
    assert json.loads(path.read_bytes())["methods"] == json.loads(content)["methods"]
    assert is_finished(finished) and Run(finished.config).finished("merge")


@pytest.mark.slow
def test_another_end_of_answers_is_seen(finished):
    """mlx-lm takes it from generation_config.json first."""
    first = stages_started(finished.output)
    ends = Path(finished.config.model) / "generation_config.json"
    ends.write_text(json.dumps({"eos_token_id": [*range(3, 300, 2)]}))
    assert not is_finished(finished)
    answers = run(finished.config, quiet=True).read("bench.json")["answers"]
    again = stages_started(finished.output)
    assert again["bench"] != first["bench"] and again["report"] != first["report"]
    fresh = finished.config.replace(output=f"{finished.output}-fresh")
    assert run(fresh, quiet=True).read("bench.json")["answers"] == answers


@pytest.fixture
def six(tmp_path, monkeypatch):
    """Six adapters, room for three, and an empty cache."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cold"))
    paths = library(tmp_path, list("abcdef"))
    return config_of(paths, tmp_path / "run", budget="3", baselines=("kmeans",))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"budget": "60%"}, {"merge_rank": 16, "search": "paper"}])
def test_a_run_does_about_what_was_forecast_and_then_nothing(six, changes):
    config = six.replace(**changes)
    before = forecast(config)
    assert None not in before.stages.values() and before.tokens_per_second > 0
    session = run(config, quiet=True)
    for name in ("probe", "bench"):
        record = json.loads((session.output / ".stages" / f"{name}.json").read_text())
        tokens, expected = record["evaluations"]["tokens"], before.stages[name]
        assert expected >= tokens >= expected / 8, name
    files = session.path("pack").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) <= before.nbytes
    again = forecast(config)
    assert {*again.stages.values()} == {None} and again.seconds == 0
    stages = forecast(config.replace(merge_rank=3)).stages
    assert stages["probe"] is None and None not in (stages["pack"], stages["bench"])


def test_a_dry_run_writes_nothing(six, command):
    argv = ["run", "--dry-run", *flags_of(six)]
    code, out, _ = command(*argv)
    assert code == 0 and "3 adapters, at most" in out and "Nothing was written" in out
    code, _, err = command(*argv, "--budget", "100B")
    assert code == 2 and "budget" in err and not Path(six.output).exists()
