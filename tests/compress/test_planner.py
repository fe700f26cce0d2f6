"""The byte budget on a tiny model: worth, forms, and a plan that becomes a pack."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import expected_regret, library

from d2c_mlx.adapters.adapter import LoRA
from d2c_mlx.cluster.partition import groups_of
from d2c_mlx.cluster.search import MergeEstimates, estimated_partition
from d2c_mlx.compress import plan as plans
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.compact_file import read_compact
from d2c_mlx.compress.forms import Candidate, Forms, choose
from d2c_mlx.compress.quantize import compress, svd_components
from d2c_mlx.compress.storage import allocate, worth
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import merge
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.errors import ConfigError, InputError
from d2c_mlx.utils.files import hash_tree
from d2c_mlx.utils.line_search import FINE_SCALES


def test_worth_falls_where_singular_values_are_equal():
    """But for rounding, by which a component may be worth more than the one before it."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(40, 12)))[0] for _ in range(2))
    energy = {"m": (left.T.astype(np.float32), right.T.astype(np.float32))}
    (values,) = worth(energy, [{"m": 1.0}]).values()
    assert (np.diff(values) <= 0).all() and values[-1] == pytest.approx(1 / 12, rel=1e-5)
    assert allocate({"m": values}, {"m": 80}, 1e6) == {"m": ((12, 8),)}


def test_worth_is_energy_times_gain_and_a_part_for_all(config):
    session = run(config, until="convert", quiet=True)
    one, two = session.library.adapters[:2]
    paths = sorted(one.modules)
    gains = [
        {**dict.fromkeys(paths, 0.0), paths[0]: 3.0, paths[1]: -5.0},
        dict.fromkeys(paths, 2.0),
    ]
    alone = worth(svd_components(one), gains[:1])
    assert {path: values.sum() for path, values in alone.items()} == pytest.approx(
        {path: 0.25 / len(paths) + 0.75 * (path == paths[0]) for path in paths}
    )
    for path, values in alone.items():
        energy = np.linalg.svd(one.modules[path].delta(), compute_uv=False)[: len(values)] ** 2
        assert values / values.sum() == pytest.approx(energy / energy.sum(), abs=1e-6)
    # A merge's are the mean of its members'.
    merged = worth(svd_components(merge_adapters([one, two])), gains)
    assert merged[paths[1]].sum() == pytest.approx((0.25 + 0.75 / 2) / len(paths))
    assert sum(values.sum() for values in merged.values()) == pytest.approx(1)


def test_nothing_is_lost_with_the_own_adapter_whatever_the_probes_say(config):
    """By their answers another scale is better; by what the adapter expects none is."""
    session = run(config, until="probe", quiet=True)
    for i, adapter in enumerate(session.library.adapters):
        scaled = [
            replace(adapter, modules={
                path: LoRA(one.a, one.b, scale * one.scale) for path, one in adapter.modules.items()
            })
            for scale in (1.0, 0.8, 1.4)
        ]  # fmt: skip
        found = [float(session.library.by_teacher.regrets(one, [i])[0]) for one in scaled]
        assert found[0] == pytest.approx(0, abs=1e-4) and min(found[1:]) > 1e-3


def test_where_logits_are_capped_the_probes_themselves_are_measured(config):
    session = run(config, until="probe", quiet=True)
    session.library.scorer.engine.float32_head = None
    found = session.library.by_teacher.regrets(session.library.adapters[0], range(4))
    (losses,) = session.library.scorer.losses(
        [(session.library.adapters[0], session.library.calibration)]
    )
    assert found == pytest.approx(session.library.losses.regret(losses), abs=1e-6)
    assert session.library.by_teacher.regrets(None, [2]) == pytest.approx(
        session.library.losses.regret(session.library.losses.base)[2]
    )


@pytest.fixture
def forms(config):
    """A session after its probe -> its forms in so many bytes."""

    def make(session, room=None):
        capacity = session.capacity
        return Forms(session.library, capacity, room or capacity.room())

    return make


@pytest.fixture
def planned(tmp_path):
    """A session after its probe, and bytes for rows -> the plan and the directory of its files."""

    def make(session, room=None):
        output = tmp_path / f"planned-{len(list(tmp_path.iterdir()))}"
        output.mkdir()
        options = session.config.merging
        return plans.plan(session.library, session.capacity, output, options, room), output

    return make


def test_a_form_is_measured_as_it_is_packed(config, forms):
    """Its regret is that of the mean loss over all of a task's rows, however they are cut."""
    session = run(config.replace(probe_examples=4), until="probe", quiet=True)
    assert all(len(probe.parts) == 2 for probe in session.library.calibration)
    adapter, path = session.library.adapters[2], max(session.library.adapters[2].modules)
    form = Candidate((0, 2), 99, 0.5, False, adapter, {path: ((1, 2),)}, 0.1)
    small = forms(session)
    measured = small.measure(form)
    plain = compress(adapter, form.levels).scaled(measured.scale)
    plain = plain.adapter(session.library.base.dtype)
    assert measured.regret == pytest.approx(
        sum(expected_regret(session, i, plain) for i in (0, 2)), abs=1e-4
    )
    assert small.load(measured).adapter(session.library.base.dtype).digest == plain.digest
    other = forms(session).measure(form, FINE_SCALES[FINE_SCALES.index(2.0) :], 2.0)
    assert other.scale >= 2 and measured.scale in FINE_SCALES


def test_a_merge_is_offered_in_sizes_around_its_tasks_part_of_the_budget(config, forms):
    session = run(config, until="probe", quiet=True)
    merged = merge(session.library.by_teacher, (0, 2), session.config.merging).adapter
    for share in (0.1, 0.2):
        ladder, fair = forms(session, share * session.capacity.total).ladder((0, 2), merged)
        # Two tasks of four have half of the budget, and a merge is as large as an adapter.
        assert fair == pytest.approx(2 * share, rel=0.05)
        shares = [form.share for form in ladder]
        assert min(shares) < fair / 2 and max(shares) > fair / 1.5


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
def test_no_plan_is_larger_than_its_budget_whatever_its_header_takes(config, forms, tmp_path):
    """All four bits in one plan, more than the header has room for; or no room for it at all."""
    session = run(config, until="probe", quiet=True)
    capacity, n, small = session.capacity, len(session.library.names), forms(session)
    every = [Candidate((i,), 0, 1.0) for i in range(n)]
    for i, adapter in enumerate(session.library.adapters):
        every += [small.measure(form) for form in small.ladder((i,), adapter)[0]]
    assert any("8" in str(form.levels) for form in every)
    for set_aside in (capacity.storage.header_nbytes, 1500, 0):
        vars(capacity.storage)["header_nbytes"] = set_aside
        for room in range(1500, 6000, 250):
            chosen = [every[j] for j in choose(every, n, room, capacity.storage)]
            file = tmp_path / "compact.safetensors"
            capacity.storage.write(tmp_path, [small.load(form) for form in chosen if form.adapter])
            assert file.stat().st_size <= room + set_aside
            file.unlink()


@pytest.fixture
def asked(monkeypatch):
    """Members of every merge of a plan, each of which is estimated to lose nothing."""
    members_of = []

    def remember(library, members, options):
        members_of.append(members)
        return merge(library, members, options)

    monkeypatch.setattr(plans, "merge", remember)
    fading = Library.fading.fget

    def harmless(library):
        weakened = fading(library)
        return replace(weakened, regrets=0 * weakened.regrets)

    monkeypatch.setattr(Library, "fading", property(harmless))
    return members_of


@pytest.fixture
def twelve(tmp_path):
    """A budget -> a session of twelve adapters after its probe."""
    paths = library(tmp_path, list("abcdefghijkl"))

    def make(budget):
        return run(
            RunConfig(
                model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
                budget=budget, output=str(tmp_path / "run"), probe_examples=3, test_examples=2,
            ), until="probe", quiet=True,
        )  # fmt: skip

    return make


@pytest.mark.slow
def test_merges_that_lose_nothing_do_not_end_the_search(asked, twelve, planned, monkeypatch):
    """They are tried down to one cluster, though the first are estimated to lose nothing."""
    counted = plans.merge
    monkeypatch.setattr(
        plans, "merge", lambda *arguments: replace(counted(*arguments), regret=1e-3)
    )
    planned(twelve("30%"))
    assert {len(members) for members in asked} > {12}


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["90%", "30%"])
def test_a_partition_is_merged_until_it_loses_what_the_best_plan_loses(
    asked, twelve, planned, budget, monkeypatch
):
    """The cluster with the worst estimate first; nothing of it becomes a candidate then."""
    session, merges_of, bests = twelve(budget), plans._merges, []
    monkeypatch.setattr(
        plans, "_merges", lambda *arguments: bests.append(arguments[-1]) or merges_of(*arguments)
    )
    content = planned(session)[0].content
    taught, options = session.library.by_teacher, session.config.merging
    lost = [
        taught.regrets(merge(taught, members, options).adapter, members).sum() for members in asked
    ]
    estimates = MergeEstimates(session.library.fading, session.library.similarity)
    groups = groups_of(estimated_partition(estimates, 6))
    costs = {group: estimates.of(group).sum() for group in groups if len(group) > 1}
    merges = sorted(costs, key=costs.get, reverse=True)
    assert asked == merges[: len(asked)] and asked != merges
    assert "merged" not in {unit["family"] for unit in content["units"]}
    (best,) = bests
    assert sum(lost[:-1]) < best <= sum(lost)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["90%", "60%", "30%"])
def test_what_estimates_choose_is_measured_and_nearly_as_good_as_the_best_of_all(
    config, budget, forms, planned
):
    session = run(config.replace(budget=budget), until="probe", quiet=True)
    capacity, taught, n = session.capacity, session.library.by_teacher, 4
    plan, output = planned(session)
    assert all(candidate.measured for candidate in plan.chosen)
    every = [Candidate((i,), 0, float(x)) for i, x in enumerate(taught.regrets(None, range(n)))]
    for i, adapter in enumerate(session.library.adapters):
        every += [forms(session).measure(form) for form in forms(session).ladder((i,), adapter)[0]]
    assert plan.content["measured"] < len(every) - n < plan.content["candidates"]
    best = sum(every[j].regret for j in choose(every, n, capacity.room(), capacity.storage)) / n
    # Scales between those that were tried may be a little better.
    assert best - 0.02 <= plan.content["regret"] < 1.25 * best + 0.05
    stored = iter(range(n))
    for candidate in plan.chosen:
        plain = None
        if candidate.adapter:
            plain = read_compact(output / "compact.safetensors", next(stored))
            plain = plain.adapter(session.library.base.dtype)
        regret = taught.regrets(plain, candidate.members).sum()
        assert candidate.regret == pytest.approx(float(regret), abs=1e-6)
    assert sorted(i for candidate in plan.chosen for i in candidate.members) == list(range(n))


@pytest.mark.slow
def test_scales_are_searched_for_the_forms_that_hold_the_regret(config, planned, monkeypatch):
    session, before = run(config.replace(budget="90%"), until="probe", quiet=True), []
    tuned, tune, measure = [], Forms.tune, Forms.measure
    monkeypatch.setattr(
        Forms, "tune", lambda forms, chosen: [before.extend(chosen), tune(forms, chosen)][1]
    )
    monkeypatch.setattr(
        Forms, "measure", lambda forms, form, *scales: [tuned.append(form),
                                                        measure(forms, form, *scales)][1]
    )  # fmt: skip
    planned(session)
    tuned = [form for form in tuned if any(form is other for other in before)]
    others = [
        max(0.0, form.regret)
        for form in before
        if form.adapter and not any(form is other for other in tuned)
    ]
    regrets = sorted(max(0.0, form.regret) for form in tuned)
    assert regrets and others and max(others) <= regrets[0]
    assert sum(others) <= 0.2 * sum(others + regrets) < sum(others) + regrets[0]


@pytest.mark.parametrize("budget", ["200%", "1MB"])
def test_with_room_for_everything_everything_is_kept(config, planned, budget):
    session = run(config, until="probe", quiet=True)  # a run would copy them
    content = planned(session, session.capacity.room(parse_budget(budget)))[0].content
    assert content["base"] == [] and content["regret"] < 0.02
    assert [unit["family"] for unit in content["units"]] == ["own"] * 4


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
