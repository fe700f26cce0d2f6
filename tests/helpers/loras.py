"""Random adapters of a few small modules, and their dense dW."""

import mlx.core as mx
import numpy as np
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx import Adapter, LoRA, merge_adapters
from d2c_mlx.adapters.core_space import CoreSpace
from d2c_mlx.compress.compressed import Compressed

P, Q, R = "model.layers.0.q", "model.layers.0.v", "model.layers.1.q"


def lora_of(rng, shape, rank, scale=1.0, dtype=mx.float32, size=1.0):
    a = rng.normal(size=(shape[0], rank)) * size
    b = rng.normal(size=(rank, shape[1])) * size
    return LoRA(mx.array(a).astype(dtype), mx.array(b).astype(dtype), scale)


def adapters_of(rng, n, shapes, max_rank=4, dtypes=(mx.float32, mx.float16)):
    """Mixed ranks, scales and dtypes; modules go missing, but never all of an adapter's."""
    adapters = []
    for i in range(n):
        keep = [path for j, path in enumerate(shapes) if j == i % len(shapes) or rng.random() < 0.6]
        modules = {}
        for path in keep:
            rank, scale = int(rng.integers(1, max_rank + 1)), float(rng.uniform(0.1, 20))
            dtype = dtypes[int(rng.integers(len(dtypes)))]
            modules[path] = lora_of(rng, shapes[path], rank, scale, dtype)
        adapters.append(Adapter(f"t{i}", modules, "base"))
    return adapters


def dense(lora):
    """dW as (out, in), in float64, by a plain sum over the rank."""
    a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (lora.a, lora.b))
    total = np.zeros((b.shape[1], a.shape[0]))
    for r in range(a.shape[1]):
        total += lora.scale * np.outer(b[r], a[:, r])
    return total


def plain(levels):
    """The plain factors of a module's levels, float16."""
    return Compressed("one", {"m": tuple(levels)}).adapter().modules["m"]


def dense_mean(adapters, path, shape):
    total = np.zeros(shape[::-1])
    for adapter in adapters:
        if path in adapter.modules:
            total += dense(adapter.modules[path])
    return total / len(adapters)


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def assert_close(actual, expected, size, rtol=1e-4):
    """Relative to `size`, the norm of what was merged: a mean may cancel to nearly nothing."""
    assert np.isfinite(actual).all()
    assert np.linalg.norm(actual - expected) <= rtol * max(size, 1e-30)


dims, counts, seeds = st.integers(1, 9), st.integers(2, 4), st.integers(0, 10_000)
shapes = st.tuples(dims, dims)


def numeric(*strategies, n=25):
    """`given` with the same n examples on every run: float32 may flip a sign once in a million."""
    return lambda test: settings(derandomize=True, max_examples=n)(given(*strategies)(test))


def inputs_of(adapters, n_tokens=6):
    """Activations for RegMean that depend on nothing but the adapter and the module."""
    shapes = {path: lora.shape for adapter in adapters for path, lora in adapter.modules.items()}
    return {
        path: [
            np.random.default_rng([i % 2**32, *path.encode()]).normal(size=(n_tokens, width))
            for i in (int(adapter.digest[:8], 16) for adapter in adapters)
        ]
        for path, (width, _) in shapes.items()
    }


def merge_by(adapters, method, *args, **options):
    """`merge_adapters`, with activations where the method needs them."""
    activations = inputs_of(adapters) if method == "regmean" else None
    return merge_adapters(adapters, method, *args, activations=activations, **options)


def mixed_ranks(n, shape, seed, max_rank=2):
    """Adapters of one module P with ranks 1 to `max_rank` and different scales."""
    return adapters_of(np.random.default_rng(seed), n, {P: shape}, max_rank, (mx.float32,))


def deltas(adapters):
    return [dense(adapter.modules[P]) for adapter in adapters]


def as_space(cores):
    """A core space whose updates are `cores (T, q, p)`."""
    n, q, p = cores.shape
    eyes = np.tile(np.eye(p, dtype=cores.dtype), n)
    return CoreSpace(np.eye(p), np.eye(q), eyes, np.concatenate(list(cores), axis=1), (p,) * n)


def assert_merges(adapters, method, expected, rtol=1e-4, **options):
    rank = options.pop("rank", 100)
    actual = dense(merge_adapters(adapters, method, rank=rank, **options).modules[P])
    size = max(np.linalg.norm(expected), max(map(np.linalg.norm, deltas(adapters))))
    assert_close(actual, expected, size, rtol)


def dense_fit(factors, inputs, lacking=(), off_diagonal=0.9, ridge=1e-6):
    """Root R of the summed K_i, with R^T R = K, and R times the W of the normal equations."""
    grams = [x.T @ x for x in inputs]
    floor = ridge * np.mean([np.diagonal(gram) for gram in grams]) * np.eye(len(grams[0]))
    own = [(1 - off_diagonal) * np.diag(np.diagonal(gram)) + floor for gram in grams]
    grams = [off_diagonal * gram + diagonal for gram, diagonal in zip(grams, own)]
    right = sum(gram @ a @ b for gram, (a, b) in zip(grams, factors))
    right = right + off_diagonal * sum(x.T @ y for x, y in zip(inputs, lacking))
    root = scipy.linalg.cholesky(sum(grams))
    return root, scipy.linalg.solve_triangular(root, right, trans="T")
