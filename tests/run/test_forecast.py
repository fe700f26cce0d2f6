"""A dry run: what a run would do, beside what it does."""

import json
from pathlib import Path

import pytest
from helpers.runs import config_of, flags_of
from helpers.tiny import library

from d2c_mlx.forecast import forecast
from d2c_mlx.pipeline import run


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Six adapters, room for three, and an empty cache."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cold"))
    paths = library(tmp_path, list("abcdef"))
    return config_of(paths, tmp_path / "run", budget="3", baselines=("kmeans",))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"budget": "60%"}, {"merge_rank": 16, "search": "paper"}])
def test_a_run_does_about_what_was_said_and_then_nothing(config, changes):
    config = config.replace(**changes)
    said = forecast(config)
    assert None not in said.stages.values() and said.tokens_per_second > 0
    session = run(config, quiet=True)
    for name in ("probe", "bench"):
        record = json.loads((session.output / ".stages" / f"{name}.json").read_text())
        tokens, expected = record["evaluations"]["tokens"], said.stages[name]
        assert expected >= tokens >= expected / 8, name
    total = sum(file.stat().st_size for file in session.path("pack").rglob("*.safetensors"))
    assert total <= said.nbytes
    again = forecast(config)
    assert {*again.stages.values()} == {None} and again.seconds == 0


def test_stages_after_a_change_are_done_again(config):
    run(config, until="cluster", quiet=True)
    stages = forecast(config.replace(merge_rank=3)).stages
    done = [stages[name] is None for name in ("probe", "merge", "bench")]
    assert done == [True, False, False]


def test_the_command_says_it_and_writes_nothing(config, command):
    argv = ["run", "--dry-run", *flags_of(config)]
    code, out, _ = command(*argv)
    assert code == 0 and "3 adapters, at most" in out and "Nothing was written" in out
    code, _, err = command(*argv, "--budget", "100B")
    assert code == 2 and "budget" in err and not Path(config.output).exists()
