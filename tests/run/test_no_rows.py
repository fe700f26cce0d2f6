"""Runs without rows, and on the adapters' own answers to prompts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import NAMES, stages_started
from helpers.tiny import end_answers, peft_adapter, write_jsonl

from d2c_mlx.adapters.adapter import zeros
from d2c_mlx.forecast import forecast
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.push import read_bench
from d2c_mlx.pipeline import run
from d2c_mlx.run.session import Session
from d2c_mlx.utils.errors import InputError, InputWarning


@pytest.fixture
def bare(config):
    """Four adapters, room for two, and no rows."""
    return config.replace(tasks=None, budget="2")


def dense_errors(adapter, stored):
    """Squared relative errors of every module of an adapter, from dense updates in float64."""
    found = {}
    for path, lora in adapter.modules.items():
        wanted = lora.delta().astype(np.float64)
        other = stored.modules[path].delta() if stored and path in stored.modules else 0.0
        found[path] = np.sum((wanted - other) ** 2) / np.sum(wanted**2)
    return found


def test_slots_by_weights(bare):
    session = run(bare, quiet=True)
    assert stages_started(session.output).keys() == {
        "convert", "cluster", "merge", "pack", "bench", "report"
    }  # fmt: skip
    pack, weights = load_pack(session.path("pack")), session.read("weights.json")
    assert len(pack.adapters) == 2 and sorted(pack.tasks) == NAMES
    assert {one["method"] for one in session.read("merges.json")} <= {"tsv", "none"}
    for adapter in session.adapters:
        each = dense_errors(adapter, pack.load(adapter.name))
        found = weights["methods"]["pack"]["tasks"][adapter.name]
        assert found["error"] == pytest.approx(np.mean(list(each.values())) ** 0.5, rel=1e-5)
        assert 0 <= found["kept"] <= 1
    assert "loss" not in weights["methods"]["pack"]
    for name in ("report.md", "report.html"):
        text = session.path(name).read_text(encoding="utf-8")
        assert "No loss and no answer was measured" in text and "None" not in text
    assert not session.path("bench.json").exists() and read_bench(pack, None) is None
    before = stages_started(session.output)
    run(bare, quiet=True)
    assert stages_started(session.output) == before


def test_rows_that_come_later_are_measured(bare, config):
    run(bare, quiet=True)
    session = run(config.replace(budget="2"), quiet=True)
    assert session.path("bench.json").exists() and not session.path("weights.json").exists()
    assert "On held-out rows" in session.path("report.md").read_text(encoding="utf-8")


def test_alike_adapters_are_merged(bare):
    for name, seed in zip(NAMES, (1, 2, 1, 2)):
        peft_adapter(Path(bare.adapters), name, seed=seed)
    session = run(bare, quiet=True)
    found = sorted(one["members"] for one in session.read("merges.json"))
    assert found == [["a", "c"], ["b", "d"]]
    # A merge of copies is not made stronger.
    assert session.read("weights.json")["methods"]["pack"]["error"] < 2


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"format": "gguf"}])
def test_bytes_by_errors_of_dw(bare, form):
    session = run(bare.replace(budget="60%", **form), quiet=True)
    plan, pack = session.read("plan.json"), load_pack(session.path("pack"))
    assert pack.nbytes <= 0.6 * session.inputs.capacity.total
    assert session.scorer.counts.asked == 0
    errors = [np.mean(list(dense_errors(adapter, pack.load(adapter.name)).values()))
              for adapter in session.adapters]  # fmt: skip
    assert plan["regret"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert [one["family"] for one in plan["units"]] == ["own"] * 4
    assert "squared error" in session.path("report.md").read_text(encoding="utf-8")


def test_more_bytes_leave_less_error(bare):
    session = Session(bare.replace(budget="40%"), quiet=True)
    run(bare, until="convert", quiet=True)
    planner, rooms = session.planner, [400, 1500, 4000, 9000]
    plans = [planner.search(room) for room in rooms]
    for room, plan in zip(rooms, plans):
        assert sum(unit["nbytes"] for unit in plan.content["units"]) <= room
    regrets = [plan.content["regret"] for plan in plans]
    assert regrets == sorted(regrets, reverse=True) and regrets[0] > 0.5 > 0.05 > regrets[-1]


def test_copies_share_bytes(bare):
    for name in NAMES:
        peft_adapter(Path(bare.adapters), name, seed=1)
    run(bare, until="convert", quiet=True)
    plan = Session(bare.replace(budget="40%"), quiet=True).planner.search(1500)
    assert "merged" in {unit["family"] for unit in plan.content["units"]}
    assert len(plan.content["units"]) < 4


def test_an_untrained_adapter_takes_no_bytes(bare):
    run(bare, until="convert", quiet=True)
    session = Session(bare.replace(budget="40%"), quiet=True)
    empty = zeros({path: lora.shape for path, lora in session.adapters[0].modules.items()}, 4)
    session.adapters[0] = replace(session.adapters[0], modules=empty)
    plan = session.planner.search(4000)
    assert plan.content["base"] == ["a"]


def test_a_dry_run_without_rows_measures_nothing(bare):
    found = forecast(bare)
    assert (found.evaluations, found.seconds, found.adapters) == (0, 0, 2)
    assert not Path(bare.output).exists()


@pytest.fixture
def prompts(bare):
    """Four prompts for each adapter, of a model that ends its answers, and the options."""
    end_answers(bare.model)
    rows = [{"task": name, "prompt": f"Question {i} for {name}?"} for name in NAMES
            for i in (0, 1, 2, 3, 3)]  # fmt: skip
    file = write_jsonl(Path(bare.adapters).parent / "prompts.jsonl", rows)
    return bare.replace(unlabelled=str(file), baselines=(), search="estimates")


@pytest.mark.slow
def test_adapters_answer_prompts_and_a_person_corrects_them(prompts):
    assert not any(one.done for one in forecast(prompts).stages)
    with pytest.warns(InputWarning, match="left out 1 of 16 prompts, whose answers do not end"):
        session = run(prompts, until="probe", quiet=True)
    rows = session.path("answered") / "a"
    texts = [(rows / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("probe", "test")]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    base, (adapter, *_) = session.inputs.base, session.adapters
    base.attach(adapter)
    for row in lines:
        asked = base.encode("a", [row]).examples[0].prompt_tokens
        (said,) = base.answers([asked], [256])
        assert row["completion"] == base.tokenizer.decode(said, skip_special_tokens=True).strip()
    assert 2 <= len(lines) <= 4 and len({row["prompt"] for row in lines}) == len(lines)

    losses = session.read("losses.json")
    lines[0]["completion"] = "Corrected."
    write_jsonl(rows / "probe.jsonl", lines[: texts[0].count("\n")])
    again = run(prompts, quiet=True)
    assert "Corrected." in (rows / "probe.jsonl").read_text(encoding="utf-8")
    assert again.read("losses.json")["individual"][0] != losses["individual"][0]
    assert again.read("losses.json")["individual"][1:] == losses["individual"][1:]
    for name in ("report.md", "report.html"):
        text = again.path(name).read_text(encoding="utf-8")
        assert "no held-out rows of yours" in text.replace("&#39;", "'")

    more = [*Path(prompts.unlabelled).read_text().splitlines(), '{"task": "a", "prompt": "New?"}']
    Path(prompts.unlabelled).write_text("\n".join(more))
    with pytest.raises(InputError, match="answered: answers to other prompts"):
        run(prompts, quiet=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unlabelled")
def test_answers_of_other_adapters_are_refused(prompts):
    session = run(prompts, until="answer", quiet=True)
    place, adapters = session.path("answered"), Path(prompts.adapters)
    corrected = [{"prompt": f"{i}?", "completion": "Corrected."} for i in range(2)]
    write_jsonl(place / "a" / "probe.jsonl", corrected)
    peft_adapter(adapters, "a", alpha=60, seed=50)
    with pytest.raises(InputError, match="answered: answers of other adapters, or of another base"):
        run(prompts, until="answer", quiet=True)
    # A directory of an earlier version says nothing of adapters.
    of = json.loads((place / "prompts.json").read_text())
    (place / "prompts.json").write_text(json.dumps(of["prompts"]))
    run(prompts, until="answer", quiet=True)
    (place / "prompts.json").write_text(json.dumps(of))
    peft_adapter(adapters, "a")
    run(prompts, until="answer", quiet=True)
    assert "Corrected." in (place / "a" / "probe.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unlabelled")
def test_answers_that_would_end_elsewhere_are_refused(prompts):
    run(prompts, until="answer", quiet=True)
    (Path(prompts.model) / "generation_config.json").write_text('{"eos_token_id": [41]}')
    with pytest.raises(InputError, match="answers of other adapters, or of another base model"):
        run(prompts, until="answer", quiet=True)


def test_prompts_that_are_too_few(prompts):
    write_jsonl(Path(prompts.unlabelled), [{"task": name, "prompt": "One?"} for name in NAMES])
    with pytest.raises(InputError, match="fewer than 2 prompts for a, b, c, d, expected 2 or more"):
        run(prompts, quiet=True)
    write_jsonl(Path(prompts.unlabelled), [{"task": "x", "prompt": "One?"}])
    with pytest.raises(InputError, match="'x', expected an adapter: a, b, c, d"):
        run(prompts, quiet=True)
    assert not Path(prompts.output).exists()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"refine": True}, "refine: found True, which needs calibration rows: pass --tasks DIR"),
        ({"merge_method": "layerwise"}, "merge_method: found 'layerwise', which needs calibration"),
    ],
)
def test_what_needs_rows_says_so(bare, changes, text):
    with pytest.raises(InputError, match=text):
        bare.replace(**changes)


def test_commands_that_need_rows_say_so(bare, command):
    given = ["--adapters", bare.adapters, "--model", bare.model, "--output", bare.output]
    for field, words in (
        ("until", ["run", "--until", "probe"]),
        ("tasks", ["compare", "--merge-methods", "ties", "--budgets", "2"]),
    ):
        code, out, err = command(*words, *given)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"error: {field}: ")
    assert not Path(bare.output).exists()
    given += ["--budget", "2"]
    code, out, _ = command("run", *given, "--dry-run")
    assert code == 0 and "No rows, so nothing is measured" in out
    with pytest.warns(InputWarning, match="test_examples: 2 does nothing without rows"):
        code, out, _ = command("run", *given, "--test-examples", "2")
    assert code == 0 and "No loss and no answer was measured" in out and "energy kept" in out
