"""The byte budget: choices against enumeration, allocations by their rules, plans of a model."""

import ctypes
import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as read_blocks
from gguf.quants import quantize
from helpers.gguf_files import gguf_name, in_llama_rows, read_gguf
from helpers.loras import lora_of, numeric, truncated
from helpers.runs import config_of
from helpers.tiny import ALL, expected_regret, library
from hypothesis import strategies as st

from d2c_mlx import Adapter, load_pack
from d2c_mlx.adapters.gguf_format import read_gguf as read_gguf_lora
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.compress import plan as plans
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.compact_file import MAX_COUNT
from d2c_mlx.compress.forms import Candidate, Forms, _silent_stdout, choose
from d2c_mlx.compress.gguf_form import gguf_store
from d2c_mlx.compress.quantize import compress, svd_components
from d2c_mlx.compress.storage import _BYTES, LOST, allocate, worth
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.pipeline import run
from d2c_mlx.utils.errors import BudgetError, InputError
from d2c_mlx.utils.line_search import FINE_SCALES


def best_by_enumeration(candidates, n_tasks, nbytes):
    lowest = np.inf
    for k in range(1, n_tasks + 1):
        for chosen in itertools.combinations(candidates, k):
            served = sorted(i for candidate in chosen for i in candidate.members)
            if served == list(range(n_tasks)) and sum(x.nbytes for x in chosen) <= nbytes:
                lowest = min(lowest, sum(x.regret for x in chosen))
    return lowest


@numeric(st.integers(1, 4), st.integers(0, 8), st.integers(1, 200), st.integers(0, 2**16), n=40)
def test_the_choice_is_the_best_of_all(n_tasks, n_units, nbytes, seed):
    rng = np.random.default_rng(seed)
    candidates = [Candidate((i,), 0, float(rng.uniform(0.5, 1))) for i in range(n_tasks)]
    for _ in range(n_units):
        members = tuple(np.flatnonzero(rng.random(n_tasks) < 0.5).tolist()) or (0,)
        size, regret = int(rng.integers(1, 100)), float(rng.uniform(-0.1, 1) * len(members))
        candidates.append(Candidate(members, size, regret))
    chosen = [candidates[j] for j in choose(candidates, n_tasks, nbytes)]
    assert sorted(i for x in chosen for i in x.members) == list(range(n_tasks))
    assert sum(x.nbytes for x in chosen) <= nbytes
    best = best_by_enumeration(candidates, n_tasks, nbytes)
    assert sum(x.regret for x in chosen) == pytest.approx(best, abs=1e-6)


def test_a_task_that_nothing_serves():
    with pytest.raises(BudgetError, match="no choice of 1 candidates"):
        choose([Candidate((0,), 10, 0.0)], 2, 100)


def test_nothing_is_printed_while_a_solver_is_at_work(capfd):
    """By C, whose standard output is that of `--json`."""
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with _silent_stdout():
        libc.puts(b"meanwhile")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after"]


def spent(levels, widths):
    return sum(n * widths[path] * _BYTES[bits] for path, ls in levels.items() for n, bits in ls)


@numeric(st.integers(1, 5), st.integers(1, 9), st.floats(0, 3000), st.integers(0, 10**6), n=60)
def test_allocations_fit_and_grow(n_modules, rank, nbytes, seed):
    rng = np.random.default_rng(seed)
    worth = {f"m{i}": np.sort(rng.uniform(0, 1, rank))[::-1] ** 4 for i in range(n_modules)}
    widths = {path: int(rng.integers(10, 200)) for path in worth}
    levels = allocate(worth, widths, nbytes)
    assert spent(levels, widths) <= nbytes + 1e-6
    for given_levels in levels.values():
        bits = [b for _, b in given_levels]
        assert bits == sorted(set(bits), reverse=True) and set(bits) <= set(LOST)
        assert sum(n for n, _ in given_levels) <= rank
    assert allocate(worth, widths, 1e9) == dict.fromkeys(worth, ((rank, 8),))


def test_worth_per_byte_decides():
    worth = {"steep": np.array([2.0, 0.01]), "flat": np.array([1.0, 1.0])}
    widths = dict.fromkeys(worth, 100)
    two, three = (n * 100 * _BYTES[2] + 0.01 for n in (2, 3))
    assert allocate(worth, widths, two) == {"steep": ((1, 2),), "flat": ((1, 2),)}
    assert allocate(worth, widths, three) == {"steep": ((1, 2),), "flat": ((2, 2),)}
    wide = {"steep": 100, "flat": 10_000}
    assert allocate(worth, wide, two) == {"steep": ((1, 4),)}
    worth = {"good": np.array([1e-3]), "nothing": np.zeros(2), "harm": np.array([-1.0, -0.5])}
    assert allocate(worth, dict.fromkeys(worth, 10), 1e9) == {"good": ((1, 8),)}


def test_no_more_alike_than_a_pack_can_count():
    """Rank 600: those that must wait until others have more bits are not forgotten."""
    worth = {"long": 1 / np.sqrt(np.arange(1, 601)), "short": np.ones(3)}
    widths = dict.fromkeys(worth, 100)
    for nbytes in (6_000, 15_000, 1e9):
        levels = allocate(worth, widths, nbytes)
        assert max(n for n, _ in levels["long"]) <= MAX_COUNT
        assert spent(levels, widths) <= nbytes
    assert sum(n for n, _ in levels["long"]) == 600 and levels["short"] == ((3, 8),)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The index of a layout as small takes a large share of a budget."""
    root = tmp_path_factory.mktemp("planned")
    paths = library(root, ["a", "b", "c", "d"])
    return config_of(paths, root / "run", budget="60%", probe_examples=4)


@pytest.fixture(scope="module")
def session(config):
    """The run after its probe."""
    return run(config, until="probe", quiet=True)


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


def test_what_the_adapter_expects_decides_and_the_answers_only_where_logits_are_capped(
    session, monkeypatch
):
    library, rows = session.library, session.library.calibration
    for i, adapter in enumerate(library.adapters):
        jobs = [scaled(adapter, scale) for scale in (1.0, 0.8, 1.4)]
        own, *others = (float(library.by_teacher.regrets(x, [i])[0]) for x in jobs)
        assert own == pytest.approx(0, abs=1e-4) and min(others) > 1e-3
    monkeypatch.setattr(library.scorer.engine, "float32_head", None)
    (losses,) = library.scorer.losses([(library.adapters[0], rows)])
    regrets = replace(library).by_teacher.regrets(library.adapters[0], range(4))
    assert regrets == pytest.approx(library.losses.regret(losses), abs=1e-5)


def forms_in(session, room=None):
    return Forms(session.library, session.capacity, room or session.capacity.room())


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


@pytest.fixture(scope="module", params=["compact", "gguf"])
def planned(request, config, tmp_path_factory):
    """The run until its pack. GGUF: files that llama.cpp reads."""
    output = tmp_path_factory.mktemp(request.param) / "run"
    return run(config.replace(format=request.param, output=str(output)), until="pack", quiet=True)


@pytest.mark.slow
def test_a_plan_becomes_a_pack_within_its_budget(planned):
    plan, pack, library = planned.read("plan.json"), load_pack(planned.output), planned.library
    assert pack.storage == planned.config.format
    sizes = [(pack.path / name).stat().st_size for name in pack.manifest.files]
    assert sum(sizes) == pack.nbytes <= 0.6 * planned.capacity.total
    served = [name for unit in plan["units"] for name in unit["tasks"]] + plan["base"]
    assert plan["units"] and sorted(served) == library.names == sorted(pack.tasks)
    # What was measured is what is packed.
    loaded = [pack.load(name) for name in library.names]
    taught = [float(library.by_teacher.regrets(x, [i])[0]) for i, x in enumerate(loaded)]
    assert np.mean(taught) == pytest.approx(plan["regret"], abs=1e-6)
    regrets = [expected_regret(planned, i, adapter) for i, adapter in enumerate(loaded)]
    assert regrets == pytest.approx(taught, abs=1e-4)
    of = dict(zip(library.names, regrets))
    for unit in plan["units"]:
        assert unit["regret"] == pytest.approx(np.mean([of[x] for x in unit["tasks"]]), abs=1e-4)
    for row in plan["frontier"]:
        assert row["all"] <= row["own"] + 1e-9
        assert row["merged"] is None or row["all"] <= row["merged"] + 1e-9
    if pack.storage == "gguf":
        assert sorted(sizes) == sorted(unit["nbytes"] for unit in plan["units"])
        for name in pack.manifest.files:
            kinds = {x.tensor_type.name for x in GGUFReader(pack.path / name).tensors}
            assert kinds <= {"Q4_0", "Q8_0", "F16"} and kinds != {"F16"}


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


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["90%", "30%"])
def test_what_estimates_choose_is_measured_and_nearly_as_good_as_the_best_of_all(
    session, budget, tmp_path
):
    library, capacity, n = session.library, session.capacity, 4
    room = capacity.room(parse_budget(budget))
    plan = plans.plan(library, capacity, tmp_path, session.config.merging, room)
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


@pytest.mark.parametrize("bits, most", [(8, 0.02), (4, 0.2)])
@pytest.mark.parametrize("rank", [3, 32])
def test_a_planned_form_is_what_the_reader_gets(tmp_path, session, bits, most, rank):
    rng, config = np.random.default_rng(0), session.library.base.config
    adapter = Adapter("x", {m: lora_of(rng, ALL[m], 32, 1.0, mx.float32, 0.3) for m in ALL})
    modules = {m: ((min(rank, *ALL[m]), bits),) for m in ALL}
    form = gguf_store(adapter, modules).scaled(1.7)
    save_gguf(form, tmp_path / "x.gguf", config)
    again = read_gguf_lora(tmp_path / "x.gguf", ALL, config)
    _, deltas = read_gguf(tmp_path / "x.gguf")
    for module, lora in form.adapter().modules.items():
        n = modules[module][0][0]
        expected = in_llama_rows(module, lora.delta())
        np.testing.assert_allclose(deltas[gguf_name(module)], expected, rtol=1e-5, atol=1e-5)
        read = again.modules[module]
        assert mx.array_equal(lora.a, read.a) and mx.array_equal(lora.b, read.b)
        best = truncated(1.7 * adapter.modules[module].delta(), n)
        assert np.linalg.norm(lora.delta() - best) < most * np.linalg.norm(best)
    places = [(t.data_offset, int(t.n_bytes)) for t in GGUFReader(tmp_path / "x.gguf").tensors]
    assert all(0 <= b - a - size < 8 for (a, size), (b, _) in zip(places, places[1:]))
    kinds = {(a.kind.name, b.kind.name) for a, b in form.modules.values()}
    quantized = {8: "Q8_0", 4: "Q4_0"}[bits]
    assert (quantized, quantized if rank == 32 else "F16") in kinds


def test_error_compensation_beats_the_nearest_codes():
    """At the same bytes as `quantize` of the `gguf` package, of the same components."""
    rng, module, kind = np.random.default_rng(1), [*ALL][4], GGMLQuantizationType.Q4_0
    lora = lora_of(rng, (256, 96), 8, 1.0, mx.float32, 0.3)
    nearest = read_blocks(quantize(np.ascontiguousarray(np.array(lora.a).T), kind), kind)
    plain = np.linalg.norm(np.array(lora.b).T @ nearest - lora.delta())
    form = gguf_store(Adapter("x", {module: lora}), {module: ((8, 4),)})
    ours = form.adapter().modules[module].delta()
    assert np.linalg.norm(ours - lora.delta()) < 0.95 * plain


@pytest.mark.slow
@pytest.mark.parametrize("planned", ["gguf"], indirect=True)
def test_no_choice_exceeds_its_budget(planned, tmp_path):
    """Every form of the planner, as large in a file as it was counted; choices of many rooms."""
    capacity, offered, sizes = planned.capacity, [], []
    adapters, storage = planned.library.adapters, capacity.storage
    for room in (5_000, 80_000):
        forms = Forms(planned.library, capacity, room)
        for i, adapter in enumerate(adapters):
            offered += forms.ladder((i,), adapter)[0]
    for form in offered:
        storage.write(tmp_path, [storage.store(form.adapter, form.levels)])
        sizes.append((tmp_path / "0.gguf").stat().st_size)
        assert form.nbytes == sizes[-1] == storage.total([(form.adapter, form.levels)])
    assert len(sizes) >= 12
    bare = [Candidate((i,), 0, 1.0) for i in range(len(adapters))]
    for room in range(1_000, 2 * max(sizes), 5_000):
        chosen = choose([*bare, *offered], len(bare), room)
        assert sum(sizes[j - len(bare)] for j in chosen if j >= len(bare)) <= room
