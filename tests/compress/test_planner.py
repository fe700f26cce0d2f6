"""The byte budget on a tiny model: from adapters to a compact pack, within the budget."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import planner_of
from helpers.tiny import expected_regret, library

from d2c_mlx.cluster.estimates import MergeEstimates
from d2c_mlx.cluster.partition import groups_of
from d2c_mlx.cluster.search import estimated_partition
from d2c_mlx.compress import planner
from d2c_mlx.compress.allocate import Candidate
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.compact_file import index_of
from d2c_mlx.compress.estimates import FormEstimates
from d2c_mlx.compress.file_layout import compact_nbytes
from d2c_mlx.compress.planner import Planner
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import merge
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.errors import ConfigError, InputError
from d2c_mlx.utils.files import hash_tree


@pytest.mark.slow
def test_a_plan_becomes_a_pack_within_its_budget(config):
    session = run(config, quiet=True)
    plan, pack = session.read("plan.json"), load_pack(session.path("pack"))
    assert pack.storage == "compact" and pack.nbytes <= 0.6 * session.capacity.total
    served = [name for unit in plan["units"] for name in unit["tasks"]] + plan["base"]
    assert sorted(served) == session.library.names == sorted(pack.tasks)
    # What was measured is what is packed.
    loaded = [pack.load(name) for name in session.library.names]
    found = [
        float(session.library.by_teacher.regrets(adapter, [i])[0])
        for i, adapter in enumerate(loaded)
    ]
    assert np.mean(found) == pytest.approx(plan["regret"], abs=1e-6)
    regrets = [expected_regret(session, i, adapter) for i, adapter in enumerate(loaded)]
    assert regrets == pytest.approx(found, abs=1e-4)
    of = dict(zip(session.library.names, regrets))
    for unit in plan["units"]:
        found = np.mean([of[name] for name in unit["tasks"]])
        assert unit["regret"] == pytest.approx(found, abs=1e-4)
    for row in plan["frontier"]:
        assert row["all"] <= row["own"] + 1e-9
        assert row["merged"] is None or row["all"] <= row["merged"] + 1e-9
    assert [row["all"] for row in plan["frontier"]] == sorted(
        (row["all"] for row in plan["frontier"]), reverse=True
    )
    assert set(session.read("bench.json")["methods"]) == {"base", "individual", "pack"}
    for name in ("report.md", "report.html"):
        assert "an adapter per task" in session.path(name).read_text(encoding="utf-8")
    html = session.path("report.html").read_text(encoding="utf-8")
    assert "% of the adapters' 16-bit bytes" in html


@pytest.mark.slow
def test_no_plan_is_larger_than_its_budget_whatever_its_header_takes(config):
    """More than the header has room for; or no room for it at all."""
    session = run(config, until="probe", quiet=True)
    for set_aside in (session.capacity.header_nbytes, 1500, 0):
        session.capacity.header_nbytes = set_aside
        for room in range(1500, 6000, 1500):
            adapters = planner_of(session).search(room).adapters
            assert compact_nbytes(index_of(adapters)) <= room + set_aside


def probed(tmp_path, budget, **options):
    paths = library(tmp_path, list("abcdefghijkl"))
    config = RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        budget=budget, output=str(tmp_path / "run"), probe_examples=3, test_examples=2, **options,
    )  # fmt: skip
    return run(config, until="probe", quiet=True)


def halved(session):
    """Clusters of the first partition that a plan would merge, and their estimated costs."""
    library = session.library
    estimates = MergeEstimates(library.fading, library.similarity)
    groups = groups_of(estimated_partition(estimates, len(library.names) // 2))
    return {one: estimates.of(one).sum() for one in groups if len(one) > 1}


@pytest.fixture
def asked(monkeypatch):
    """Members of every merge of a plan, each of which is estimated to lose nothing."""
    members_of = []

    def remember(library, members, options):
        members_of.append(members)
        return merge(library, members, options)

    monkeypatch.setattr(planner, "merge", remember)
    fading = Library.fading.fget

    def harmless(library):
        known = fading(library)
        return replace(known, regrets=0 * known.regrets)

    monkeypatch.setattr(Library, "fading", property(harmless))
    return members_of


@pytest.mark.slow
def test_merges_that_lose_nothing_do_not_end_the_search(asked, tmp_path, monkeypatch):
    """They are tried down to one cluster, though the first are estimated to lose nothing."""
    counted = planner.merge
    monkeypatch.setattr(
        planner, "merge", lambda *arguments: replace(counted(*arguments), regret=1e-3)
    )
    session = probed(tmp_path, "30%")
    planner_of(session).search()
    assert {len(members) for members in asked} > {12}


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["90%", "30%"])
def test_a_partition_is_merged_until_it_loses_what_the_best_plan_loses(asked, tmp_path, budget):
    """The cluster with the worst estimate first; nothing of it becomes a candidate then."""
    session = probed(tmp_path, budget)
    found = planner_of(session).search().content
    taught, options = session.library.by_teacher, session.config.merging
    lost = [
        taught.regrets(merge(taught, members, options).adapter, members).sum() for members in asked
    ]
    costs = halved(session)
    merges = sorted(costs, key=costs.get, reverse=True)
    assert asked == merges[: len(asked)] and asked != merges
    assert "merged" not in {unit["family"] for unit in found["units"]}
    assert sum(lost) >= len(session.library.names) * found["regret"]


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["90%", "60%", "30%"])
def test_what_estimates_choose_is_measured_and_nearly_as_good_as_the_best_of_all(
    config, budget, tmp_path
):
    session = run(config.replace(budget=budget), until="probe", quiet=True)
    room = session.capacity.room
    found = planner_of(session).search(room)
    assert all(one.measured for one in found.chosen)
    assert compact_nbytes(index_of(found.adapters)) <= room + session.capacity.header_nbytes
    forms, n = planner_of(session).forms, len(session.library.adapters)
    own = [((i,), adapter) for i, adapter in enumerate(session.library.adapters)]
    every = [forms.measure(form) for ladder in forms.ladders(own, "own", room) for form in ladder]
    assert found.content["measured"] < len(every) <= found.content["candidates"]
    regrets = session.library.by_teacher.regrets(None, range(n))
    every += [Candidate((i,), "base", 0.0, {}, 0, float(x)) for i, x in enumerate(regrets)]
    best = sum(one.regret for one in planner_of(session).fitting(every, room)) / n
    # Scales between those that were tried may be a little better.
    assert best - 0.02 <= found.content["regret"] < 1.25 * best + 0.05
    of = {one.members: one for one in found.chosen}
    for one in found.chosen:
        plain = one.load().adapter(session.library.base.dtype) if one.stored else None
        regret = session.library.by_teacher.regrets(plain, one.members).sum()
        assert one.regret == pytest.approx(float(regret), abs=1e-6)
    assert sorted(i for members in of for i in members) == list(range(4))


@pytest.mark.slow
def test_scales_are_searched_for_the_forms_that_hold_the_regret(config, monkeypatch):
    session, tuned, settled = run(config.replace(budget="90%"), until="probe", quiet=True), [], []
    tune, choice = FormEstimates.tune, Planner._settled

    def remember(planner, *arguments):
        settled.append(choice(planner, *arguments))
        return settled[-1]

    monkeypatch.setattr(Planner, "_settled", remember)
    monkeypatch.setattr(
        FormEstimates, "tune", lambda found, some: [tuned.extend(some), tune(found, some)]
    )
    planner_of(session).search(session.capacity.room)
    stored = [one for one in settled[-2][0] if one.stored]
    others = [max(0.0, one.regret) for one in stored if one not in tuned]
    regrets = [max(0.0, one.regret) for one in tuned]
    assert regrets and others and max(others) <= regrets[-1] <= regrets[0]
    assert sum(others) <= 0.2 * sum(others + regrets) < sum(others) + regrets[-1]


@pytest.mark.parametrize("budget", ["200%", "1MB"])
def test_with_room_for_everything_everything_is_kept(config, budget):
    session = run(config, until="probe", quiet=True)  # a run would copy them
    room = session.capacity.room_of(parse_budget(budget))
    plan = planner_of(session).search(room).content
    assert plan["base"] == [] and plan["regret"] < 0.02
    assert [unit["family"] for unit in plan["units"]] == ["own"] * 4


@pytest.mark.slow
def test_unpacked_it_gives_the_same_adapters(config, tmp_path):
    session = run(config, until="pack", quiet=True)
    pack = load_pack(session.path("pack"))
    tasks = export(pack, "mlx", tmp_path / "plain")
    for name, directory in tasks.items():
        assert (directory is None) == (pack.load(name) is None)
    assert json.loads((tmp_path / "plain" / "tasks.json").read_text("utf-8")) == tasks


@pytest.mark.slow
def test_the_same_plan_again(config, tmp_path):
    first = run(config, until="pack", quiet=True)
    again = run(config.replace(output=str(tmp_path / "again")), until="pack", quiet=True)
    assert hash_tree(first.path("pack")) == hash_tree(again.path("pack"))


def test_a_budget_below_the_header_is_refused_before_anything_is_written(config):
    with pytest.raises(InputError, match="budget: 100B is 100 bytes, and the header"):
        run(config.replace(budget="100B"), quiet=True)
    assert not Path(config.output).exists()


def test_what_a_plan_stores_as_gguf_is_not_refined(config):
    with pytest.raises(ConfigError, match="refine: found True, expected False where a plan is"):
        config.replace(refine=True, format="gguf")


@pytest.mark.slow
def test_only_a_budget_in_bytes_is_planned(config, command):
    assert config.budget.in_bytes
    slots = config.replace(budget="2")
    assert not slots.budget.in_bytes
    session = run(slots, until="merge", quiet=True)
    assert session.path("merges.json").exists() and not session.path("plan.json").exists()
    for until, more in (("plan", []), ("merge", ["--budget", "60%"])):
        code, _, err = command("run", "--until", until, "--output", slots.output, *more)
        assert code == 2 and f"until: found '{until}', expected a stage of this run" in err
