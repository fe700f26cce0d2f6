"""Numbers at the ends of their range, and libraries at the ends of theirs.

Elsewhere: NaN and infinity in files and options (test_bad_input, test_config), updates of zero,
equal adapters, large and tiny factors and every rank in every merge (in merge/), rows without
a target (test_tasks, test_bad_input), stored forms (test_quantize).
"""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from helpers.command import problems_of
from helpers.loras import P, assert_close, dense
from helpers.runs import config_of
from helpers.tiny import ALL, Library, library, peft_adapter, task, tiny_model

from d2c_mlx import Adapter, LoRA, load_pack, read_adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.pipeline import run
from d2c_mlx.utils.errors import AdapterError, ModelError

# What float16 holds


def half(a, b, scale=1.0):
    """The factors as they are stored in 16 bit."""
    return Adapter("x", {P: LoRA(mx.array(a), mx.array(b), scale)}).uniform(mx.float16).modules[P]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
@pytest.mark.parametrize(("size_a", "size_b"), [(1e6, 1e-4), (1e-4, 1e6), (1e-9, 1e3), (3e9, 1e-9)])
def test_factors_out_of_float16s_range_are_balanced(dtype, size_a, size_b):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(8, 3)), rng.normal(size=(3, 6))
    # One component is in range: it keeps its bits.
    a[:, 1:], b[1:] = a[:, 1:] * size_a, b[1:] * size_b
    lora = LoRA(mx.array(a).astype(dtype), mx.array(b).astype(dtype), 3.0)
    small = half(lora.a, lora.b, 3.0)
    assert small.a.dtype == small.b.dtype == mx.float16 and small.scale == 3.0
    for j in range(3):
        whole, stored = (
            np.outer(*(np.array(x.astype(mx.float32)) for x in (module.a[:, j], module.b[j])))
            for module in (lora, small)
        )
        assert_close(stored, whole, np.linalg.norm(whole), 2e-3)
    assert mx.array_equal(small.a[:, 0], lora.a[:, 0].astype(mx.float16))


def test_what_needs_no_balance_and_what_none_holds():
    """Stored float16 factors keep their bits, subnormal ones too; a component of zero stays zero;
    numbers too small for anything are zero; those too large are refused."""
    a, b = mx.full((4, 2), 6e-8, mx.float16), mx.full((2, 4), 6e4, mx.float16)
    same = half(a, b, 0.5)
    assert mx.array_equal(same.a, a) and mx.array_equal(same.b, b) and mx.all(same.a > 0)
    zero = half([[1e30, 1.0]] * 4, [[0.0] * 4, [2.0] * 4])
    assert np.array_equal(dense(zero), np.full((4, 4), 2.0))
    assert not dense(half(np.full((4, 2), 1e-40, "f4"), np.full((2, 4), 1e-40, "f4"))).any()
    large = LoRA(mx.full((4, 2), 1e6), mx.full((2, 4), 1e6))
    big = Adapter("big", {P: large, "model.layers.0.other": large})
    (problem,) = problems_of(big.uniform, mx.float16)
    assert problem.startswith("big: factors of 2 modules are too large for float16")
    assert Adapter("big", {P: large}).uniform(mx.bfloat16).modules[P].a.dtype == mx.bfloat16


@pytest.mark.parametrize(("size_a", "size_b", "scale"), [(1, 6e4, 4.0), (6e4, 1e-5, 1e-3)])
def test_scales_are_folded_within_float16s_range(tmp_path, size_a, size_b, scale):
    """Stored in float16 they fit; with the scale in `b`, as they are attached, they would not."""
    base = Model(str(tiny_model(tmp_path / "m", mx.float16)))
    base.compute_dtype = mx.float16  # as on a GPU
    path, (width, out) = next(iter(base.module_shapes.items()))
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.uniform(0.5, 1, s) * size)
            for s, size in (((width, 2), size_a), ((2, out), size_b)))  # fmt: skip
    lora = LoRA(a.astype(mx.float16), b.astype(mx.float16), scale)
    attached = LoRA(*(x[0] for x in base.stacked_factors(path, [Adapter("x", {path: lora})])))
    assert attached.a.dtype == attached.b.dtype == mx.float16
    assert_close(dense(attached), dense(lora), np.linalg.norm(dense(lora)), 1e-3)


# What is refused at the door


def test_an_update_beyond_reason_is_refused(tmp_path):
    path = peft_adapter(tmp_path, "x", alpha=1e9)
    with pytest.raises(AdapterError, match="4 modules change their weight.*at most 1e\\+06 is"):
        read_adapter(path, ALL)
    for size, right in ((1e30, 1.0), (3e38, 3e38), (1e4, 1.0)):
        lora = LoRA(mx.full((4, 1), size), mx.full((1, 4), right))
        expected = nullcontext() if size == 1e4 else pytest.raises(AdapterError, match="reason")
        with expected:
            check_adapter(Adapter("x", {P: lora}), {P: (4, 4)}, path)


def with_weights(model, change):
    """The model with changed float32 weights."""
    file = model / "model.safetensors"
    weights = {name: x.astype(mx.float32) for name, x in mx.load(str(file)).items()}
    mx.eval(weights)
    mx.save_safetensors(str(file), change(weights), metadata={"format": "mlx"})
    return Model(str(model))


def test_a_loss_that_is_no_number_names_the_base_or_the_adapter(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    tasks = [load_task(paths.tasks / name) for name in "ab"]

    def losses(base, adapter):
        cache = LossCache(tmp_path / "losses.sqlite")
        probes = [base.encode(task.name, task.probe) for task in tasks]
        return Scorer(Engine(base), cache).losses([(adapter, probes)])

    # o_proj is at the end of float32 and gets only zeros, until an adapter gives it a value.
    edge = {"v_proj": lambda x: 0 * x, "o_proj": lambda x: mx.full(x.shape, 3e38)}
    base = with_weights(paths.model, lambda weights: {
        name: next((f(x) for key, f in edge.items() if key in name), x)
        for name, x in weights.items()})  # fmt: skip
    assert np.isfinite(losses(base, None)).all()
    adapter = read_adapter(paths.adapters / "a", base.module_shapes)
    for _ in range(2):  # nor is it in the cache
        with pytest.raises(AdapterError, match="^a: the loss on task 'a' is nan: numbers overflow"):
            losses(base, adapter)
    base = with_weights(paths.model, lambda weights: {k: x * np.nan for k, x in weights.items()})
    with pytest.raises(ModelError, match="^the base model: the loss on task 'a' is nan; its wei"):
        losses(base, None)


# Whole runs


def finished(paths, **options):
    """Losses of a run that came to its end with a pack that verifies."""
    session = run(config_of(paths, paths.model.parent / "run", **options), quiet=True)
    load_pack(session.output / "pack")
    return session.read("bench.json")["methods"]


def zero(adapters):
    for file in adapters.glob("*/adapter_model.safetensors"):
        weights = {k: x * (0 if "lora_B" in k else 1) for k, x in mx.load(str(file)).items()}
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)


def identical(adapters):
    for name in "abc":
        peft_adapter(adapters, name, seed=0)


def extreme_ranks(adapters):
    """Adapters of rank 1, and one of the full rank of a module."""
    for seed, (name, rank) in enumerate({"a": 1, "b": 16, "c": 1}.items()):
        peft_adapter(adapters, name, rank=rank, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["2", "60%"])
@pytest.mark.parametrize("change", [zero, identical, extreme_ranks])
def test_libraries_at_the_ends(tmp_path, change, budget):
    paths = library(tmp_path, ["a", "b", "c"])
    change(paths.adapters)
    methods = finished(paths, budget=budget, baselines=())
    if change is zero:
        assert methods["pack"]["loss"] == methods["individual"]["loss"] == methods["base"]["loss"]
        assert methods["pack"]["kept"] is None
    if change is identical:
        assert methods["pack"]["excess"] < 1e-3  # a tuned scale may even gain


@pytest.mark.parametrize("budget", ["1", "100%"])
def test_one_task(tmp_path, budget):
    methods = finished(library(tmp_path, ["only"]), budget=budget)
    assert methods["pack"]["excess"] < 1e-3  # a tuned scale may even gain


@pytest.mark.slow
def test_many_tasks(tmp_path, request):
    """`--tasks 200`: many losses, and the least of everything else."""
    paths = Library(tiny_model(tmp_path / "model"), tmp_path / "adapters", tmp_path / "tasks")
    n = request.config.getoption("--tasks")
    names = [f"task-{i:03d}" for i in range(n)]
    for seed, name in enumerate(names):
        peft_adapter(paths.adapters, name, rank=1, seed=seed, targets=("self_attn.v_proj",))
        task(paths.tasks, name, 1, 1)
    methods = finished(paths, budget=str(n // 10), merge_method="linear", baselines=())
    pack = load_pack(tmp_path / "run" / "pack")
    assert sorted(pack.tasks) == names and len(pack.adapters) == n // 10
    assert set(methods["pack"]["tasks"]) == set(names)
    assert (tmp_path / "run" / "report.html").stat().st_size < 20_000 * n
