"""Runs without rows."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import NAMES, stages_started
from helpers.tiny import peft_adapter

from d2c_mlx.compress.plan import plan
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.push import read_bench
from d2c_mlx.pipeline import run
from d2c_mlx.run.run import Run
from d2c_mlx.utils.errors import InputWarning


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
    for adapter in session.library.adapters:
        each = dense_errors(adapter, pack.load(adapter.name))
        found = weights["methods"]["pack"]["tasks"][adapter.name]
        assert found["error"] == pytest.approx(np.mean(list(each.values())) ** 0.5, rel=1e-5)
        assert 0 <= found["kept"] <= 1
    assert "loss" not in weights["methods"]["pack"]
    for name in ("report.md", "report.html"):
        text = session.path(name).read_text(encoding="utf-8")
        assert "Whether the tasks still work is unknown" in text and "None" not in text
    assert not session.path("bench.json").exists() and read_bench(pack) is None
    before = stages_started(session.output)
    run(bare, quiet=True)
    assert stages_started(session.output) == before


def test_rows_that_come_later_are_measured(bare, config):
    run(bare, quiet=True)
    session = run(config.replace(budget="2"), quiet=True)
    assert session.path("bench.json").exists() and not session.path("weights.json").exists()
    assert "held-out rows that costs" in session.path("report.md").read_text(encoding="utf-8")


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
    assert pack.nbytes <= 0.6 * session.capacity.total
    assert session.library.scorer.counts["asked"] == 0
    errors = [np.mean(list(dense_errors(adapter, pack.load(adapter.name)).values()))
              for adapter in session.library.adapters]  # fmt: skip
    assert plan["regret"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert [one["family"] for one in plan["units"]] == ["own"] * 4
    assert "squared error" in session.path("report.md").read_text(encoding="utf-8")


def planned(session, room):
    """`plan.json` of so many bytes for rows."""
    with tempfile.TemporaryDirectory() as output:
        return plan(session.library, session.capacity, Path(output), room=room).content


def test_more_bytes_leave_less_error(bare):
    session = Run(bare.replace(budget="40%"), quiet=True)
    run(bare, until="convert", quiet=True)
    rooms = [400, 1500, 4000, 9000]
    plans = [planned(session, room) for room in rooms]
    for room, content in zip(rooms, plans):
        assert sum(unit["nbytes"] for unit in content["units"]) <= room
    regrets = [content["regret"] for content in plans]
    assert regrets == sorted(regrets, reverse=True) and regrets[0] > 0.5 > 0.05 > regrets[-1]


def test_copies_share_bytes(bare):
    for name in NAMES:
        peft_adapter(Path(bare.adapters), name, seed=1)
    run(bare, until="convert", quiet=True)
    content = planned(Run(bare.replace(budget="40%"), quiet=True), 1500)
    assert "merged" in {unit["family"] for unit in content["units"]}
    assert len(content["units"]) < 4


def test_an_untrained_adapter_takes_no_bytes(bare):
    run(bare, until="convert", quiet=True)
    session = Run(bare.replace(budget="40%"), quiet=True)
    first = session.library.adapters[0]
    empty = {path: replace(lora, b=0 * lora.b) for path, lora in first.modules.items()}
    session.library.adapters[0] = replace(first, modules=empty)
    content = planned(session, 4000)
    assert content["base"] == ["a"]


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
    assert code == 0 and "Whether the tasks still work is unknown" in out and "energy kept" in out
