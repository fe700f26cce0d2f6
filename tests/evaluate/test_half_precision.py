"""Bases in 16 bits, as a GPU keeps them; here the same code runs with that device named."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.losses import losses_of
from helpers.tiny import Gpu, library, tiny_model
from scipy.special import log_softmax

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models import forward
from d2c_mlx.models.forward import find_head, head_in_float32
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task


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
    found = mx.grad(lambda h: (head32(h) * ask).sum())(hidden.astype(mx.float32))
    assert np.array(found) == pytest.approx(np.array(ask) @ wide, abs=1e-4)


def test_a_divergence_is_no_rounding_of_16_bits(tmp_path, monkeypatch):
    """Against the float64 logits of the very states that a model in bfloat16 has."""
    monkeypatch.setattr(mx, "default_device", Gpu)
    paths = library(tmp_path, ["a"])
    base = Model(str(tiny_model(tmp_path / "model", mx.bfloat16)))
    engine = Engine(base)  # which chooses the exponentials of this process
    adapter = read_adapter(paths.adapters / "a", base.module_shapes)
    weaker = scaled(adapter, 0.9)
    examples = base.encode("a", load_task(paths.tasks / "a").test)
    weight = np.array(base.model.model.embed_tokens.weight.astype(mx.float32), np.float64)

    def log_p(one, example):
        base.attach(one)
        states = base.model.model(mx.array([example.tokens[:-1]]))[0, example.first_target - 1 :]
        return log_softmax(np.array(states.astype(mx.float32), np.float64) @ weight.T, axis=-1)

    expected = 0.0
    for example in examples.examples:
        p, q = log_p(adapter, example), log_p(weaker, example)
        expected += (np.exp(p) * (p - q)).sum()
    rows = Distiller(base).teacher_rows(adapter, examples)
    found = Distiller(base).compare(weaker, rows)[:, 1].sum()
    assert found == pytest.approx(expected, abs=1e-4)
    assert base.compute_dtype == base.dtype and engine.workers.n == 1 and not engine.fold
    engine._prefix, engine._split = False, dict.fromkeys(range(base.n_layers), False)
    (found,) = losses_of(engine, [(weaker, Distiller(base).with_teacher(adapter, examples))])
    assert found == pytest.approx(expected, abs=1e-4)
