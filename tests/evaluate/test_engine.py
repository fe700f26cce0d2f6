"""The engine against the plain loop: full logits, one row at a time, no shared prefix."""

import gc
import itertools
import re
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.losses import losses_of, output_derivatives, plain_loss
from helpers.tiny import Gpu, divergence, library, peft_adapter, tiny_model
from scipy.special import log_softmax

from d2c_mlx import LoRA, read_adapter
from d2c_mlx.evaluate.batches import batch_cost, shared_prefix
from d2c_mlx.evaluate.distill import POINTS, Distiller, module_gains, output_sketch
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models import forward
from d2c_mlx.models.forward import find_head, head_in_float32, parts_are_exact
from d2c_mlx.models.kernels import use_fast_exponentials
from d2c_mlx.models.model import Model, _AdaptedLinear
from d2c_mlx.models.tasks import load_task
from d2c_mlx.utils.errors import ConfigError

SWITCHES = ["head", "prefix", "frozen", "fold", "streams", "exponentials"]


def engine_without(base, off):
    """An engine that takes the plain road instead of these optimizations."""
    engine = Engine(base)
    if "head" in off:
        engine._head = None
    if "prefix" in off:
        base._exact[True,] = False
    if "frozen" in off:
        base._exact |= {(i, True): False for i in range(base.n_layers)}
    engine.fold = engine.fold and "fold" not in off
    if "streams" in off:
        engine.workers = Workers(1)
    if "exponentials" in off:
        engine._fast = False
        use_fast_exponentials(base.model, False)
    return engine


def tiny_of(root):
    """A model of four blocks; adapters on all of them, on the last one, and of another rank."""
    paths = library(root, ["a", "b"])
    base = Model(str(paths.model))
    peft_adapter(paths.adapters, "c", rank=3, seed=5, targets=("mlp.down_proj",))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "abc"]
    last = {path: lora for path, lora in adapters[0].modules.items() if ".layers.1." in path}
    adapters.append(type(adapters[0])("last", last))
    before = "what is the answer to this question of the user, " * 2
    sets = []
    for name in "ab":
        rows = load_task(paths.tasks / name).test
        sets.append(base.encode(name, [{**x, "prompt": before + x["prompt"]} for x in rows]))
    assert all(Engine(base)._prefix_of(examples) for examples in sets)
    return base, adapters, sets


@pytest.fixture
def tiny(tmp_path):
    return tiny_of(tmp_path)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """Of the pieces of `tiny`: their plain losses, and their divergences from the third adapter."""
    base, adapters, sets = tiny_of(tmp_path_factory.mktemp("oracle"))
    pieces = list(itertools.product([None, *adapters], sets))
    losses = [plain_loss(base, *piece) for piece in pieces]
    return losses, [divergence(base, adapters[2], *piece) for piece in pieces]


def assert_equals_plain(base, engine, adapters, sets):
    pieces = list(itertools.product([None, *adapters], sets))
    for got, (adapter, examples) in zip(losses_of(engine, pieces), pieces):
        assert got == pytest.approx(plain_loss(base, adapter, examples), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("off", [[], *([name] for name in SWITCHES), SWITCHES])
def test_every_saving_equals_the_plain_loop_with_and_without_a_teacher(tiny, oracle, off):
    base, adapters, sets = tiny
    model = Distiller(base)
    taught = [model.with_teacher(adapters[2], examples) for examples in sets]
    engine = engine_without(base, off)
    pieces = list(itertools.product([None, *adapters], [*taught, *sets]))
    losses, divergences = map(iter, oracle)
    for got, (adapter, examples) in zip(losses_of(engine, pieces), pieces, strict=True):
        if not examples.teacher:
            assert got == pytest.approx(next(losses), rel=1e-5)
            continue
        expected = next(divergences)
        if adapter is adapters[2]:
            assert got == pytest.approx(0, abs=2e-4)
        else:
            assert expected > 0.02 and got == pytest.approx(expected, abs=2e-4)


def test_a_taught_set_is_known_by_its_teacher(tiny):
    base, adapters, (examples, _) = tiny
    model = Distiller(base)
    first, second = (model.with_teacher(adapter, examples.halved()) for adapter in adapters[:2])
    assert len({examples.digest, first.digest, second.digest}) == 3
    assert examples.tokens_digest == first.tokens_digest == examples.digest
    assert [len(part.teacher_targets) for part in first.parts] == [2, 2]
    assert {part.teacher for part in first.parts} == {adapters[0].digest}


@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches_equal_the_plain_loop(tiny, rows):
    base, adapters, sets = tiny
    engine = Engine(base)
    engine.batch_limit = batch_cost(base, engine._n_logits)(rows, 40, 0)
    assert_equals_plain(base, engine, adapters, sets)
    assert max(len(batch) for examples in sets for batch in engine.batches(examples)) == rows
    # Else the plain path would be compared with itself.
    assert engine._head is not None and base.runs_in_parts() and engine.fold
    for adapter, first in ((adapters[-1], 1), (adapters[0], 0)):
        base.attach(adapter)
        assert engine._first_block() == first


@pytest.mark.parametrize("off", [[], ["frozen", "prefix"]])
def test_a_value_does_not_depend_on_what_else_is_asked(tiny, off):
    base, adapters, sets = tiny
    engine = engine_without(base, off)
    pieces = list(itertools.product([None, *adapters], sets))
    together = losses_of(engine, pieces)
    assert together == [losses_of(engine, [piece])[0] for piece in pieces]
    assert together == losses_of(engine, pieces[::-1])[::-1]
    for n_workers in (1, 3):
        engine.workers = Workers(n_workers)
        assert together == losses_of(engine, pieces)


def test_kept_states_are_used_and_change_no_bit(tiny, monkeypatch):
    """The states below are computed for the first adapter only; a second engine has none."""
    base, (*_, last), (rows, _) = tiny
    other = replace(last, modules={path: replace(x, b=-x.b) for path, x in last.modules.items()})
    engine, both = Engine(base), [(last, rows), (other, rows)]
    first = losses_of(engine, both[:1])
    assert len(engine._kept._entries) == 1
    monkeypatch.setattr(engine._kept, "put", None)  # computing them again would fail
    again = losses_of(engine, both)
    assert again[0] == first[0] != again[1]
    assert again == losses_of(Engine(base), both)


def test_a_model_that_does_more_than_its_parts_is_not_cut(tiny):
    """Capped logits; blocks that know their index, and attention that ignores the cache."""
    base, adapters, sets = tiny
    model, inner = base.model, base.model.model
    whole, blocks = type(model), type(inner)

    class Capped(whole):
        def __call__(self, *args, **kwargs):
            return 0.1 * mx.tanh(super().__call__(*args, **kwargs))

    class Odd(blocks):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            return super().__call__(inputs, None, input_embeddings) * len(self.layers)

    model.__class__ = Capped
    assert find_head(model) is None
    assert_equals_plain(base, Engine(base), adapters, sets)
    model.__class__, inner.__class__, base._exact = whole, Odd, {}
    assert not parts_are_exact(model) and not parts_are_exact(model, [1])
    assert_equals_plain(base, Engine(base), adapters, sets)


def test_sliding_windows_count_behind_a_shared_prefix(tmp_path):
    """One that is longer than the window."""
    kinds = ["sliding_attention", "full_attention"]
    base = Model(str(tiny_model(tmp_path / "model", sliding_window=6, layer_types=kinds)))
    prompt = "one two three four five six"
    examples = base.encode("a", [{"prompt": prompt, "completion": f"answer {i}"} for i in "012"])
    engine = Engine(base)
    assert base.runs_in_parts() and len(shared_prefix(examples)) > 6
    assert_equals_plain(base, engine, [], [examples])


@pytest.mark.parametrize("limit", [70e6, 200e6])
def test_the_memory_limit_is_kept(tmp_path, limit):
    """By planning: many long rows, limits from just enough to plenty, measured peak."""
    base = Model(str(tiny_model(tmp_path / "model")))
    rows = [{"prompt": "word " * (3 * i), "completion": "answer " * i} for i in range(1, 25)]
    sets = [base.encode(name, rows) for name in "abcd"]
    mx.clear_cache()
    engine = Engine(base, int(limit) + mx.get_active_memory())
    mx.reset_peak_memory()
    values = losses_of(engine, [(None, examples) for examples in sets])
    assert mx.get_peak_memory() <= engine.memory_limit
    assert values[0] == pytest.approx(plain_loss(base, None, sets[0]), rel=1e-5)


def test_a_limit_that_is_too_small_says_how_much_is_needed(tiny):
    """And a limit of so much is enough."""
    base, _, _ = tiny
    rows = base.encode("a", [{"prompt": "word " * 80, "completion": "answer " * 80}])
    gc.collect()  # Memory that is freed later would count as room.
    small = Engine(base, mx.get_active_memory() + 1000)
    words = r"D2C_MLX_MEMORY_LIMIT: .* MB, but the longest row of a .* needs about (\d+) MB"
    error = pytest.raises(ConfigError, small.batches, rows)
    needed = int(re.search(words, str(error.value))[1])
    assert Engine(base, (needed + 1) * 1_000_000).batches(rows) == [[0]]


def test_the_fingerprint_follows_what_changes_bits(tiny):
    base, _, (rows, other) = tiny
    engine = Engine(base)
    same = engine.fingerprint(rows)
    assert same == Engine(base, 1 << 33).fingerprint(rows) != engine.fingerprint(other)
    assert same != engine_without(base, ["fold"]).fingerprint(rows)
    engine._batches.clear()
    engine.batch_limit = batch_cost(base, engine._n_logits)(1, 40, 0)
    assert same != engine.fingerprint(rows)


def test_a_bias_survives_folding():
    linear = nn.Linear(6, 4)
    slot = _AdaptedLinear(linear)
    x, a, b = mx.random.normal((3, 6)), mx.random.normal((1, 6, 2)), mx.random.normal((1, 2, 4))
    slot.factors = a, b
    beside = slot(x)
    slot.folded = linear.weight + (a[0] @ b[0]).T
    assert mx.allclose(slot(x), beside, atol=1e-5).item()


def test_a_gain_is_the_integral_of_the_derivative_by_the_scale_of_its_module(tmp_path, monkeypatch):
    paths = library(tmp_path, ["a"])
    base = Model(str(paths.model))
    adapter = read_adapter(paths.adapters / "a", base.module_shapes)
    examples = base.encode("a", load_task(paths.tasks / "a").probe)
    scorer, step = Scorer(Engine(base)), 0.05

    def loss(path, at, scale):
        """With all modules scaled alike, but one."""
        modules = {}
        for name, lora in adapter.modules.items():
            a, b = lora.a.astype(mx.float32), lora.b.astype(mx.float32)
            modules[name] = LoRA(a, b, lora.scale * (scale if name == path else at))
        return scorer.losses([(replace(adapter, modules=modules), [examples])])[0][0]

    gains = module_gains(base, adapter, examples)
    assert gains.keys() == adapter.modules.keys() and not base.attached_factors
    for path in adapter.modules:
        slopes = [(loss(path, x, x + step) - loss(path, x, x - step)) / (2 * step) for x in POINTS]
        assert gains[path] == pytest.approx(-np.mean(slopes), rel=0.02, abs=1e-4)
    assert len({round(gain, 6) for gain in gains.values()}) == len(gains)
    # A head that is not linear goes through the whole model.
    monkeypatch.setattr("d2c_mlx.evaluate.distill.find_head", lambda model: None)
    assert module_gains(base, adapter, examples) == pytest.approx(gains, rel=1e-3, abs=1e-6)


def test_a_sketch_projects_the_derivatives_by_the_outputs(tiny):
    """One row's projection is drawn here again; the Gram matrix of a tall sketch is close."""
    base, (adapter, *_), (examples, *_) = tiny
    row = replace(examples, examples=examples.examples[:1])
    sketch, tall = (output_sketch(base, adapter, *x) for x in ((row, 2), (examples, 20_000)))
    assert not base.attached_factors and sketch.keys() == adapter.modules.keys()
    shape = 2, len(row.examples[0].tokens) - 1
    along = np.random.default_rng(0).standard_normal(shape, np.float32)
    base.attach(adapter)
    for path, x in sketch.items():
        of_one, of_all = (
            output_derivatives(base.model, path, x.shape[1], rows) / rows.n_targets**0.5
            for rows in (row, examples)
        )
        expected, gram = along @ of_one / 2**0.5, of_all.T @ of_all
        assert x == pytest.approx(expected, rel=1e-3, abs=1e-4 * np.abs(expected).max())
        assert tall[path].T @ tall[path] == pytest.approx(gram, abs=0.05 * gram.max())


# Bases in 16 bits, as a GPU keeps them; here the same code runs with that device named.


@pytest.mark.parametrize("kind", ["tied", "linear", "bias", "quantized"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_head_in_float32_rounds_no_logit(tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setattr(forward, "_AT_ONCE", 32 * 70)
    monkeypatch.setattr(mx, "default_device", Gpu)
    model = Model(str(tiny_model(tmp_path / "m", dtype))).model
    if kind in ("linear", "bias"):
        model.args.tie_word_embeddings = False
        model.lm_head = nn.Linear(32, model.args.vocab_size, bias=kind == "bias")
        model.lm_head.set_dtype(dtype)
    if kind == "quantized":
        nn.quantize(model, group_size=32, bits=8)
    module = getattr(model, "lm_head", model.model.embed_tokens)
    weight, bias = module.weight, module.get("bias", mx.zeros(1))
    if kind == "quantized":
        scales, biases = (module[x].astype(mx.float32) for x in ("scales", "biases"))
        weight = mx.dequantize(weight, scales, biases, 32, 8)
    wide, bias = (np.array(x.astype(mx.float32), np.float64) for x in (weight, bias))
    hidden = mx.random.normal((5, 32), key=mx.random.key(0)).astype(dtype)
    expected = np.array(hidden.astype(mx.float32), np.float64) @ wide.T + bias
    head = find_head(model)
    head32 = head_in_float32(head)
    assert head32(hidden).dtype == mx.float32
    assert np.array(head32(hidden)) == pytest.approx(expected, abs=2e-6)
    assert abs(np.array(head(hidden).astype(mx.float32)) - expected).max() > 1e-4
    ask = mx.random.normal((5, model.args.vocab_size), key=mx.random.key(1))
    gradient = mx.grad(lambda h: (head32(h) * ask).sum())(hidden.astype(mx.float32))
    assert np.array(gradient) == pytest.approx(np.array(ask) @ wide, abs=1e-4)


def test_a_divergence_is_no_rounding_of_16_bits(tmp_path, monkeypatch):
    """Against the float64 logits of the very states that a model in bfloat16 has."""
    monkeypatch.setattr(mx, "default_device", Gpu)
    paths = library(tmp_path, ["a"])
    base = Model(str(tiny_model(tmp_path / "model", mx.bfloat16)))
    engine, distiller = Engine(base), Distiller(base)
    adapter = read_adapter(paths.adapters / "a", base.module_shapes)
    weaker = scaled(adapter, 0.9)
    examples = base.encode("a", load_task(paths.tasks / "a").test)
    weight = np.array(base.model.model.embed_tokens.weight.astype(mx.float32), np.float64)

    def log_p(which, example):
        base.attach(which)
        states = base.model.model(mx.array([example.tokens[:-1]]))[0, example.first_target - 1 :]
        return log_softmax(np.array(states.astype(mx.float32), np.float64) @ weight.T, axis=-1)

    expected = 0.0
    for example in examples.examples:
        p, q = log_p(adapter, example), log_p(weaker, example)
        expected += (np.exp(p) * (p - q)).sum()
    rows = distiller.teacher_rows(adapter, examples)
    assert distiller.compare(weaker, rows)[:, 1].sum() == pytest.approx(expected, abs=1e-4)
    assert base.compute_dtype == base.dtype and engine.workers.n == 1 and not engine.fold
    base._exact = {(*cut, True): False for cut in [(), *zip(range(base.n_layers))]}
    (loss,) = losses_of(engine, [(weaker, distiller.with_teacher(adapter, examples))])
    assert loss == pytest.approx(expected, abs=1e-4)
