"""A dry run: what a run would do, beside what it does."""

import json
import shutil

import pytest
from helpers.tiny import library, write_jsonl

from d2c_mlx.forecast import forecast
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.errors import InputError


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Six adapters, room for three, and an empty cache."""
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cold"))
    paths = library(tmp_path, list("abcdef"))
    return RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        budget="3", output=str(tmp_path / "run"), probe_examples=3, test_examples=2,
        baselines=("kmeans",),     )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"budget": "60%"}, {"merge_rank": 16}, {"search": "paper"}], ids=str
)
def test_a_run_does_about_what_was_said_and_then_nothing(config, changes):
    config = config.replace(**changes)
    said = forecast(config)
    assert not any(one.done for one in said.stages) and said.tokens_per_second > 0
    session = run(config, quiet=True)
    for one in said.stages:
        record = json.loads((session.output / ".stages" / f"{one.name}.json").read_text())
        tokens = record["evaluations"]["tokens"]
        if one.name in ("probe", "bench"):
            assert one.tokens >= tokens >= one.tokens / 8, one
    total = sum(file.stat().st_size for file in session.path("pack").rglob("*.safetensors"))
    assert total <= said.nbytes
    again = forecast(config)
    assert all(one.done and not one.tokens for one in again.stages) and again.seconds == 0


def test_stages_after_a_change_are_done_again(config):
    run(config, until="cluster", quiet=True)
    found = {one.name: one.done for one in forecast(config.replace(merge_rank=3)).stages}
    assert found["probe"] and not found["merge"] and not found["bench"]


def test_prompts_and_rows_of_a_step_are_counted(config, tmp_path):
    """Two rows of a task in a step, and two answers."""

    def tokens(stage, n, **changes):
        lines = [{"prompt": f"Question {i}?"} for i in range(n)]
        if n:
            tasks = shutil.copytree(config.tasks, tmp_path / f"{stage}{n}", dirs_exist_ok=True)
            rows = [json.loads(x) for x in (tasks / "a" / "probe.jsonl").read_text().splitlines()]
            write_jsonl(tasks / "a" / "probe.jsonl", [*rows, *lines])
            changes["tasks"] = str(tasks)
        said = forecast(config.replace(**changes))
        return next(one.tokens for one in said.stages if one.name == stage)

    assert tokens("answer", 16) == 16 * tokens("answer", 1)
    assert tokens("merge", 8) > tokens("merge", 0)
    few, many = (tokens("refine", 0, refine=True, probe_examples=n) for n in (2, 6))
    assert few == pytest.approx(many, rel=0.2)
    assert tokens("refine", 2, refine=True) > tokens("refine", 1, refine=True)


def test_nothing_is_written_and_bad_input_is_told(config, tmp_path):
    forecast(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="budget"):
        forecast(config.replace(budget="100B"))


def test_the_command_says_it(config, command):
    given = ["--adapters", config.adapters, "--tasks", config.tasks, "--model", config.model]
    code, out, _ = command("run", *given, "--output", config.output, "--budget", "3", "--dry-run")
    assert code == 0 and "3 adapters, at most" in out and "Nothing was written" in out
