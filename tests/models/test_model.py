"""Losses kept by content; adapters and models that are told apart by all of it."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import library
from mlx_lm.generate import generate_step
from mlx_lm.models.base import scaled_dot_product_attention

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.kernels import attention
from d2c_mlx.models.model import Model
from d2c_mlx.models.stock import stored_dtype
from d2c_mlx.models.tasks import load_task


@pytest.fixture
def tiny(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    base = Model(str(paths.model))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "ab"]
    sets = [base.encode(name, load_task(paths.tasks / name).test) for name in "ab"]
    return Engine(base), adapters, sets


def test_losses_are_computed_once_and_survive_on_disk(tiny, tmp_path):
    engine, (first, second), sets = tiny
    path = tmp_path / "losses.sqlite"
    scorer = Scorer(engine, LossCache(path))
    before = scorer.losses([(first, sets), (None, sets[:1]), (first, sets)])
    assert (scorer.counts["asked"], scorer.counts["done"]) == (5, 3)
    again = Scorer(engine, LossCache(path))
    after = again.losses([(first, sets), (None, sets[:1]), (second, sets)])
    assert [x.tolist() for x in after[:2]] == [x.tolist() for x in before[:2]]
    assert again.counts["done"] == 2
    # Names do not count, all of the content does.
    assert first.digest != second.digest != scaled(second, 2.0).digest
    assert type(first)("other", first.modules, None, ("x",)).digest == first.digest


def test_a_batch_under_several_adapters_has_the_answers_of_each_alone(tiny):
    """By mlx-lm's own generation of single prompts, with one adapter attached."""
    engine, (a, b), _ = tiny
    base, prompts = engine.base, [list(range(5 + i, 9 + 2 * i)) for i in range(6)]
    rows, most = [a, None, b, b, a, None], [3, 8, 5, 6, 2, 7]
    expected = []
    for prompt, adapter, n in zip(prompts, rows, most):
        with base.attached(adapter):
            steps = generate_step(mx.array(prompt), base.model, max_tokens=n)
            tokens = [int(token) for token, _ in steps]
        ends = [i for i, token in enumerate(tokens) if token in base.tokenizer.eos_token_ids]
        expected.append(tuple(tokens[: min(ends, default=n)]))
    assert base.answers(prompts, most, rows) == expected
    assert len({*base.answers([prompts[0]] * 3, [8] * 3, [a, b, None])}) > 1


def test_the_dtype_of_a_model_is_that_of_any_norm():
    model = nn.Module()
    model.embedding_norm = nn.RMSNorm(2)
    model.set_dtype(mx.bfloat16)
    assert stored_dtype(model) == mx.bfloat16 and stored_dtype(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["causal", "boolean", "additive", None])
def test_attention_is_mlx_lms_own(kv_heads, mask):
    rng = np.random.default_rng(0)
    shapes = (3, 4, 5, 8), (3, kv_heads, 7, 8), (3, kv_heads, 7, 8)
    q, k, v = (mx.array(rng.normal(size=shape) * 3).astype(mx.float32) for shape in shapes)
    seen = mx.arange(7) <= mx.arange(2, 7)[:, None]
    given = {"boolean": seen, "additive": mx.where(seen, 0.5, -mx.inf)}.get(mask, mask)
    stock = scaled_dot_product_attention(q, k, v, None, 0.3, given)
    assert mx.allclose(attention(q, k, v, None, 0.3, given), stock, atol=1e-5).item()
