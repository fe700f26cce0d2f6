"""The byte budget on a tiny model: worth, forms, and a plan that becomes a pack."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny import expected_regret

from d2c_mlx.compress import plan as plans
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.forms import Candidate, Forms, choose
from d2c_mlx.compress.quantize import compress, svd_components
from d2c_mlx.compress.storage import allocate, worth
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import merge
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.utils.errors import InputError
from d2c_mlx.utils.line_search import FINE_SCALES


def test_worth_falls_where_singular_values_are_equal():
    """But for rounding, by which a component may be worth more than the one before it."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(40, 12)))[0] for _ in range(2))
    energy = {"m": (left.T.astype(np.float32), right.T.astype(np.float32))}
    (values,) = worth(energy, [{"m": 1.0}]).values()
    assert (np.diff(values) <= 0).all() and values[-1] == pytest.approx(1 / 12, rel=1e-5)
    assert allocate({"m": values}, {"m": 80}, 1e6) == {"m": ((12, 8),)}


def test_worth_is_energy_times_gain_and_a_part_for_all(session):
    first, second = session.library.adapters[:2]
    paths = sorted(first.modules)
    odd = {**dict.fromkeys(paths, 0.0), paths[0]: 3.0, paths[1]: -5.0}
    gains = [odd, dict.fromkeys(paths, 2.0)]
    alone = worth(svd_components(first), gains[:1])
    assert {path: values.sum() for path, values in alone.items()} == pytest.approx(
        {path: 0.25 / len(paths) + 0.75 * (path == paths[0]) for path in paths}
    )
    for path, values in alone.items():
        energy = np.linalg.svd(first.modules[path].delta(), compute_uv=False)[: len(values)] ** 2
        assert values / values.sum() == pytest.approx(energy / energy.sum(), abs=1e-6)
    # A merge's are the mean of its members'.
    merged = worth(svd_components(merge_adapters([first, second])), gains)
    assert merged[paths[1]].sum() == pytest.approx((0.25 + 0.75 / 2) / len(paths))
    assert sum(values.sum() for values in merged.values()) == pytest.approx(1)


def test_nothing_is_lost_with_the_own_adapter_whatever_the_probes_say(session, monkeypatch):
    """By their answers another scale is better; by what the adapter expects none is."""
    library = session.library
    for i, adapter in enumerate(library.adapters):
        jobs = [scaled(adapter, scale) for scale in (1.0, 0.8, 1.4)]
        own, *others = (float(library.by_teacher.regrets(x, [i])[0]) for x in jobs)
        assert own == pytest.approx(0, abs=1e-4) and min(others) > 1e-3
    # Where logits are capped, the answers of the rows decide.
    monkeypatch.setattr(library.scorer.engine, "float32_head", None)
    capped, rows = replace(library).by_teacher, library.calibration
    (losses,) = library.scorer.losses([(library.adapters[0], rows)])
    expected = library.losses.regret(losses)
    assert capped.regrets(library.adapters[0], range(4)) == pytest.approx(expected, abs=1e-5)


def forms_in(session, room=None):
    return Forms(session.library, session.capacity, room or session.capacity.room())


@pytest.fixture
def planned(tmp_path):
    """`planned(session, room)`: a plan for so many bytes for rows."""

    def make(session, room):
        return plans.plan(session.library, session.capacity, tmp_path, session.config.merging, room)

    return make


def test_a_form_is_measured_as_it_is_packed(session):
    """Its regret is that of the mean loss over all of a task's rows, however they are cut."""
    assert all(len(probe.parts) == 2 for probe in session.library.calibration)
    adapter, dtype = session.library.adapters[2], session.library.base.dtype
    form = Candidate((0, 2), 99, 0.5, False, adapter, {max(adapter.modules): ((1, 2),)}, 0.1)
    forms = forms_in(session)
    measured = forms.measure(form)
    plain = compress(adapter, form.levels).scaled(measured.scale).adapter(dtype)
    expected = sum(expected_regret(session, i, plain) for i in (0, 2))
    assert measured.regret == pytest.approx(expected, abs=1e-4)
    assert forms.load(measured).adapter(dtype).digest == plain.digest
    other = forms_in(session).measure(form, FINE_SCALES[FINE_SCALES.index(2.0) :], 2.0)
    assert other.scale >= 2 and measured.scale in FINE_SCALES


@pytest.mark.slow
def test_a_plan_becomes_a_pack_within_its_budget(config, tmp_path):
    session = run(config.replace(output=str(tmp_path / "run")), quiet=True)
    plan, pack, library = (
        session.read("plan.json"),
        load_pack(session.path("pack")),
        session.library,
    )
    assert pack.storage == "compact" and pack.nbytes <= 0.6 * session.capacity.total
    served = [name for unit in plan["units"] for name in unit["tasks"]] + plan["base"]
    assert sorted(served) == library.names == sorted(pack.tasks)
    # What was measured is what is packed.
    loaded = [pack.load(name) for name in library.names]
    taught = [float(library.by_teacher.regrets(x, [i])[0]) for i, x in enumerate(loaded)]
    assert np.mean(taught) == pytest.approx(plan["regret"], abs=1e-6)
    regrets = [expected_regret(session, i, adapter) for i, adapter in enumerate(loaded)]
    assert regrets == pytest.approx(taught, abs=1e-4)
    of = dict(zip(library.names, regrets))
    for unit in plan["units"]:
        assert unit["regret"] == pytest.approx(np.mean([of[x] for x in unit["tasks"]]), abs=1e-4)
    for row in plan["frontier"]:
        assert row["all"] <= row["own"] + 1e-9
        assert row["merged"] is None or row["all"] <= row["merged"] + 1e-9
    assert set(session.read("bench.json")["methods"]) == {"base", "individual", "pack"}


@pytest.mark.slow
def test_no_plan_is_larger_than_its_budget_whatever_its_header_takes(session, tmp_path):
    """All four bits in one plan, more than the header has room for; or no room for it at all."""
    storage, n, forms = session.capacity.storage, len(session.library.names), forms_in(session)
    every = [Candidate((i,), 0, 1.0) for i in range(n)]
    for i, adapter in enumerate(session.library.adapters):
        every += [forms.measure(form) for form in forms.ladder((i,), adapter)[0]]
    assert any("8" in str(form.levels) for form in every)
    for set_aside in (storage.header_nbytes, 1500, 0):
        other = replace(storage)
        vars(other)["header_nbytes"] = set_aside
        for room in range(1500, 6000, 250):
            chosen = [every[j] for j in choose(every, n, room, other)]
            other.write(tmp_path, [forms.load(form) for form in chosen if form.adapter])
            assert (tmp_path / "compact.safetensors").stat().st_size <= room + set_aside


def test_merges_are_tried_down_to_one_cluster_while_they_lose_nothing(
    session, planned, monkeypatch
):
    fading, asked = Library.fading.fget, []

    def harmless(library, members, options):
        asked.append(len(members))
        return replace(merge(library, members, options), regret=1e-3)

    def unweakened(library):
        return replace(fading(library), regrets=0 * fading(library).regrets)

    monkeypatch.setattr(plans, "merge", harmless)
    monkeypatch.setattr(Library, "fading", property(unweakened))
    planned(session, session.capacity.room(parse_budget("30%")))
    assert {2, 4} == {*asked}


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["90%", "30%"])
def test_what_estimates_choose_is_measured_and_nearly_as_good_as_the_best_of_all(
    session, budget, planned
):
    library, capacity, n = session.library, session.capacity, 4
    room = capacity.room(parse_budget(budget))
    plan = planned(session, room)
    assert all(candidate.measured for candidate in plan.chosen)
    bare = library.by_teacher.regrets(None, range(n))
    every = [Candidate((i,), 0, float(x)) for i, x in enumerate(bare)]
    forms = forms_in(session, room)
    for i, adapter in enumerate(library.adapters):
        every += [forms.measure(form) for form in forms.ladder((i,), adapter)[0]]
    assert plan.content["measured"] < len(every) - n < plan.content["candidates"]
    best = sum(every[j].regret for j in choose(every, n, room, capacity.storage)) / n
    # Scales between those that were tried may be a little better.
    assert best - 0.02 <= plan.content["regret"] < 1.25 * best + 0.05
    assert sorted(i for candidate in plan.chosen for i in candidate.members) == list(range(n))


def test_a_budget_below_the_header_is_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(InputError, match="budget: 100B is 100 bytes, and the header"):
        run(config.replace(budget="100B", output=str(tmp_path / "run")), quiet=True)
    assert not (tmp_path / "run").exists()
