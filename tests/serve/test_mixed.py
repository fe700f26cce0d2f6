"""Batches whose rows have adapters of their own, beside stock mlx-lm."""

import random

import mlx.core as mx
import numpy as np
import pytest
from helpers.served import NAMES
from mlx_lm import load as stock_load
from mlx_lm.generate import BatchGenerator, StopSequences

from d2c_mlx.models.model import Model
from d2c_mlx.models.stock import switch
from d2c_mlx.serve.adapters import Adapters


@pytest.fixture(scope="module", params=["plain", "compact"])
def mixed(request, packs, model_path):
    """All adapters of a pack in memory."""
    pack = packs[request.param]
    return Adapters(Model(str(model_path)), pack, 1 << 30), pack


def cache(adapters, name):
    return adapters.cache(adapters.base_entry if name is None else adapters.names[name])


def test_a_batch_of_all_adapters_gives_each_rows_own_logits(mixed, model_path):
    """Beside stock mlx-lm with one adapter at a time, and rows in any order."""
    mixed, pack = mixed
    model, _ = stock_load(str(model_path))
    model.set_dtype(mx.float32)
    rows = [None, *pack.tasks, NAMES[0], None]
    tokens = mx.array(np.random.default_rng(0).integers(3, 250, (len(rows), 9)))
    caches = [cache(mixed, name) for name in rows]
    merged = [c[0].merge(list(c)) for c in zip(*caches)]
    found = np.array(mixed(tokens, cache=merged))
    for i, name in enumerate(rows):
        one = None if name is None else pack.load(name)
        switch(model, one and one.uniform(mx.float32), pack.path)
        np.testing.assert_allclose(found[i], np.array(model(tokens[i : i + 1]))[0], atol=2e-5)
        alone = np.array(mixed(tokens[i : i + 1], cache=cache(mixed, name)))
        np.testing.assert_allclose(alone[0], found[i], atol=2e-5)


def test_adapters_stay_with_their_rows_while_others_come_and_go(mixed, answer):
    """mlx-lm's batch generator, rows of other lengths that are added, end and are removed."""
    (mixed, pack), rng = mixed, random.Random(3)
    batch = BatchGenerator(mixed, completion_batch_size=5, prefill_batch_size=2,
                           prefill_step_size=4)  # fmt: skip
    asked, found, removed = {}, {}, set()
    todo = [(rng.choice([None, *pack.tasks]), [rng.randrange(3, 250) for _ in range(n)])
            for n in (3, 17, 5, 1, 9, 30, 2, 8, 12, 4, 6, 21)]  # fmt: skip
    while todo or len(found) < len(asked):
        for name, prompt in [todo.pop() for _ in range(min(len(todo), rng.randrange(4)))]:
            n = rng.randrange(1, 25)
            (uid,) = batch.insert([list(prompt)], max_tokens=[n], caches=[cache(mixed, name)],
                                  stop_sequences=[StopSequences()])  # fmt: skip
            asked[uid] = name, prompt, n, []
        _, tokens = batch.next()
        for one in tokens:
            asked[one.uid][3].append(one.token)
            if one.finish_reason:
                found[one.uid] = asked[one.uid]
        for uid in asked.keys() - found.keys():
            if rng.random() < 0.01:
                batch.remove([uid])
                found[uid] = asked[uid]
                removed.add(uid)
    assert len(removed) < len(found) == 12
    for uid, (name, prompt, n, tokens) in found.items():
        expected = answer(name and pack.load(name), prompt, n)
        # `greedy` stops at an end token, the batch here does not.
        stop = len(tokens) if uid in removed else len(expected)
        assert tuple(tokens[:stop]) == expected[:stop]
