"""Refining what a plan stores: codes and bytes stay, and the result comes closer."""

import itertools
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import log_probabilities, refinable
from mlx.utils import tree_flatten, tree_map

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.compact_file import index_of, read_compact, write_compact
from d2c_mlx.compress.quantize import compress
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.refine.refine import Member, TrainOptions, plain, pull_back, refine, student_of

FAST = TrainOptions(steps=40, rate=2e-2)
# Several levels in one module, and numbers in 16 bit.
LEVELS = {"low": ((2, 2),), "mixed": ((1, 4), (2, 2)), "sixteen": ((1, 16), (1, 3))}


@pytest.fixture
def base(tmp_path):
    return Model(str(refinable(tmp_path, ["a", "b"]).model))


@pytest.fixture
def members(tmp_path, base):
    paths = refinable(tmp_path / "more", ["a", "b"])
    return [
        Member(
            read_adapter(paths.adapters / name, base.module_shapes),
            base.encode(name, load_task(paths.tasks / name).probe),
            gain=1.0,
        )
        for name in ("a", "b")
    ]


@pytest.fixture(params=LEVELS)
def form(request, members):
    adapter = members[0].adapter
    return compress(adapter, dict.fromkeys(adapter.modules, LEVELS[request.param]))


def numbers_of(form):
    """Every stored array, by name."""
    return {
        (path, level.bits, side, name): getattr(getattr(level, side), name).tolist()
        for path, levels in form.modules.items()
        for level, side, name in itertools.product(levels, "ab", ("weight", "scales", "biases"))
    }


def codes_of(form):
    """The packed codes of every factor below 16 bits, which may not change."""
    return {key: some for key, some in numbers_of(form).items()
            if key[-1] == "weight" and key[1] != 16}  # fmt: skip


def divergence(base, form, members):
    """Mean over the tasks, by float64 numpy over the whole model's logits."""
    found = []
    for one in members:
        own, theirs = (
            np.concatenate([log_probabilities(base, who, row) for row in one.probe.examples])
            for who in (one.adapter, form.adapter(base.dtype))
        )
        found.append((np.exp(own) * (own - theirs)).sum(axis=-1).mean() / one.gain)
    return np.mean(found)


def dequantized(part):
    """The rows of a stored factor in float64, by MLX's own `dequantize`."""
    if part.bits == 16:
        return part.weight.astype(np.float64)
    scales, biases = (mx.array(x.astype(np.float32)) for x in (part.scales, part.biases))
    rows = mx.dequantize(mx.array(part.weight), scales, biases, part.group_size, part.bits)
    return np.array(rows, np.float64)[:, : part.width]


def test_the_start_is_what_is_stored(base, form):
    student = student_of(form, base.dtype)
    factors = student.factors(student.start)
    assert factors.keys() == form.modules.keys()
    for path, levels in form.modules.items():
        a, b = (np.array(x[0], np.float64) for x in factors[path])
        assert a.shape[1] == sum(level.rank for level in levels)
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=1e-3)
        expected = sum(dequantized(level.a).T @ dequantized(level.b) for level in levels)
        np.testing.assert_allclose(a @ b, expected, atol=1e-6)


def test_what_is_made_of_the_start_is_the_same_form(base, form):
    student = student_of(form, base.dtype)
    made = student.form(student.start)
    assert numbers_of(made) == numbers_of(form)
    assert (made.name, made.nbytes) == (form.name, form.nbytes)


def along(t, x, step):
    return x + t * step


def test_gradients_of_scales_and_biases_against_finite_differences(base, members, form):
    student, model = student_of(form, base.dtype), Distiller(base)
    rows = model.teacher_rows(members[1].adapter, members[1].probe)
    base.attach(plain(form, base.dtype))
    weights = [(0.0, 1.0)] * len(rows)
    each = mx.array(np.repeat(weights, [r.example.n_targets for r in rows], axis=0), mx.float32)
    by_factor = model.gradient(student.factors(student.start), rows, weights)
    gradient = pull_back(student.factors, student.start, by_factor)
    rng = np.random.default_rng(0)
    for path, levels in student.start.items():
        step = tree_map(lambda x: mx.array(rng.normal(size=x.shape).astype(np.float32)), levels)
        size = sum(float((x * x).sum()) for _, x in tree_flatten(step)) ** 0.5
        pairs = zip(tree_flatten(gradient[path]), tree_flatten(step))
        expected = sum(float((g * d).sum()) for (_, g), (_, d) in pairs) / size

        def at(t, path=path, levels=levels, step=step, size=size):
            moved = {**student.start, path: tree_map(partial(along, t / size), levels, step)}
            return float(model.loss(student.factors(moved), rows, each))

        found = (at(1e-3) - at(-1e-3)) / 2e-3
        assert found == pytest.approx(expected, rel=3e-2, abs=3e-2)


@pytest.mark.parametrize("n", [1, 2])
def test_it_comes_closer_and_keeps_codes_and_bytes(base, members, form, n, tmp_path):
    """One task, as most of a plan's adapters have, or two; as read from the file."""
    refined = refine(base, form, members[:n], FAST)
    made = refined.adapter
    assert refined.after < 0.8 * refined.before
    assert codes_of(made) == codes_of(form) and made.nbytes == form.nbytes
    write_compact(tmp_path / "pack", [made])
    assert index_of([made]).tensors() == index_of([form]).tensors()
    for said, one in ((refined.before, form), (refined.after, read_compact(tmp_path / "pack", 0))):
        assert divergence(base, one, members[:n]) == pytest.approx(said, abs=1e-4)


@pytest.mark.parametrize("rate", [1e-12, 1e30])
def test_the_form_itself_is_kept_when_nothing_helps(base, members, form, rate):
    refined = refine(base, form, members[:1], replace(FAST, rate=rate, steps=8))
    assert refined.adapter is form


def test_the_same_seed_gives_the_same_numbers(base, members, form):
    def made(seed):
        return numbers_of(refine(base, form, members[:1], replace(FAST, seed=seed)).adapter)

    assert made(0) == made(0) != made(1)
