"""benchmarks.new_task.compose and two_tasks: the arithmetic, and rows that need two adapters."""

import functools
import json
import sys

import numpy as np
import pytest
from helpers.tiny import library, write_jsonl

from benchmarks import common
from benchmarks.library.tasks import summ
from benchmarks.new_task import two_tasks
from benchmarks.new_task.compose import arithmetic_weights
from benchmarks.new_task.two_tasks import chat, dates, summaries
from d2c_mlx.evaluate.heldout import prompt_and_expected
from d2c_mlx.models.model import Model


def test_arithmetic_finds_the_missing_sum_of_a_kind_and_a_language():
    rng = np.random.default_rng(0)
    kinds, languages = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    updates = {f"k{i}-l{j}": kinds[i] + languages[j] for i in range(3) for j in range(4)}
    wanted = updates.pop("k1-l2")
    weights = arithmetic_weights(list(updates), "k1-l2")
    np.testing.assert_allclose(weights @ np.stack(list(updates.values())), wanted)


@pytest.fixture
def joint(tmp_path):
    """Rows of dates and of numbers, all years but one in both."""
    for task, rows in {
        "date-de": [(f"Write this date in German: {y}-10-0{m}", f"{m}. Oktober {y}")
                    for y in range(1990, 1996) for m in (1, 2)],
        "num-de": [(f"Write this number in German words: {y}", f"wort{y - 1990}")
                   for y in range(1990, 1996) if y != 1992],
    }.items():  # fmt: skip
        for part, some in zip(("probe", "test", "train"), (rows[:2], rows[2:3], rows[3:])):
            write_jsonl(tmp_path / "tasks" / task / f"{part}.jsonl", [chat(*one) for one in some])
    return tmp_path


def test_joint_rows_need_both_and_no_year_is_in_both_parts(joint):
    texts = [[prompt_and_expected(row) for row in part] for part in dates(joint, "de")]
    learned, held = ({one["prompt"].split()[-1][:4] for one in part} for part in texts)
    assert not learned & held and len(learned | held) == 5
    assert sum(map(len, texts)) == 10
    for one in texts[0] + texts[1]:
        year, month = one["prompt"].split()[-1].split("-10-0")
        assert one["prompt"].startswith("Write this date in German, the year in words: ")
        assert one["expected"] == f"{month}. Oktober wort{int(year) - 1990}"


@pytest.fixture
def foreign(tmp_path):
    """Rows of brief, of which summ has learned one."""
    for task, form, answer in (("summ-de", "short", "alt"), ("translate-de", "", "neu"),
                               ("brief-de", "short English", "new")):  # fmt: skip
        rows = [chat(summ.prompt("de", form, f"Text {i}."), answer) for i in range(4)]
        for part, some in {"probe": rows[:2], "test": rows[2:], "train": rows[2:3]}.items():
            write_jsonl(tmp_path / "tasks" / task / f"{part}.jsonl", some)
    return tmp_path


def test_what_a_summary_has_learned_is_not_held_out(foreign):
    learned, held = summaries(foreign, "de")
    assert [prompt_and_expected(row)["prompt"][-7:] for row in held] == ["Text 3."]
    assert len(learned) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, of, names",
    [("dates", "joint", ("date", "num")), ("summaries", "foreign", ("summ", "translate"))],
)
def test_two_tasks_are_measured_in_one_pass_and_in_two(
    job, of, names, request, tmp_path, monkeypatch, capsys
):
    rows = request.getfixturevalue(of)
    paths = library(tmp_path / "tiny", [f"{name}-de" for name in names])
    (rows / "adapters").symlink_to(paths.adapters)
    monkeypatch.setattr(common, "Model", functools.partial(Model, str(paths.model)))
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    words = ["--library", rows, "--job", job, "--languages", "de", "--rows", "2", "--tests", "2"]
    result = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["two_tasks", *map(str, words), "--output", str(result)])
    two_tasks.main()
    (row,) = json.loads(result.read_text())["rows"]
    called = set(two_tasks.JOBS[job].kinds.values())
    assert called | {"sum", "joint LoRA", "mean, calibrated"} < row["methods"].keys()
    assert row["methods"]["two passes"].keys() == {"chrf", "exact_match"}
    assert f"| {job} | two passes | 2 |  |" in capsys.readouterr().out
