"""Mixing adapters by weights, on dW; and on factors, as some papers do, to compare with them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.utils.errors import AdapterError

__all__ = ["continual_weights", "mix", "mix_factors", "random_like", "similarity_weights"]


def mix(adapters: Sequence[Adapter], weights: Sequence[float] | np.ndarray, rank: int) -> Adapter:
    """The sum of `w_i dW_i` as one LoRA, the closest of its rank.

    Args:
        adapters: of any ranks and modules.
        weights: one per adapter; those of weight 0 are left out.
        rank: largest rank of every module of the result.
    """
    used = [(one, float(w)) for one, w in zip(adapters, weights) if w]
    if not used:
        used = [(adapters[0], 0.0)]
    members, shares = zip(*used)
    return merge_adapters(members, "linear", rank=rank, weights=shares)


def mix_factors(adapters: Sequence[Adapter], weights: Sequence[float] | np.ndarray) -> Adapter:
    """`(sum w_i A_i)(sum w_j B_j)`: factors mixed apart, as LoraHub publishes it.

    Use it only to compare with that paper: cross terms `A_i B_j` appear, a uniform mix of n keeps
    1 / n^2 of each, and the result depends on how a dW is factored. `mix` is on dW.

    Args:
        adapters: all of one rank.
        weights: one per adapter.

    Raises:
        AdapterError: ranks differ.

    Source: https://arxiv.org/abs/2307.13269.
    """
    ranks = {one.name: one.rank for one in adapters}
    if len(set(ranks.values())) > 1:
        raise AdapterError(
            f"adapters: found the ranks {sorted(set(ranks.values()))}, expected one: factors of"
            " different ranks cannot be added up; use a method that mixes dW"
        )
    modules = {}
    for path in sorted({path for one in adapters for path in one.modules}):
        pairs = [(w, one.modules[path].factors()) for w, one in zip(weights, adapters)
                 if path in one.modules]  # fmt: skip
        a = sum(np.float32(w) * a for w, (a, _) in pairs)
        b = sum(np.float32(w) * b for w, (_, b) in pairs)
        modules[path] = LoRA(mx.array(a), mx.array(b))
    return replace(adapters[0], modules=modules, sources=tuple(ranks))


def similarity_weights(
    similarity: np.ndarray, n_nearest: int = 3, temperature: float = 0.2
) -> np.ndarray:
    """Weights of the nearest tasks' adapters, a softmax of their similarities; others have 0.

    Args:
        similarity: `(n,)` cosines of the new task with the tasks of each adapter.
        n_nearest: number of adapters with a weight above 0.
        temperature: similarities are divided by it.

    Returns:
        `(n,)`, with the sum 1.

    Source: LORAUTER, https://arxiv.org/abs/2601.21795.
    """
    nearest = np.argsort(-similarity, kind="stable")[:n_nearest]
    weights = np.zeros(len(similarity))
    weights[nearest] = np.exp((similarity[nearest] - similarity.max()) / temperature)
    return weights / weights.sum()


def continual_weights(n: int) -> np.ndarray:
    """Weights `(n,)` of adapters that are merged one by one, `m <- (m + dW_t) / 2`.

    The last has 1/2, the first two 1 / 2^(n-1) each: the order decides.

    Source: MergeRepair, https://arxiv.org/abs/2408.09568, which merges factors.
    """
    weights = 0.5 ** np.arange(n, 0, -1)
    weights[0] *= 2
    return weights


def random_like(adapter: Adapter, seed: int = 0) -> Adapter:
    """An adapter of random values with the norm of every dW kept: knows nothing, weighs as much.

    Args:
        adapter: whose modules, ranks and norms it has.
        seed: every module draws its own numbers.
    """
    modules = {}
    for path, lora in adapter.modules.items():
        old = lora.factors()
        rng = np.random.default_rng([seed, zlib.crc32(f"{adapter.name} {path}".encode())])
        a, b = (rng.normal(size=x.shape).astype(np.float32) for x in old)
        norm = _norm(a, b)
        b *= _norm(*old) / norm if norm else 0
        modules[path] = LoRA(mx.array(a), mx.array(b))
    return Adapter(f"random {adapter.name}", modules, adapter.base)


def _norm(a: np.ndarray, b: np.ndarray) -> np.float32:
    """The Frobenius norm of `a @ b`, without forming it."""
    return np.sqrt(np.maximum(((a.T @ a) * (b @ b.T)).sum(), 0))
