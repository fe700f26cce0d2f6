"""Merges as a pack holds them: every method through the pipeline, rank and scale."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.runs import config_of
from helpers.tiny import library, peft_adapter

from d2c_mlx.evaluate.capture import input_activations
from d2c_mlx.merge.layerwise import merge_layerwise
from d2c_mlx.merge.merging import merge, problem_of, quick_merge
from d2c_mlx.merge.methods import RUN_METHODS, MergeOptions, merge_adapters, scaled
from d2c_mlx.pipeline import run
from d2c_mlx.plugins import MERGE_METHODS, names
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

OPTIONS = MergeOptions()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A measured library of three adapters, one of another rank and other modules."""
    root = tmp_path_factory.mktemp("merging")
    paths = library(root, ["a", "b"])
    peft_adapter(paths.adapters, "c", rank=3, seed=5, targets=("mlp.down_proj",))
    for kind in ("probe", "test"):
        source = (paths.tasks / "a" / f"{kind}.jsonl").read_text(encoding="utf-8")
        (paths.tasks / "c").mkdir(exist_ok=True)
        (paths.tasks / "c" / f"{kind}.jsonl").write_text(source.replace(" a?", " c?"), "utf-8")
    config = config_of(paths, root / "run")
    return run(config, until="probe", quiet=True).library


@pytest.mark.parametrize("method", [*RUN_METHODS, *names(MERGE_METHODS)])
def test_every_method_merges_what_a_run_has(measured, method):
    merged = merge(measured, (0, 1, 2), MergeOptions(method))
    assert merged.method in ("regmean", method) and merged.adapter.sources == ("a", "b", "c")
    losses = measured.scorer.losses([(merged.adapter, measured.calibration)])
    assert np.isfinite(losses).all()
    quick = quick_merge(measured, (0, 1, 2), MergeOptions(method))
    assert math.isfinite(quick.regret) and quick.adapter.base == merged.adapter.base


@pytest.mark.parametrize(
    ("members", "better"),
    [((0, 1, 2), "regmean"), ((0, 1), "regmean++"), ((1, 2), "regmean++")],
)
def test_regmean_again_is_regmean_on_what_reaches_the_merge(measured, members, better):
    """By hand: the inputs under the plain merge, RegMean on them, the better of the two."""
    options = MergeOptions("regmean++")
    plain, again = quick_merge(measured, members, options), merge(measured, members, options)
    adapters = [measured.adapters[i] for i in members]
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    rows = [measured.calibration[i] for i in members]
    inputs = input_activations(measured.base, plain.adapter, rows, paths)
    activations = {path: [each[path] for each in inputs] for path in paths}
    by_hand = merge_adapters(adapters, "regmean", activations=activations)

    def regret(scale):
        adapter = scaled(by_hand, scale).uniform(measured.base.dtype)
        losses = measured.scorer.losses([(adapter, rows)])[0]
        return float(measured.losses.regret(losses, np.array(members)).mean())

    lowest = line_search(regret, COARSE_SCALES)[1]
    assert again.method == better == ("regmean++" if lowest < plain.regret - 1e-3 else "regmean")
    if better == "regmean":
        assert again.adapter.digest == plain.adapter.digest
    else:
        assert again.regret <= lowest + 1e-6


@pytest.mark.parametrize(
    ("members", "cosine", "scale"),
    [((0, 1), -0.9, 1.0), ((1, 2), 0.0, 1.0), ((0, 1, 2), 0.0, 1.4), ((0, 1, 2), 0.9, 1.0)],
)
def test_layerwise_is_the_default_at_a_scale_that_is_not_searched(measured, members, cosine, scale):
    """Two members are few, however unlike."""
    adapters, rows = ([each[i] for i in members]
                      for each in (measured.adapters, measured.calibration))  # fmt: skip
    library = replace(measured)
    vars(library)["similarity"] = np.full((3, 3), cosine) + (1 - cosine) * np.eye(3)
    merged = merge(library, members, OPTIONS)
    expected = merge_layerwise(measured.base, adapters, rows, scale=scale)
    assert (merged.method, merged.scale, merged.regret) == ("layerwise", scale, math.inf)
    assert merged.adapter.digest == expected.uniform(measured.base.dtype).digest


def test_a_merge_is_at_the_best_scale_or_at_that_of_another(measured):
    problem, like = problem_of(measured, OPTIONS), quick_merge(measured, (0, 1), OPTIONS)
    assert like.scale in COARSE_SCALES
    assert next(iter(like.adapter.modules.values())).a.dtype == mx.float16
    for members in ((0, 1), (0, 2)):
        fixed = quick_merge(measured, members, OPTIONS, like.scale)
        taken = problem.merge(members, like=(0, 1))
        assert fixed.scale == like.scale and taken.digest == fixed.adapter.digest
    assert problem.merge((0, 1)).digest == like.adapter.digest
    assert problem.merge((2,), like=(0, 1)).digest == problem.merge((2,)).digest


def test_a_larger_rank_is_for_merges_alone(measured):
    options = MergeOptions(rank=8)
    assert quick_merge(measured, (0, 1), options).adapter.rank == 8
    assert quick_merge(measured, (0,), options).adapter.rank == 4
