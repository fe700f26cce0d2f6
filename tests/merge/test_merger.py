"""Merges as a pack holds them: every method through the pipeline, rank and scale."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import library, peft_adapter

from d2c_mlx.evaluate.capture import input_activations
from d2c_mlx.merge.layerwise import LayerwiseOptions, merge_layerwise
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.merge.options import RUN_METHODS
from d2c_mlx.pipeline import run
from d2c_mlx.plugins import MERGE_METHODS, names
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.session import Session
from d2c_mlx.utils.errors import InputError
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search


@pytest.fixture
def config(tmp_path):
    """Three adapters, one of another rank and other modules; room for two."""
    paths = library(tmp_path, ["a", "b"])
    peft_adapter(paths.adapters, "c", rank=3, seed=5, targets=("mlp.down_proj",))
    for kind in ("probe", "test"):
        source = (paths.tasks / "a" / f"{kind}.jsonl").read_text(encoding="utf-8")
        (paths.tasks / "c").mkdir(exist_ok=True)
        (paths.tasks / "c" / f"{kind}.jsonl").write_text(source.replace(" a?", " c?"), "utf-8")
    return RunConfig(
        model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
        budget="2", output=str(tmp_path / "run"), probe_examples=3, test_examples=2,
        baselines=(),     )  # fmt: skip


def merger_of(config):
    return run(config, until="probe", quiet=True).study.merger


@pytest.mark.slow
@pytest.mark.parametrize("method", [*RUN_METHODS, *names(MERGE_METHODS)])
def test_every_method_gives_a_pack(config, method):
    session = run(config.replace(merge_method=method), until="bench", quiet=True)
    methods = session.read("bench.json")["methods"]
    assert methods["pack"] == methods["d2c"]
    used = {entry["method"] for entry in session.read("merges.json")}
    assert used <= {"none", *({"regmean", method} if method == "regmean++" else {method})}
    assert used != {"none"}


@pytest.mark.parametrize(
    ("members", "better"),
    [((0, 1, 2), "regmean"), ((0, 1), "regmean++"), ((1, 2), "regmean++")],
)
def test_regmean_again_is_regmean_on_what_reaches_the_merge(config, members, better):
    """By hand: the inputs under the plain merge, RegMean on them, the better of the two."""
    merger = merger_of(config.replace(merge_method="regmean++"))
    plain, found = merger.quick(members), merger.final(members)
    adapters = [merger._adapters[i] for i in members]
    paths = sorted({path for adapter in adapters for path in adapter.modules})
    probes = [merger._probes[i] for i in members]
    inputs = input_activations(merger._base, plain.adapter, probes, paths)
    again = merge_adapters(
        adapters, "regmean", activations={path: [one[path] for one in inputs] for path in paths}
    )

    def regret(scale):
        adapter = scaled(again, scale).uniform(merger._base.dtype)
        losses = merger._evaluator.losses([(adapter, [merger._probes[i] for i in members])])[0]
        return float(merger._regret(losses, np.array(members)).mean())

    lowest = line_search(regret, COARSE_SCALES)[1]
    assert plain.regret is not None and found.regret is not None
    assert found.method == better == ("regmean++" if lowest < plain.regret - 1e-3 else "regmean")
    assert found == plain if better == "regmean" else found.regret <= lowest + 1e-6


@pytest.mark.parametrize("members", [(0, 1), (1, 2), (0, 1, 2)])
def test_layerwise_is_the_default_at_a_scale_that_is_not_searched(config, members):
    merger = merger_of(config)
    adapters, probes = ([some[i] for i in members] for some in (merger._adapters, merger._probes))
    scale = 1.4 if len(members) > 2 else 1.0
    made = merge_layerwise(merger._base, adapters, probes, LayerwiseOptions(scale))
    found = merger.final(members)
    assert (found.method, found.scale, found.regret) == ("layerwise", scale, None)
    assert found.adapter.digest == made.uniform(merger._base.dtype).digest


@pytest.mark.parametrize(
    ("members", "cosine", "scale"),
    [((0, 1), -0.9, 1.0), ((0, 1, 2), -0.4, 1.4), ((0, 1, 2), 0.9, 1.0)],
)
def test_two_members_are_few_however_unlike(config, members, cosine, scale):
    merger = merger_of(config)
    similarity = np.full((3, 3), cosine) + (1 - cosine) * np.eye(3)
    vars(merger._library)["similarity"] = similarity
    assert merger.final(members).scale == scale


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_scales_hold_what_sums_and_means_of_adapters_ask_for(n):
    """A sum of n equal adapters is one of them at 1 / n, a mean of n that are orthogonal at n."""
    assert line_search(lambda scale: np.log(scale * n) ** 2, COARSE_SCALES)[0] == 1 / n
    assert line_search(lambda scale: np.log(scale / n) ** 2, COARSE_SCALES)[0] == n


@pytest.mark.parametrize(("method", "begins"), [("linear", 1.4), ("iso-c", 2.5 / 3)])
def test_a_sum_of_many_begins_below_a_mean_of_them(config, method, begins):
    """Three times the same update, so a sum is three times too large."""
    merger = merger_of(config)
    merger._adapters = [merger._adapters[0]] * 3
    start = merger._start(merger._unscaled((0, 1, 2), method), (0, 1, 2), method)
    assert start == pytest.approx(begins, rel=1e-3)
    assert merger._start(merger._adapters[0], (0, 1, 2), "regmean") is None


def test_the_scale_is_the_best_of_the_walk(config):
    merger = merger_of(config)
    merged = merger.quick((0, 1))
    assert merged.scale in COARSE_SCALES
    plain = scaled(merger._unscaled((0, 1), "regmean"), merged.scale)
    for path, lora in plain.modules.items():
        difference = np.abs(merged.adapter.modules[path].delta() - lora.delta()).max()
        assert difference <= 2e-3 * np.abs(lora.delta()).max()  # 16 bit
    assert merged.adapter.modules[path].a.dtype == mx.float16


def test_a_merge_may_take_the_scale_of_another(config):
    merger = merger_of(config)
    like = merger.quick((0, 1))
    taken = merger.quick((0, 2), like=(0, 1))
    fixed = merger._scaled(merger._unscaled((0, 2), taken.method), like.scale)
    assert (taken.scale, taken.adapter.digest) == (like.scale, fixed.digest)
    assert merger.quick((2,), like=(0, 1)).method == "none"


def test_a_larger_rank_is_for_merges_alone(config):
    merger = merger_of(config.replace(merge_rank=8))
    assert merger.quick((0, 1)).adapter.rank == 8
    assert merger.quick((0,)).adapter.rank == 4


def test_the_budget_in_bytes_counts_the_larger_rank(config):
    config = config.replace(budget="70%", plan="d2c")
    assert Session(config).inputs.capacity.n_clusters == 1
    with pytest.raises(InputError, match="one merged adapter takes"):
        _ = Session(config.replace(merge_rank=8)).inputs
