"""Methods to compare those of `d2c-mlx compose` with: published forms on factors, and noise.

`lorahub-factors` and `routed-factors` mix A and B apart, as LoraHub and PEFT's Poly layer do: cross
terms A_i B_j appear, a uniform mix of n keeps 1 / n^2 of each update, and the result depends on how
a dW is factored. `fresh-random` is `fresh-library` with adapters of random values.
"""

import zlib
from dataclasses import replace

import mlx.core as mx
import numpy as np
from d2c_mlx_methods.compose import search_weights
from d2c_mlx_methods.trained import train_routing, weighted_blocks

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compose.methods import SCALES, Method
from d2c_mlx.merge.methods import scaled


def mix_factors(adapters, weights):
    """`(sum w_i A_i)(sum w_j B_j)` of adapters of one rank (https://arxiv.org/abs/2307.13269)."""
    modules = {}
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        pairs = [(w, adapter.modules[path].factors()) for w, adapter in zip(weights, adapters)
                 if path in adapter.modules]  # fmt: skip
        a = sum(np.float32(w) * a for w, (a, _) in pairs)
        b = sum(np.float32(w) * b for w, (_, b) in pairs)
        modules[path] = LoRA(mx.array(a), mx.array(b))
    sources = tuple(adapter.name for adapter in adapters)
    return replace(adapters[0], modules=modules, sources=sources)


def route_factors(skills, weights):
    """Blocks of A and of B summed apart: a `(in, r)`, b `(r, out)`; arguments as for `route`."""
    a, b = weighted_blocks(skills, weights)
    return a.sum(axis=1), b.sum(axis=0)


def random_like(adapter, seed=0):
    """An adapter of random values with the norm of every dW kept: knows nothing, weighs as much."""
    modules = {}
    for path, lora in adapter.modules.items():
        old = lora.factors()
        rng = np.random.default_rng([seed, zlib.crc32(f"{adapter.name} {path}".encode())])
        a, b = (rng.normal(size=x.shape).astype(np.float32) for x in old)
        size = norm(a, b)
        b *= norm(*old) / size if size else 0
        modules[path] = LoRA(mx.array(a), mx.array(b))
    return Adapter(f"random {adapter.name}", modules, adapter.base)


def norm(a, b):
    """The Frobenius norm of `a @ b`, without forming it."""
    return np.sqrt(np.maximum(((a.T @ a) * (b @ b.T)).sum(), 0))


def fresh_random(task, rows, choice):
    """A fresh LoRA and random values that weigh as much as the three best adapters."""
    noise = [random_like(adapter) for adapter in task.by_loss(rows)[:3]]
    shares = np.array([1.0, *[1 / len(noise)] * len(noise)])
    return scaled(task.mixed([task.trained(task.start, rows), *noise], shares), choice)


def lorahub_factors(task, rows, choice):
    """LoraHub as published, for adapters of one rank."""
    weights = search_weights(
        lambda weights: float(task.losses([mix_factors(task.library, weights)], rows)[0]),
        len(task.library), task.training.seed,
    )  # fmt: skip
    return mix_factors(task.library, weights)


def routed_factors(task, rows, choice):
    """Multi-head routing as published."""
    skills = task.by_loss(rows)[:8]
    key = ("route_factors", rows.tokens_digest, *(skill.digest for skill in skills))
    routed = task.once(key, lambda: train_routing(task, skills, rows, route_factors))
    return scaled(task.mixed([routed], np.ones(1)), choice)


CONTROLS = {
    "fresh-random": Method(fresh_random, SCALES, trains=True),
    "lorahub-factors": Method(lorahub_factors),
    "routed-factors": Method(routed_factors, SCALES, trains=True),
}
