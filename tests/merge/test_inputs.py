"""Activations of a tiny model, and RegMean on them."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import HIDDEN, INTERMEDIATE, library
from mlx.utils import tree_flatten

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.capture import input_activations
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task

Q, K, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
DOWN = "model.layers.1.mlp.down_proj"
TOKENS = mx.array([[5, 9, 3, 17, 8, 30, 2]])


@pytest.fixture
def tiny(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    base = Model(str(paths.model))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "ab"]
    sets = [base.encode(name, load_task(paths.tasks / name).probe) for name in "ab"]
    return base, adapters, sets


def test_activations_are_what_the_modules_see(tiny):
    base, (adapter, _), (examples, _) = tiny
    (found,) = input_activations(base, adapter, [examples], [Q, K, OUT, DOWN])
    assert {path: x.shape for path, x in found.items()} == {
        Q: (examples.n_tokens, HIDDEN),
        K: (examples.n_tokens, HIDDEN),
        OUT: (examples.n_tokens, HIDDEN),
        DOWN: (examples.n_tokens, INTERMEDIATE),
    }
    assert all(x.dtype == np.float32 for x in found.values())
    assert found[Q] is found[K] and found[Q] is not found[OUT]
    # The first block's input: normalised embeddings of the tokens, by hand.
    tokens = [token for example in examples.examples for token in example.tokens]
    weights = dict(tree_flatten(base.model.parameters()))
    embedded = np.array(weights["model.embed_tokens.weight"])[tokens].astype(np.float64)
    norm = np.sqrt((embedded**2).mean(axis=1, keepdims=True) + 1e-5)
    assert found[Q] == pytest.approx(embedded / norm, abs=1e-5)


def test_activations_depend_on_the_adapter_and_leave_the_model_alone(tiny, monkeypatch):
    base, (adapter, _), (examples, _) = tiny

    def modules():
        return [(path, type(module)) for path, module in base.model.named_modules()]

    base.attach(adapter)
    before, names = mx.array(base.model(TOKENS)), modules()
    (adapted,), (bare,) = (
        input_activations(base, each, [examples], [Q, OUT, DOWN]) for each in (adapter, None)
    )
    assert np.array_equal(bare[Q], adapted[Q])
    assert not np.allclose(bare[OUT], adapted[OUT], atol=1e-4)
    assert not np.allclose(bare[DOWN], adapted[DOWN], atol=1e-4)

    def fail(model, x):
        raise RuntimeError("no memory")

    monkeypatch.setattr("d2c_mlx.evaluate.capture.run_blocks", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        input_activations(base, adapter, [examples], [Q])
    base.attach(adapter)
    assert modules() == names and mx.array_equal(base.model(TOKENS), before)


@pytest.mark.parametrize("batch", [1, 60, 10_000])
def test_some_tokens_of_several_sets_by_several_workers(tiny, monkeypatch, batch):
    base, (adapter, _), sets = tiny
    monkeypatch.setattr("d2c_mlx.evaluate.capture._BATCH", batch)
    all_tokens = [input_activations(base, adapter, [one], [Q, K, DOWN])[0] for one in sets]
    step = -(-sets[0].n_tokens // 7)
    found = input_activations(base, adapter, sets, [Q, K, DOWN], 7, Workers(3))
    for some, whole in zip(found, all_tokens):
        assert some[Q] is some[K] and len(some[Q]) <= 7
        for path in (Q, DOWN):
            assert some[path] == pytest.approx(whole[path][::step], abs=1e-5)
