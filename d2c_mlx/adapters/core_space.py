"""Algebra of LoRA updates without forming a dense dW: the core space, best factors, similarity.

Stack the factors of T adapters and take QR: `[a_1 .. a_T] = Q_a R_a`, `[b_1^T .. b_T^T] = Q_b R_b`.
Every `dW_i = Q_b M_i Q_a^T` with a small `M_i`, so any method may work on the M_i. It is
lossless for any mix of ranks. Source: Core Space Merging, https://arxiv.org/abs/2509.17786.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from threadpoolctl import threadpool_limits

from d2c_mlx.adapters.adapter import Adapter, LoRA

Factors = tuple[np.ndarray, np.ndarray]
# Bytes of a module's factors that are compared with others at once.
_AT_ONCE = 32 << 20


@dataclass(frozen=True)
class CoreSpace:
    """T updates of one module: `dW_i = q_b @ updates[i] @ q_a.T`.

    Attributes:
        q_a: `(in, p)`, orthonormal columns, p at most the sum of ranks.
        q_b: `(out, q)`, the same for the outputs.
        r_a: `(p, R)`, the stacked columns of `a` in these coordinates.
        r_b: `(q, R)`, the stacked rows of `b`.
        ranks: ranks of the T updates; their sum is R.
    """

    q_a: np.ndarray
    q_b: np.ndarray
    r_a: np.ndarray
    r_b: np.ndarray
    ranks: tuple[int, ...]

    @property
    def parts(self) -> list[Factors]:
        """T pairs of columns `(q, r_i)` and `(p, r_i)`: `updates[i] = left @ right.T`."""
        ends = np.cumsum(self.ranks)[:-1]
        return list(zip(np.split(self.r_b, ends, axis=1), np.split(self.r_a, ends, axis=1)))

    @property
    def updates(self) -> np.ndarray:
        """The updates M_i, `(T, q, p)`, computed anew; for many tasks much larger than `parts`."""
        return np.stack([left @ right.T for left, right in self.parts])

    def weighted_sum(self, weights: np.ndarray) -> np.ndarray:
        """Sum of the updates times `weights (T,)`, `(q, p)`, in one product for all."""
        spread = np.repeat(weights, self.ranks).astype(self.r_b.dtype)
        return (self.r_b * spread) @ self.r_a.T


def to_core(factors: Sequence[Factors]) -> CoreSpace:
    """Move T updates of one module into their common core space; `factorise` leads back.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`, scales folded into b; r_i may be 0.
    """
    q_a, r_a = _qr([a.T for a, _ in factors])
    q_b, r_b = _qr([b for _, b in factors])
    return CoreSpace(q_a, q_b, r_a, r_b, tuple(len(b) for _, b in factors))


def _qr(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    # numpy's QR computes in float64 whatever it is given: three times slower for float32. The
    # transpose of stacked rows is in LAPACK's order and is overwritten: no copy of the stack.
    stack = np.concatenate(rows).T
    return scipy.linalg.qr(stack, mode="economic", overwrite_a=True, check_finite=False)


def factorise(core: np.ndarray, q_a: np.ndarray, q_b: np.ndarray, rank: int) -> Factors:
    """The best factors of `q_b @ core @ q_a.T` with a given rank, see `best_factors`.

    `core` is `(q, p)`; the columns of `q_a (in, p)` and `q_b (out, q)` are orthonormal.

    Returns:
        `a (in, r)`, `b (r, out)` with r = min(rank, size of the core).
    """
    a, b = best_factors(core, rank)
    return q_a @ a, b @ q_b.T


def best_factors(update: np.ndarray, rank: int) -> Factors:
    """The best factors of an update `(out, in)` with a given rank, singular values split evenly.

    No other factors of this rank are closer in Frobenius norm (Eckart-Young).

    The left singular vectors are eigenvectors of the update's Gram matrix, of which only the
    leading ones are computed. In float64 that loses singular values below 1e-8 of the largest,
    less than float32 factors can hold.

    Returns:
        `a (in, r)`, `b (r, out)` with r = min(rank, in, out).
    """
    if update.shape[0] > update.shape[1]:
        b, a = best_factors(update.T, rank)
        return a.T, b.T
    wide = update.astype(np.float64)
    leading = [max(0, len(wide) - rank), len(wide) - 1]
    _, u = scipy.linalg.eigh(wide @ wide.T, subset_by_index=leading, check_finite=False)
    vt = u.T @ wide
    root = np.sqrt(np.linalg.norm(vt, axis=1))
    vt /= np.where(root > 0, root, 1)[:, None]
    return vt.T.astype(update.dtype), (root[:, None] * u.T).astype(update.dtype)


def gram(adapters: Sequence[Adapter]) -> np.ndarray:
    """Inner products of the adapters' dW over all modules, `(n, n)`.

    Computed from the factors, `<dW_i, dW_j> = sum((a_i^T a_j) * (b_i b_j^T))`, never forming dW;
    in float64, because components may cancel.
    """
    products = np.zeros((len(adapters), len(adapters)))
    for here, blocks in _grams(adapters):
        products[np.ix_(here, here)] += blocks
    return products


def _grams(adapters: Sequence[Adapter]) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield the adapters that have a module, and the inner products of their dW of it."""
    with threadpool_limits(1):  # as in merge_adapters
        for path in sorted({path for adapter in adapters for path in adapter.modules}):
            here = [i for i in range(len(adapters)) if path in adapters[i].modules]
            first = adapters[here[0]].modules[path]
            at_once = max(1, _AT_ONCE // (8 * first.rank * sum(first.shape)))
            tiles = [range(n, min(n + at_once, len(here))) for n in range(0, len(here), at_once)]
            products = np.empty((len(here), len(here)))
            for k, rows in enumerate(tiles):
                a, b, starts = _stacked([adapters[here[i]].modules[path] for i in rows])
                for columns in tiles[: k + 1]:
                    other = a, b, starts
                    if columns != rows:
                        other = _stacked([adapters[here[i]].modules[path] for i in columns])
                    inner = (a.T @ other[0]) * (b @ other[1].T)
                    summed = np.add.reduceat(inner, starts, axis=0)
                    tile = np.add.reduceat(summed, other[2], axis=1)
                    products[np.ix_(rows, columns)] = tile
                    products[np.ix_(columns, rows)] = tile.T
            yield here, products


def _stacked(loras: Sequence[LoRA]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors of a module of several adapters side by side, and where each begins."""
    factors = [lora.factors() for lora in loras]
    a = np.concatenate([a for a, _ in factors], axis=1, dtype=np.float64)
    b = np.concatenate([b for _, b in factors], axis=0, dtype=np.float64)
    return a, b, np.cumsum([0, *(x.shape[1] for x, _ in factors)])[:-1]


def errors_and_kept(adapter: Adapter, stored: Adapter | None) -> tuple[float, float]:
    """How far a stored update is from an adapter's, without data; all modules count alike.

    A module that only `stored` has counts against the mean module of the adapter.

    Args:
        adapter: the original.
        stored: what serves its task; None is the bare base model.

    Returns:
        The mean over modules of `|stored - dW|^2 / |dW|^2` in Frobenius norm, 0 for equal updates
        and 1 for the bare base model; and the mean squared cosine, the share of the energy that is
        kept at whatever scale.
    """
    rows = []
    for here, products in _grams([adapter, stored] if stored else [adapter]):
        own = products[0, 0] if 0 in here else 0.0
        other = products[-1, -1] if 1 in here else 0.0
        rows.append((own, other, products[0, 1] if len(here) == 2 else 0.0))
    n = len(adapter.modules)
    mean = max(sum(own for own, _, _ in rows) / n, 1e-30)
    errors, kept = 0.0, 0.0
    for own, other, product in rows:
        errors += max(own - 2 * product + other, 0.0) / (own or mean)
        kept += product**2 / (own * other) if own and other else float(own == other == 0)
    return errors / n, kept / len(rows)


def closest_scale(merged: Adapter, adapters: Sequence[Adapter]) -> float:
    """The scale at which a merge is closest to adapters, by least squares over all entries of dW.

    0 if the merge has nothing in common with them, or is zero itself.
    """
    products = gram([merged, *adapters])[0]
    return float(products[1:].mean() / products[0]) if products[0] > 0 else 0.0


def similarity(adapters: Sequence[Adapter]) -> np.ndarray:
    """Cosines of the adapters' dW over all modules, `(n, n)`; 0 for an adapter that is zero."""
    products = gram(adapters)
    norm = np.sqrt(np.maximum(np.diagonal(products), 1e-30))
    return products / np.outer(norm, norm)


def svd_features(cosines: np.ndarray) -> np.ndarray:
    """SVD features of the flattened dW, `(n, d)` rows of unit length, to cluster adapters by.

    They come from the SVD of the matrix whose rows are the normalised dW, taken from its Gram
    matrix `(n, n)`, which is `similarity`. MBC flattens A and B instead, which changes when both
    are rotated and dW does not.
    """
    values, vectors = np.linalg.eigh(cosines)
    keep = values > 1e-6 * values.max()
    keep[-1] = True  # at least one feature, though no adapter may have a direction
    features = vectors[:, keep] * np.sqrt(values[keep])
    # An untrained adapter has dW = 0 and no direction: its row stays 0.
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
