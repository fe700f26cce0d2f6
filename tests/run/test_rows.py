"""Runs without rows, and rows without an answer: their adapters answer them."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command import problems_of
from helpers.runs import NAMES, stages_started
from helpers.tiny import end_answers, peft_adapter, write_jsonl

from d2c_mlx import load_pack
from d2c_mlx.compress.plan import plan
from d2c_mlx.forecast import forecast
from d2c_mlx.packs.push import read_bench
from d2c_mlx.pipeline import run
from d2c_mlx.run.run import Run
from d2c_mlx.utils.files import hash_tree


@pytest.fixture
def bare(config):
    """Four adapters, room for two, and no rows."""
    return config.replace(tasks=None, budget="2")


def dense_errors(adapter, stored):
    """Squared relative errors of every module of an adapter, from dense updates in float64."""
    errors = []
    for path, lora in adapter.modules.items():
        dense = lora.delta().astype(np.float64)
        other = stored.modules[path].delta() if stored and path in stored.modules else 0.0
        errors.append(np.sum((dense - other) ** 2) / np.sum(dense**2))
    return np.array(errors)


@pytest.mark.slow
def test_slots_by_weights_and_rows_that_come_later(bare, config):
    session = run(bare, quiet=True)
    started = stages_started(session.output)
    assert {*started} == {"convert", "cluster", "merge", "pack", "bench", "report"}
    pack, weights = load_pack(session.path("pack")), session.read("weights.json")["methods"]["pack"]
    assert len(pack.adapters) == 2 and sorted(pack.tasks) == NAMES
    assert {merge["method"] for merge in session.read("merges.json")} <= {"tsv", "none"}
    for adapter in session.library.adapters:
        errors = dense_errors(adapter, pack.load(adapter.name))
        measured = weights["tasks"][adapter.name]
        assert measured["error"] == pytest.approx(errors.mean() ** 0.5, rel=1e-5)
        assert 0 <= measured["kept"] <= 1
    assert "loss" not in weights
    text = session.path("report.html").read_text(encoding="utf-8")
    assert "Whether the tasks still work is unknown" in text and "None" not in text
    assert not session.path("bench.json").exists() and read_bench(pack) is None
    run(bare, quiet=True)
    assert stages_started(session.output) == started
    session = run(config.replace(budget="2"), quiet=True)
    assert session.path("bench.json").exists() and not session.path("weights.json").exists()
    assert "held-out rows that costs" in session.path("report.html").read_text(encoding="utf-8")


def test_alike_adapters_are_merged(bare):
    for name, seed in zip(NAMES, (1, 2, 1, 2)):
        peft_adapter(Path(bare.adapters), name, seed=seed)
    session = run(bare, quiet=True)
    members = sorted(merge["members"] for merge in session.read("merges.json"))
    assert members == [["a", "c"], ["b", "d"]]
    # A merge of copies is not made stronger.
    assert session.read("weights.json")["methods"]["pack"]["error"] < 2
    content = planned(Run(bare.replace(budget="40%"), quiet=True), 1500)
    assert [unit["tasks"] for unit in content["units"]] == [["a", "c"], ["b", "d"]]


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"format": "gguf"}])
def test_bytes_by_errors_of_dw(bare, form):
    session = run(bare.replace(budget="60%", **form), quiet=True)
    plan, pack = session.read("plan.json"), load_pack(session.path("pack"))
    assert pack.nbytes <= 0.6 * session.capacity.total
    assert session.library.scorer.counts["asked"] == 0
    stored = {adapter.name: pack.load(adapter.name) for adapter in session.library.adapters}
    errors = [dense_errors(x, stored[x.name]) for x in session.library.adapters]
    assert plan["regret"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert [unit["family"] for unit in plan["units"]] == ["own"] * 4
    assert "squared error" in session.path("report.html").read_text(encoding="utf-8")


def planned(session, room):
    """`plan.json` of so many bytes for rows."""
    with tempfile.TemporaryDirectory() as output:
        return plan(session.library, session.capacity, Path(output), room=room).content


@pytest.mark.slow
def test_more_bytes_leave_less_error_and_an_untrained_adapter_takes_none(bare):
    session = Run(bare.replace(budget="40%"), quiet=True)
    run(bare, until="convert", quiet=True)
    rooms = [400, 1500, 4000, 9000]
    plans = [planned(session, room) for room in rooms]
    for room, content in zip(rooms, plans):
        assert sum(unit["nbytes"] for unit in content["units"]) <= room
    regrets = [content["regret"] for content in plans]
    assert regrets == sorted(regrets, reverse=True) and regrets[0] > 0.5 > 0.05 > regrets[-1]
    first = session.library.adapters[0]
    empty = {path: replace(lora, b=0 * lora.b) for path, lora in first.modules.items()}
    session.library.adapters[0] = replace(first, modules=empty)
    assert planned(session, 4000)["base"] == ["a"]


def test_commands_that_need_rows_say_so(bare, command):
    given = ["--adapters", bare.adapters, "--model", bare.model, "--output", bare.output]
    for field, words in (
        ("until", "run --until probe"),
        ("tasks", "compare --merge-methods ties --budgets 2"),
    ):
        code, _, err = command(*words.split(), *given)
        assert code == 2 and err.startswith(f"error: {field}: ") and not Path(bare.output).exists()
    code, out, _ = command("run", *given, "--budget", "2", "--dry-run")
    assert code == 0 and "No rows, so nothing is measured" in out


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
    answers = {}
    for prompt, example in zip(prompts, base.encode("t", rows).examples):
        (tokens,) = base.answers([example.prompt_tokens], [256], [adapter])
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
        ("probe", [{"prompt": "What is it to be " * 200}], "the model's context"),
    ):
        path = Path(alone.tasks) / "a" / f"{file}.jsonl"
        good = path.read_text()
        write_jsonl(path, rows)
        (line,) = problems_of(run, alone, quiet=True)
        assert text in line and (line.startswith(str(path)) or "task a" in line)
        path.write_text(good)
    assert not Path(alone.output).exists()
