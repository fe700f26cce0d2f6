"""Rows without an answer: their adapters answer them, and the answers are rows."""

import json
from pathlib import Path

import pytest
from helpers.runs import NAMES, stages_started
from helpers.tiny import end_answers, write_jsonl

from d2c_mlx.forecast import forecast
from d2c_mlx.pipeline import run
from d2c_mlx.run.run import Run
from d2c_mlx.utils.errors import InputError
from d2c_mlx.utils.files import hash_tree

pytestmark = pytest.mark.filterwarnings("ignore:tasks. left out")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def alone(config):
    """Every row is a prompt, of a model that ends its answers."""
    end_answers(config.model)
    tasks = Path(config.tasks).with_name("prompts")
    for name in NAMES:
        for file in ("probe", "test"):
            rows = [{"prompt": f"Question {i} of {file} for {name}?"} for i in range(5)]
            write_jsonl(tasks / name / f"{file}.jsonl", rows)
    return config.replace(tasks=str(tasks), budget="2")


@pytest.fixture
def beside(config):
    """Two prompts of one adapter beside its rows."""
    end_answers(config.model)
    path = Path(config.tasks) / "a" / "probe.jsonl"
    rows = rows_of(path)
    prompts = [{"prompt": "What else?"}, {"prompt": "And what is more?"}]
    write_jsonl(path, [prompts[0], *rows, prompts[1], {"prompt": rows[0]["prompt"]}])
    return config.replace(budget="2")


def answers_of(run, adapter, prompts):
    """Greedy answers of an adapter, each alone."""
    base = run.library.base
    rows = [{"prompt": prompt, "completion": "?"} for prompt in prompts]
    base.attach(adapter)
    answers = {}
    for prompt, example in zip(prompts, base.encode("t", rows).examples):
        (tokens,) = base.answers([example.prompt_tokens], [256])
        text = base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if text and len(tokens) < 256:
            answers[prompt] = text
    return answers


@pytest.mark.slow
def test_answers_of_the_adapters_are_the_rows(alone):
    finished = run(alone, quiet=True)
    for i, name in enumerate(NAMES):
        for file in ("probe", "test"):
            rows = rows_of(finished.path(f"answered/{name}/{file}.jsonl"))
            prompts = [f"Question {i} of {file} for {name}?" for i in range(3)]
            expected = answers_of(finished, finished.library.adapters[i], prompts)
            assert {row["prompt"]: row["completion"] for row in rows} == expected
    bench, started = finished.read("bench.json"), stages_started(finished.output)
    assert bench["methods"]["individual"]["loss"] < bench["methods"]["base"]["loss"]
    assert bench["provenance"]["answered"] == NAMES
    assert "answer" in started and Run(alone).finished()
    assert {*forecast(alone).stages.values()} == {None}
    # Another prompt is answered, and what follows is repeated.
    rows = Path(alone.tasks) / "a" / "probe.jsonl"
    rows.write_text(rows.read_text().replace("Question 0", "Matter 0"))
    run(alone, quiet=True)
    same = {name for name, at in stages_started(finished.output).items() if at == started[name]}
    assert same == {"convert"}


@pytest.mark.slow
def test_prompts_beside_rows_are_read_by_merges_and_judge_nothing(beside, tmp_path):
    with_prompts = run(beside, quiet=True)
    path = Path(beside.tasks) / "a" / "probe.jsonl"
    write_jsonl(path, [row for row in rows_of(path) if "completion" in row])
    without = run(beside.replace(output=str(tmp_path / "without")), quiet=True)
    assert "answer" not in stages_started(without.output)
    assert with_prompts.read("losses.json") == without.read("losses.json")
    assert [path.name for path in with_prompts.path("answered").glob("[!.]*")] == ["a"]
    # The prompt of a calibration row is not asked again.
    answered = rows_of(with_prompts.path("answered/a/probe.jsonl"))
    assert 0 < len(answered) <= 2
    assert with_prompts.read("bench.json")["provenance"]["n_answers"] == len(answered)
    merges = without.read("merges.json")
    merged = any("a" in merge["members"] and len(merge["members"]) > 1 for merge in merges)
    changed = hash_tree(with_prompts.path("merged")) != hash_tree(without.path("merged"))
    assert changed == merged


def test_prompts_that_nothing_reads_are_not_answered(beside):
    for changes in ({"merge_method": "linear"}, {"budget": "60%"}):
        assert "answer" not in Run(beside.replace(**changes)).stages()
    assert "answer" in Run(beside.replace(refine=True, merge_method="linear")).stages()


def test_bad_prompts_are_told_by_file_and_line(alone):
    for file, rows, text in (
        ("test", [{"prompt": "p?", "completion": "c"}, {"prompt": "q?"}], "has no answer, as 1"),
        ("probe", [{"prompt": ""}], '"prompt" must be a non-empty string'),
        ("probe", [{"prompt": "What is it to be " * 200}], "the model's context"),
    ):
        path = Path(alone.tasks) / "a" / f"{file}.jsonl"
        good = path.read_text()
        write_jsonl(path, rows)
        with pytest.raises(InputError, match=text) as caught:
            run(alone, quiet=True)
        (line,) = caught.value.problems
        assert line.startswith(str(path)) or "task a" in line
        path.write_text(good)
    assert not Path(alone.output).exists()
