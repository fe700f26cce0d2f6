"""Candidates of a plan: what components are worth, and what an adapter is measured to lose."""

import gc
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from helpers.runs import planner_of
from helpers.tiny import expected_regret

from d2c_mlx.adapters.adapter import LoRA
from d2c_mlx.compress.allocate import allocate
from d2c_mlx.compress.candidates import Form, worth
from d2c_mlx.compress.quantize import svd_components
from d2c_mlx.compress.storage import compact_store
from d2c_mlx.merge.merging import merge
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.pipeline import run
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


def test_a_candidate_is_measured_as_it_is_packed(config):
    """Its regret is that of the mean loss over all of a task's rows, however they are cut."""
    session = run(config.replace(probe_examples=4), until="probe", quiet=True)
    assert all(len(probe.parts) == 2 for probe in session.library.calibration)
    path = max(session.library.adapters[2].modules)
    form = Form((0, 2), session.library.adapters[2], {path: ((1, 2),)}, "merged", 0.1)
    one = planner_of(session).forms.measure(form)
    assert (one.members, one.family, one.levels) == ((0, 2), "merged", {path: ((1, 2),)})
    plain = compact_store(form.adapter, form.levels, one.scale).adapter(session.library.base.dtype)
    assert one.regret == pytest.approx(
        sum(expected_regret(session, i, plain) for i in (0, 2)), abs=1e-4
    )
    other = planner_of(session).forms.measure(form, FINE_SCALES[FINE_SCALES.index(2.0) :], 2.0)
    assert other.scale >= 2 and one.scale in FINE_SCALES
    assert other.nbytes == one.nbytes


@pytest.mark.parametrize("form", ["compact", "gguf"])
def test_numbers_of_measured_forms_wait_in_a_file(config, form):
    session = run(config.replace(format=form, budget="50%"), until="probe", quiet=True)
    adapter, storage = session.library.adapters[0], session.capacity.storage
    parts = svd_components(adapter)
    levels = storage.allocate(worth(parts, [{}]), 0.5 * session.capacity.sizes[0])
    one = planner_of(session).forms.measure(Form((0,), adapter, levels))
    expected = storage.store(adapter, levels, parts)
    assert arrays(one.stored.load()) == arrays(expected) and len(arrays(expected)) > 4
    assert arrays(one.load()) == arrays(expected.scaled(one.scale))
    file = one.stored._path
    assert file.stat().st_size > sum(len(content) for _, _, content in arrays(expected))
    del one
    gc.collect()
    assert not file.exists()


def arrays(value):
    """Dtype, shape and bytes of all arrays in a stored form, in their order."""
    if isinstance(value, np.ndarray):
        return [(value.dtype, value.shape, value.tobytes())]
    if isinstance(value, Mapping):
        return arrays(tuple(value.values()))
    if is_dataclass(value):
        return arrays(tuple(getattr(value, one.name) for one in fields(value)))
    return [x for one in value for x in arrays(one)] if isinstance(value, tuple) else []


def test_a_merge_is_offered_in_sizes_around_its_tasks_part_of_the_budget(config):
    session = run(config, until="probe", quiet=True)
    forms, total = planner_of(session).forms, session.capacity.total
    units = [
        ((i, i + 2), merge(session.library.by_teacher, (i, i + 2), session.config.merging).adapter)
        for i in (0, 1)
    ]
    for share in (0.1, 0.2):
        room = share * total
        together = list(forms.ladders(units, "merged", room))
        for unit, ladder in zip(units, together):
            # Two tasks of four have half of the budget, and a merge is as large as an adapter.
            fair = forms.fair(*unit, room)
            assert fair == pytest.approx(2 * share, rel=0.05)
            shares = [form.share for form in ladder]
            assert min(shares) < fair / 2 and max(shares) > fair / 1.5
            (alone,) = forms.ladders([unit], "merged", room)
            assert [form.share for form in alone] == shares
