"""Rows of a batch have adapters of their own; beginnings that prompts share are processed once."""

import random

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import ADAPTERS, UP, Q, adapter_of, pack_of
from helpers.served import NAMES, answers_of, client, prompt_of, serving, text
from helpers.tiny import tiny_model
from mlx_lm import load as stock_load

from d2c_mlx.models.model import Model
from d2c_mlx.models.stock import switch
from d2c_mlx.serve.adapters import Adapters
from d2c_mlx.serve.scheduler import Limits

RNG = random.Random(0)
SHARED, *OTHERS = (prompt_of(RNG, 76) for _ in range(4))
TAILS = [f"{SHARED} {prompt_of(RNG, n)}" for n in (5, 9, 2)]
ALL = ("model", *(adapter.name for adapter in ADAPTERS))


def ask(server, model, prompt, n=6, **options):
    """Text, log-probabilities, and number of tokens that were there."""
    with client(server) as api:
        completion = api.completions.create(model=model, prompt=prompt, max_tokens=n,
                                       extra_body={"logprobs": True, **options})  # fmt: skip
    (choice,) = completion.choices
    logprobs = [token["logprob"] for token in choice.logprobs.content]
    return choice.text, logprobs, completion.usage.prompt_tokens_details.cached_tokens


@pytest.mark.slow
def test_answers_are_those_of_whole_prompts(pack, model_path, answer):
    """Of stock mlx-lm; adapters take turns, so another's beginning would show."""
    n_shared = len(answer.tokenizer.encode(SHARED)) - 1
    penalty = {"repetition_penalty": 3.0}
    with serving(pack, model_path) as server:
        for i, prompt in enumerate(TAILS):
            for name in ALL:
                reply, _, n = ask(server, name, prompt)
                own = None if name == "model" else name
                assert reply == text(answer, own, prompt, 6) and (n >= n_shared) == (i > 0)
        # Penalties look back into what is there.
        kept = ask(server, "late", prompt, **penalty)
        assert kept[2] >= n_shared and kept[0] != ask(server, "late", prompt)[0]
    with serving(pack, model_path, limits=Limits(prefix_nbytes=0)) as server:
        whole = ask(server, "late", prompt, **penalty)
        assert (whole[0], whole[2]) == (kept[0], 0)
        np.testing.assert_allclose(kept[1], whole[1], atol=1e-4)


def test_what_was_kept_longest_ago_gives_way(pack, model_path):
    """Memory has room for two prompts, then for none."""
    first, second, third = OTHERS
    with serving(pack, model_path) as server:
        ask(server, "wide", first)
        each = server.service.scheduler.prefixes.nbytes

    def kept(prompt):
        return ask(server, "wide", prompt)[2] > 16

    with serving(pack, model_path, limits=Limits(prefix_nbytes=int(2.2 * each))) as server:
        assert [kept(x) for x in (first, second, second, third)] == [False, False, True, False]
        assert server.service.scheduler.prefixes.nbytes <= 2.2 * each
        assert kept(third) and not kept(first)
    with serving(pack, model_path, limits=Limits(prefix_nbytes=each // 2)) as server:
        assert not kept(first) and not server.service.scheduler.prefixes.nbytes


@pytest.mark.parametrize(("kind", "config"), [
    ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 24,
                     "sliding_window_pattern": 2}),
    ("lfm2", {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 32,
              "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
              "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}),
])  # fmt: skip
def test_caches_that_cannot_be_cut(kind, config, tmp_path):
    """A sliding window, far shorter than the beginning, and the state of a convolution."""
    path = tiny_model(tmp_path / "model", model_type=kind, **config)
    adapter = adapter_of("own", [f"model.layers.1.{Q}"], 2, 1.8)
    base = Model(str(path))
    pack = pack_of(base, [adapter], tmp_path / "pack")
    answer = answers_of(path, pack)
    with serving(pack, base) as server:
        for prompt in (SHARED, *TAILS):
            for name in ("model", "own"):
                reply, _, n_kept = ask(server, name, prompt)
                assert reply == text(answer, None if name == "model" else name, prompt, 6)
        assert n_kept > 24


@pytest.mark.parametrize("kind", ["plain", "compact", "unlike"])
def test_a_batch_of_all_adapters_gives_each_rows_own_logits(packs, model_path, tmp_path, kind):
    """One adapter at a time in stock mlx-lm, and rows in any order; ranks in several stacks."""
    base, pack = Model(str(model_path)), packs.get(kind)
    if pack is None:
        paths = f"model.layers.0.{Q}", f"model.layers.1.{UP}"
        wider = [adapter_of(f"r{rank}", paths, rank, 0.05, rank) for rank in (40, 300)]
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
