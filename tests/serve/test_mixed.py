"""Batches whose rows have adapters of their own, beside stock mlx-lm."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import ADAPTERS, UP, Q, adapter_of
from helpers.served import NAMES, pack_of
from mlx_lm import load as stock_load

from d2c_mlx.models.model import Model
from d2c_mlx.models.stock import switch
from d2c_mlx.serve.adapters import Adapters


@pytest.mark.parametrize("kind", ["plain", "compact", "unlike"])
def test_a_batch_of_all_adapters_gives_each_rows_own_logits(packs, model_path, tmp_path, kind):
    """One adapter at a time in stock mlx-lm, and rows in any order; ranks in several stacks."""
    base, pack = Model(str(model_path)), packs.get(kind)
    if pack is None:
        wider = [adapter_of(f"r{rank}", [(0, Q), (1, UP)], rank, 0.1, rank) for rank in (40, 300)]
        pack = pack_of(base, [*ADAPTERS, *wider], tmp_path / "pack")
    adapters = Adapters(base, pack, 1 << 30)
    model, _ = stock_load(str(model_path))
    model.set_dtype(mx.float32)
    rows = [None, *pack.tasks, NAMES[0], None]
    tokens = mx.array(np.random.default_rng(0).integers(3, 250, (len(rows), 9)))

    def cache(name):
        return adapters.cache(adapters.names[name] if name else adapters.base_entry)

    merged = [x[0].merge(list(x)) for x in zip(*map(cache, rows))]
    logits = np.array(adapters(tokens, cache=merged))
    for i, name in enumerate(rows):
        adapter = name and pack.load(name)
        switch(model, adapter and adapter.uniform(mx.float32), pack.path)
        np.testing.assert_allclose(logits[i], np.array(model(tokens[i : i + 1]))[0], atol=2e-5)
        alone = np.array(adapters(tokens[i : i + 1], cache=cache(name)))
        np.testing.assert_allclose(alone[0], logits[i], atol=2e-5)
