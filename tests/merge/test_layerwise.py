"""Merging block by block, against whole forwards and dense least squares; what modules read."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import psutil
import pytest
import scipy.linalg
from helpers.loras import dense, dense_fit, truncated
from helpers.runs import config_of
from helpers.tiny import ALL, library, peft_adapter
from mlx.utils import tree_flatten
from threadpoolctl import threadpool_info, threadpool_limits

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.capture import input_activations
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.merge import layerwise
from d2c_mlx.merge.combine import Grams, regmean
from d2c_mlx.merge.layerwise import merge_layerwise, parts_of
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.model import Model, block_index
from d2c_mlx.models.tasks import load_task
from d2c_mlx.run.run import Run
from d2c_mlx.utils.errors import InputError

Q, K, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
DOWN = "model.layers.1.mlp.down_proj"
# In the order in which they run.
ORDER = [
    f"model.layers.{block}.{module}"
    for block in range(2)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]


@pytest.mark.parametrize("shape", [(64, 48), (48, 96)])
@pytest.mark.parametrize("n_tokens", [3, 20, 200])
def test_float32_is_as_near_where_some_inputs_are_thousands_of_others(shape, n_tokens):
    rng = np.random.default_rng(n_tokens)

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    sizes = np.float32(10) ** rng.uniform(-3, 3, shape[0]).astype(np.float32)
    inputs = [normal(n_tokens, shape[0]) * sizes for _ in range(3)]
    factors = [(normal(shape[0], 4) / sizes[:, None], normal(4, shape[1])) for _ in range(3)]
    lacking = [normal(n_tokens, shape[1]) for _ in range(3)]
    root, whole = dense_fit(factors, [x.astype(np.float64) for x in inputs], lacking)
    a, b = regmean(factors, Grams(inputs), 6, lacking)
    assert a.dtype == b.dtype == np.float32
    assert b @ b.T == pytest.approx(np.eye(6), abs=1e-5)
    least = np.linalg.norm(truncated(whole, 6) - whole)
    assert np.linalg.norm(root @ a.astype(np.float64) @ b - whole) <= (1 + 1e-6) * least


@pytest.fixture
def tiny(tmp_path):
    """A base, three adapters of which one has another rank and other modules, their probe rows."""
    paths = library(tmp_path, ["a", "b"])
    peft_adapter(paths.adapters, "c", rank=3, seed=5, targets=("mlp.down_proj",))
    base = Model(str(paths.model))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "abc"]
    sets = [base.encode(name, load_task(paths.tasks / name).probe) for name in "aba"]
    return base, adapters, sets


def test_activations_are_what_the_modules_see(tiny):
    base, (adapter, *_), (examples, *_) = tiny
    paths = [Q, K, OUT, DOWN]
    (inputs,) = input_activations(base, adapter, [examples], paths)
    shapes = {path: (examples.n_tokens, ALL[path][0]) for path in paths}
    assert {path: x.shape for path, x in inputs.items()} == shapes
    assert all(x.dtype == np.float32 for x in inputs.values())
    assert inputs[Q] is inputs[K] and inputs[Q] is not inputs[OUT]
    # The first block's input: normalised embeddings of the tokens, by hand.
    tokens = [token for example in examples.examples for token in example.tokens]
    weights = dict(tree_flatten(base.model.parameters()))
    embedded = np.array(weights["model.embed_tokens.weight"])[tokens].astype(np.float64)
    norm = np.sqrt((embedded**2).mean(axis=1, keepdims=True) + 1e-5)
    assert inputs[Q] == pytest.approx(embedded / norm, abs=1e-5)


def test_a_failure_leaves_the_model_alone(tiny, monkeypatch):
    base, (adapter, *_), (examples, *_) = tiny
    base.attach(adapter)
    before = [(path, type(module)) for path, module in base.model.named_modules()]
    monkeypatch.setattr("d2c_mlx.evaluate.capture.run_blocks", None)
    with pytest.raises(TypeError):
        input_activations(base, adapter, [examples], [Q])
    assert [(path, type(module)) for path, module in base.model.named_modules()] == before


@pytest.mark.parametrize("batch", [1, 60, 10_000])
def test_some_tokens_of_several_sets_by_several_workers(tiny, monkeypatch, batch):
    base, (adapter, *_), sets = tiny
    monkeypatch.setattr("d2c_mlx.evaluate.capture._BATCH", batch)
    step = -(-sets[0].n_tokens // 7)
    few = input_activations(base, adapter, sets, [Q, K, DOWN], 7, Workers(3))
    for inputs, rows in zip(few, sets, strict=True):
        (whole,) = input_activations(base, adapter, [rows], [Q, DOWN])
        assert inputs[Q] is inputs[K] and len(inputs[Q]) <= 7
        for path in (Q, DOWN):
            assert inputs[path] == pytest.approx(whole[path][::step], abs=1e-5)


@pytest.mark.parametrize("n", [0, 1, 3, 6])
def test_tokens_that_all_rows_begin_with_are_not_looked_at(n, tiny):
    rng = np.random.default_rng(0)
    rows = [tuple(rng.integers(100 * i, 100 * i + 99, 8).tolist()) for i in range(6)]
    examples = [Example((*range(700, 700 + n), *row), n + 4) for row in rows]
    sets = [ExampleSet("a", tuple(examples[:3])), ExampleSet("b", tuple(examples[3:]))]
    looked = [np.array(part.hidden)[part.batch.rows, part.batch.columns]
              for part in parts_of(tiny[0], sets, None)]  # fmt: skip
    assert sorted(np.concatenate(looked)) == sorted(token for row in rows for token in row)


def looked_at(examples, sets):
    """Which of a set's tokens are not part of what all rows of all sets begin with."""
    rows = [row.tokens for each in sets for row in each.examples]
    shared = 0
    while len({row[shared] for row in rows}) == 1:
        shared += 1
    assert shared > 4, "the rows' chat template"
    return np.concatenate([np.arange(len(row.tokens)) >= shared for row in examples.examples])


def worth(gradients, n_out):
    """The square root of what outputs are worth, dense and in float64."""
    rows = np.concatenate([*gradients, np.zeros((0, n_out))]).astype(np.float64)
    gram = rows.T @ rows
    size = np.trace(gram) / n_out
    return scipy.linalg.sqrtm(0.7 * gram / size + 0.3 * np.eye(n_out)) if size else np.eye(n_out)


def by_whole_forwards(base, adapters, sets, scale, strength, rank, sketches=()):
    """Every module from forwards of the whole model, by normal equations in float64; dW by path."""
    looked = [looked_at(rows, sets) for rows in sets]

    def inputs_of(adapter, i, path):
        (inputs,) = input_activations(base, adapter, [sets[i]], [path])
        return inputs[path].astype(np.float64)[looked[i]]

    modules, updates = {}, {}
    for path in [path for path in ORDER if any(path in x.modules for x in adapters)]:
        merged = Adapter("m", modules) if modules else None
        inputs = [inputs_of(merged, i, path) for i in range(len(sets))]
        w, own, lacking = np.array(base.weight(path)).astype(np.float64).T, [], []
        for i, (x, adapter) in enumerate(zip(inputs, adapters)):
            lora = adapter.modules.get(path)
            update = dense(lora).T if lora else 0.0 * w
            own.append((update, np.eye(w.shape[1])))
            lacking.append(strength * (inputs_of(adapter, i, path) - x) @ (w + update))
        root, whole = dense_fit(own, inputs, lacking)
        half = worth([sketch[path] for sketch in sketches if path in sketch], w.shape[1])
        u, s, vt = np.linalg.svd(whole @ half, full_matrices=False)
        a = np.linalg.solve(root, u[:, :rank] * s[:rank])
        b = scale * vt[:rank] @ np.linalg.inv(half)
        modules[path], updates[path] = LoRA(mx.array(a), mx.array(b)), (a @ b).T
    return updates


@pytest.mark.parametrize(
    "scale, strength, rank, room, blocks, n_gradients",
    [
        (1.0, 0.0, 64, layerwise._LARGE, {0, 1}, 0),
        (1.0, 0.75, 2, layerwise._LARGE, {0, 1}, 0),
        (1.0, 0.75, 2, layerwise._LARGE, {0, 1}, 5),
        (1.0, 0.75, 64, 0, {0, 1}, 40),
        (1.4, 1.0, 2, 0, {0, 1}, 0),
        (1.0, 0.75, 4, layerwise._LARGE, {1}, 20),
    ],
)
def test_layerwise_is_what_whole_forwards_and_dense_least_squares_give(
    tiny, scale, strength, rank, room, blocks, n_gradients, monkeypatch
):
    """Also where modules are fitted one after the other, and no output is kept.

    Blocks that no member touches are left alone.
    """
    monkeypatch.setattr(layerwise, "_LARGE", room)
    monkeypatch.setattr(layerwise, "_KEPT", room)
    base, adapters, sets = tiny
    kept = [{p: x for p, x in a.modules.items() if block_index(p) in blocks} for a in adapters]
    adapters = [replace(adapter, modules=modules) for adapter, modules in zip(adapters, kept)]
    rng, sketches = np.random.default_rng(0), []
    for modules in kept if n_gradients else ():
        sizes = {path: rng.exponential(1, lora.shape[1]) ** 2 for path, lora in modules.items()}
        sketches.append({path: rng.normal(size=(n_gradients, len(size))) * size
                         for path, size in sizes.items()})  # fmt: skip
    expected = by_whole_forwards(base, adapters, sets, scale, strength, rank, sketches)
    merged = merge_layerwise(
        base, adapters, sets, scale=scale, strength=strength, rank=rank, sketches=sketches
    )
    assert merged.name == "a+b+c" and merged.sources == ("a", "b", "c")
    assert [*merged.modules] == sorted(expected)
    for path, update in expected.items():
        assert merged.modules[path].rank <= rank
        difference = np.abs(merged.modules[path].delta() - update).max()
        assert difference < 2e-3 * np.abs(update).max(), path


def test_the_same_bits_on_several_threads_and_no_trace_in_the_model(tiny):
    base, adapters, sets = tiny

    def digest(most, n_workers):
        return merge_layerwise(base, adapters, sets, Workers(n_workers), most=most).digest

    assert digest(20, 1) == digest(20, 3) != digest(10, 1)
    names = [type(module).__name__ for _, module in base.model.named_modules()]
    assert "_CapturedModule" not in names and not base.attached_factors


def test_every_solver_has_one_thread_of_the_blas(tiny, monkeypatch):
    """More make small solves ten times as slow: they wait for each other."""
    seen = []

    def spied(*args):
        seen.append({x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"})
        return regmean(*args)

    monkeypatch.setattr(layerwise, "regmean", spied)
    with threadpool_limits(2):
        merge_layerwise(*tiny)
    assert seen == [{1}] * len(ORDER)


def test_a_merge_leaves_no_thread_behind(tiny):
    """MLX starts one for every thread that uses it; a plan of 100 adapters once had 4,600."""
    merge_layerwise(*tiny)
    before = {thread.id for thread in psutil.Process().threads()}
    for _ in range(3):
        merge_layerwise(*tiny)
    # Threads of other tests may end meanwhile; none may be new.
    assert {thread.id for thread in psutil.Process().threads()} <= before


def test_a_model_that_cannot_be_run_by_blocks_is_refused(tmp_path, monkeypatch):
    paths = library(tmp_path, ["a", "b"])
    config = config_of(paths, tmp_path / "run", budget="1", merge_method="layerwise")
    assert Run(config).inputs.library.names == ["a", "b"]
    monkeypatch.setattr("d2c_mlx.models.model.parts_are_exact", lambda *_, **__: False)
    with pytest.raises(InputError, match="take regmean"):
        _ = Run(config).inputs
