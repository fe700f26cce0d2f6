"""Runs with prompts beside rows: the adapters answer them, and merges read the answers too."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.runs import NAMES, stages_started
from helpers.tiny import end_answers, write_jsonl

from d2c_mlx.merge.layerwise import merge_layerwise
from d2c_mlx.merge.merging import merge
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config_file import load_config
from d2c_mlx.run.directory import RunDirectory
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.utils.errors import InputError, InputWarning
from d2c_mlx.utils.files import hash_tree


@pytest.fixture
def plain(config):
    """Four adapters of a model that ends its answers, in one merge."""
    end_answers(config.model)
    return config.replace(budget="1", baselines=())


@pytest.fixture
def prompts(plain):
    """The same with prompts of two of the four."""
    rows = [
        {"task": name, "prompt": f"Question {i} for {name}?"} for name in "ac" for i in range(4)
    ]
    file = write_jsonl(Path(plain.adapters).parent / "prompts.jsonl", rows)
    return plain.replace(unlabelled=str(file), output=f"{plain.output}-prompts")


@pytest.mark.slow
def test_merges_read_the_answers_and_nothing_else_does(plain, prompts):
    without, session = (run(one, quiet=True) for one in (plain, prompts))
    for name in ("losses.json", "clusters.json"):
        assert session.read(name) == without.read(name)
    places = {path.relative_to(session.path("answered")) for path in
              session.path("answered").glob("*/*")}  # fmt: skip
    assert {str(path) for path in places} == {"a/probe.jsonl", "c/probe.jsonl"}
    (merged,) = (load_pack(one.path("pack")).load("a") for one in (session,))
    assert hash_tree(session.path("merged")) != hash_tree(without.path("merged"))

    base, rows = session.inputs.base, []
    for name, probe in zip(NAMES, session.inputs.probes):
        file = session.path("answered") / name / "probe.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        own = base.encode(name, [json.loads(line) for line in lines]) if lines else None
        assert len(lines) in ((1, 2, 3, 4) if name in "ac" else (0,))
        rows.append(ExampleSet(name, probe.examples + (own.examples if own else ())))
    expected = merge_layerwise(base, session.adapters, rows)
    assert merged.modules.keys() == expected.modules.keys()
    for path, lora in merged.modules.items():
        wanted = expected.modules[path].delta()
        assert abs(lora.delta() - wanted).max() < 0.01 * abs(wanted).max()

    n = sum(len(some.examples) - len(probe.examples)
            for some, probe in zip(rows, session.inputs.probes))  # fmt: skip
    for name in ("report.md", "report.html"):
        said = f"{n} answers of the adapters to your prompts were used beside the calibration rows"
        assert said in session.path(name).read_text()
        assert "answers of the adapters" not in without.path(name).read_text()


@pytest.mark.slow
def test_a_plan_reads_rows_alone(plain, prompts):
    """Its merges are compared with other forms; only training reads the answers."""
    changes = {"budget": "30%", "refine": True}
    without, session = (run(one.replace(**changes), until="refine", quiet=True)
                        for one in (plain, prompts))  # fmt: skip
    merges = [
        merge(one.library.by_teacher, (0, 2), one.config.merging) for one in (without, session)
    ]
    assert merges[0].method == "layerwise"
    assert merges[0].adapter.digest == merges[1].adapter.digest
    assert session.read("plan.json") == without.read("plan.json")
    assert hash_tree(session.path("refined")) != hash_tree(without.path("refined"))


@pytest.mark.slow
def test_several_runs_of_one_comparison_share_the_answers(prompts, command):
    output = Path(prompts.output).with_name("compared")
    words = ["compare", "--merge-methods", "layerwise,linear", "--budgets", "2", "--refine",
             "--refine-steps", "2", "--output", output]  # fmt: skip
    for name in ("model", "adapters", "tasks", "unlabelled"):
        words += [f"--{name}", getattr(prompts, name)]
    words += ["--probe-examples", "3", "--test-examples", "2"]
    code, _, err = command(*words)
    assert code == 0, err
    first, second = sorted(path.parent for path in output.glob("*/answered"))
    assert hash_tree(first / "answered") == hash_tree(second / "answered")
    for out in (first, second):
        assert RunDirectory(out).is_finished(load_config(out / "config.yaml", {}), ["report"])
    started = [stages_started(out) for out in (first, second)]
    code, _, err = command(*words)
    assert code == 0 and "run 2 of 2" in err and err.count(", done") == 2
    assert [stages_started(out) for out in (first, second)] == started
    # One that is made anew takes the answers of the other.
    shutil.rmtree(second)
    assert command(*words)[0] == 0
    assert hash_tree(first / "answered") == hash_tree(second / "answered")


@pytest.mark.parametrize("rows", [True, False], ids=["beside rows", "alone"])
def test_prompts_of_an_adapter_that_is_left_out_are_too(prompts, rows):
    names = [name for name in NAMES if name != "b" or rows]
    lines = [{"task": name, "prompt": f"Question {i}?"} for name in names for i in range(4)]
    write_jsonl(Path(prompts.unlabelled), lines)
    (Path(prompts.adapters) / "a" / "adapter_config.json").write_text("{")
    config = prompts.replace(skip_bad=True, tasks=prompts.tasks if rows else None)
    with pytest.warns(InputWarning, match="left out 1 of 4: a" if rows else "left out 2 of 4: a"):
        inputs = Inputs(config)
    assert [*inputs.asked.prompts] == inputs.names == (["b", "c", "d"] if rows else ["c", "d"])


@pytest.mark.filterwarnings("ignore:unlabelled")
def test_another_split_of_answers_that_are_there_is_said(prompts):
    rows = [{"task": name, "prompt": f"Question {i}?"} for name in NAMES for i in range(8)]
    write_jsonl(Path(prompts.unlabelled), rows)
    config = prompts.replace(tasks=None, probe_examples=2)
    run(config, until="answer", quiet=True)
    text = "probe_examples: found 4, but .*answered has 2 calibration rows a task"
    with pytest.warns(InputWarning, match=text):
        run(config.replace(probe_examples=4), until="answer", quiet=True)


@pytest.mark.slow
def test_a_person_corrects_an_answer(prompts):
    session = run(prompts, until="merge", quiet=True)
    before, losses = hash_tree(session.path("merged")), session.read("losses.json")
    file = session.path("answered") / "a" / "probe.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["completion"] = "Corrected, and longer than it was."
    write_jsonl(file, lines)
    again = run(prompts, until="merge", quiet=True)
    assert "Corrected" in file.read_text() and again.read("losses.json") == losses
    assert hash_tree(again.path("merged")) != before
    file.write_text('{"prompt": 1}\n')
    with pytest.raises(InputError, match="probe.jsonl"):
        run(prompts, until="merge", quiet=True)
    about = session.path("answered") / "prompts.json"
    for damage in (lambda: about.write_text("{"), about.unlink):
        damage()
        with pytest.raises(InputError, match="prompts.json: not readable .*; delete .*answered to"):
            run(prompts, until="merge", quiet=True)


def test_answers_that_do_not_end_are_left_out_and_it_is_said(prompts):
    path, answered = Path(prompts.model) / "config.json", Path(prompts.output) / "answered"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, "eos_token_id": 9999}))
    with pytest.raises(InputError, match="fewer than 1 prompts of a, c have an answer that ends"):
        run(prompts, until="answer", quiet=True)
    assert not answered.exists()
    path.write_text(json.dumps({**text, "eos_token_id": 79}))
    with pytest.warns(InputWarning, match="left out 6 of 8 prompts, whose answers do not end"):
        run(prompts, until="answer", quiet=True)
    assert sum(file.read_text().count("\n") for file in answered.glob("*/*.jsonl")) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unlabelled")
def test_answers_beside_rows_and_those_that_are_all_the_rows(prompts):
    rows = [{"task": name, "prompt": f"Question {i} for {name}?"} for name in NAMES
            for i in range(4)]  # fmt: skip
    write_jsonl(Path(prompts.unlabelled), rows)
    alone = prompts.replace(tasks=None)
    kinds = {"beside": prompts, "without": alone}
    for (kind, first), second in zip(kinds.items(), (alone, prompts)):
        place = f"{prompts.output}-{kind}"
        run(first.replace(output=place), until="answer", quiet=True)
        text = f"answers made {kind} --tasks, expected .* another --output, or delete them"
        with pytest.raises(InputError, match=text):
            run(second.replace(output=place), until="answer", quiet=True)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"merge_method": "ties"}, "merge_method ties does not read answers to"),
        ({"budget": "50%"}, "no plan reads answers to"),
    ],
)
def test_where_nothing_would_read_the_answers(prompts, options, text):
    with pytest.raises(InputError, match=f"refine: found False, but beside --tasks {text}"):
        prompts.replace(**options)
    assert prompts.replace(refine=True, merge_method="ties").refine
