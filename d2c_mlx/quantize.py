"""Low-bit factors: the leading singular components of a module's dW, a few bits each.

Which component gets how many bits is the caller's choice; giving the leading ones more is
LoRAQuant's idea (https://arxiv.org/abs/2510.26690). `rounding.py` has the rounding itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from d2c_mlx.adapter import Adapter, LoRA
from d2c_mlx.errors import ConfigError
from d2c_mlx.merge.core import factorise, to_core
from d2c_mlx.rounding import (
    BITS,
    GROUP_SIZES,
    Levels,
    Quantized,
    mixing,
    nearest,
    ridge,
    rounded,
    values_of,
)

__all__ = [
    "Compressed",
    "Level",
    "check_levels",
    "compress",
    "delta_error",
    "dequantize_module",
    "quantize_module",
]


@dataclass(frozen=True, eq=False)
class Level:
    """Components of one module at the same bits.

    Attributes:
        a: rows are the columns of `a`, `(n, in)`.
        b: rows are those of `b`, `(n, out)`.
    """

    a: Quantized
    b: Quantized

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return self.a.bits

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.a.weight)

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class Compressed:
    """An adapter in low-bit factors.

    Attributes:
        name: of the adapter.
        modules: module path -> its levels; modules without components are left out.
        group_size: of all its factors.
        base: the base model's name.
        sources: names of the adapters it was merged from.
    """

    name: str
    modules: Mapping[str, tuple[Level, ...]]
    group_size: int = 64
    base: str | None = None
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, without any header."""
        return sum(level.nbytes for levels in self.modules.values() for level in levels)

    def scaled(self, factor: float) -> Compressed:
        """DW times a factor: the same codes and bytes, other scales and biases of every b."""
        if factor == 1:
            return self
        modules = {
            path: tuple(Level(level.a, level.b.scaled(factor)) for level in levels)
            for path, levels in self.modules.items()
        }
        return replace(self, modules=modules)

    def adapter(self, dtype: mx.Dtype = mx.float16) -> Adapter | None:
        """The plain 16-bit adapter that is evaluated and unpacked; None is the base model.

        Args:
            dtype: of the base's activations; float16 is what `values` gives, others are cast.
        """
        if not self.modules:
            return None
        rank = max(sum(level.rank for level in levels) for levels in self.modules.values())
        a, b = (
            _padded([[getattr(x, name) for x in levels] for levels in self.modules.values()], rank)
            for name in "ab"
        )
        modules = {path: LoRA(x.T, y) for path, x, y in zip(self.modules, a, b)}
        return Adapter(self.name, modules, self.base, self.sources).uniform(dtype)


def _padded(factors: Sequence[Sequence[Quantized]], rank: int) -> list[mx.array]:
    """Rows of every factor, level after level and then zeros, float16 `(rank, width)`.

    Those of one width are parts of one array: an array each takes twice as long.
    """
    values = iter(values_of([part for levels in factors for part in levels]))
    alike: dict[int, list[int]] = {}
    for i, levels in enumerate(factors):
        alike.setdefault(levels[0].width, []).append(i)
    rows = [[next(values) for _ in levels] for levels in factors]
    found: dict[int, mx.array] = {}
    for width, members in alike.items():
        stack = np.zeros((len(members), rank, width), np.float16)
        for place, i in zip(stack, members):
            place[: sum(map(len, rows[i]))] = np.concatenate(rows[i])
        found |= dict(zip(members, mx.array(stack)))
    return [found[i] for i in range(len(factors))]


def compress(
    adapter: Adapter,
    levels_of: Mapping[str, Levels],
    group_size: int = 64,
    rounds: int = 1,
) -> Compressed:
    """Quantize every module of an adapter.

    Args:
        adapter: any ranks and scales.
        levels_of: module path -> levels, for every module; `()` drops one.
        group_size: one of `GROUP_SIZES`.
        rounds: see `quantize_module`.

    Raises:
        ConfigError: levels that are missing, of modules that the adapter has not, or malformed.
    """
    odd = sorted(set(levels_of) ^ set(adapter.modules))
    if odd:
        raise ConfigError(
            f"levels: {len(odd)} modules have levels and are not in adapter {adapter.name!r}, or"
            f" the reverse (first: {odd[0]}); give () to drop a module"
        )
    modules = {}
    # Small matrices: see merge/__init__.py.
    with threadpool_limits(1):
        for path, lora in sorted(adapter.modules.items()):
            modules[path] = quantize_module(*lora.factors(), levels_of[path], group_size, rounds)
    kept = {path: levels for path, levels in modules.items() if levels}
    return Compressed(adapter.name, kept, group_size, adapter.base, adapter.sources)


def check_levels(levels: Levels, group_size: int = 64) -> None:
    """Raises ConfigError unless bits are known and fall, and every count is 1 or more."""
    bits = [b for _, b in levels]
    if not set(bits) <= set(BITS) or bits != sorted(set(bits), reverse=True):
        raise ConfigError(f"levels: found bits {bits}, expected falling ones of {list(BITS)}")
    if any(n < 1 for n, _ in levels):
        raise ConfigError(f"levels: found {list(levels)}, expected 1 or more components in each")
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"group_size: found {group_size}, expected one of {list(GROUP_SIZES)}")


def quantize_module(
    a: np.ndarray, b: np.ndarray, levels: Levels, group_size: int = 64, rounds: int = 1
) -> tuple[Level, ...]:
    """Quantize the leading singular components of dW^T = a @ b.

    Three things beat the nearest codes, at the same bytes. The rows of a level are mixed by an
    orthogonal matrix, which leaves dW as it is and gives all of them the same size: otherwise the
    rounding of the largest component dominates. Each row's rounding error is taken back as far as
    the rows still to be rounded can (GPTQ, https://arxiv.org/abs/2210.17323; after the mixing
    they can, since rows overlap). Then the other factor is solved anew for what is stored of this
    one. The nearest codes stay if they are better, so the error is never above theirs.

    Relative error of dW, all modules of the library's date-de (rank 8), nearest -> here: 8 bit
    0.0071 -> 0.0038, 4 bit 0.118 -> 0.062, 3 bit 0.246 -> 0.126, 2 bit 0.509 -> 0.254.

    Args:
        a: `(in, r)`.
        b: `(r, out)`, the scale folded in.
        levels: components beyond r, and those that are zero, are left out.
        group_size: one of `GROUP_SIZES`.
        rounds: how often both factors are rounded; 0 keeps the nearest codes, more than 1 lowers
            the error by another percent.

    Returns:
        One `Level` per level that got a component; `()` for dW = 0.
    """
    check_levels(levels, group_size)
    a, b = _components(a, b)
    sizes, left = [], len(a)
    for n, bits in levels:
        if left > 0:
            sizes.append((min(n, left), bits))
        left -= n
    if not sizes:
        return ()
    kept = sum(n for n, _ in sizes)
    best = nearest(a[:kept], sizes, group_size), nearest(b[:kept], sizes, group_size)
    if rounds:
        lowest = _squared_error(a, b, *map(_stacked, best))
    mix = mixing(sizes)
    values_b = mix @ b[:kept]
    for _ in range(rounds):
        qa = rounded(_solve(values_b, b, a), values_b @ values_b.T, sizes, group_size)
        values_a = _stacked(qa)
        qb = rounded(_solve(values_a, a, b), values_a @ values_a.T, sizes, group_size)
        values_b = _stacked(qb)
        error = _squared_error(a, b, values_a, values_b)
        if error < lowest:
            best, lowest = (qa, qb), error
    return tuple(Level(*pair) for pair in zip(*best))


def dequantize_module(levels: Sequence[Level]) -> LoRA:
    """The plain factors of at least one level: float16, scale 1."""
    a, b = (
        mx.array(np.concatenate(values_of([getattr(level, name) for level in levels])))
        for name in "ab"
    )
    return LoRA(a.T, b)


def delta_error(a: np.ndarray, b: np.ndarray, levels: Sequence[Level]) -> float:
    """Relative error in Frobenius norm of dW^T = a @ b as `levels` store it; no dense dW."""
    rows_a, rows_b = a.T.astype(np.float64), b.astype(np.float64)
    norm = float(np.sum((rows_a @ rows_a.T) * (rows_b @ rows_b.T)))
    if not levels or not norm:
        return float(norm > 0)
    stored = (_stacked([getattr(x, name) for x in levels]) for name in "ab")
    return float(np.sqrt(max(0.0, _squared_error(rows_a, rows_b, *stored)) / norm))


def _components(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows `(n, in)`, `(n, out)`, float64: balanced SVD factors, the largest first, no zeros."""
    if not a.shape[1]:
        return a.T.astype(np.float64), b.astype(np.float64)
    space = to_core([(a, b)])
    core = space.weighted_sum(np.ones(1))
    left, right = factorise(core, space.q_a, space.q_b, a.shape[1])
    size = np.linalg.norm(left, axis=0)
    order = np.argsort(-size, kind="stable")
    # Both factors hold the root of the singular value: what is below 1e-7 of it is rounding.
    order = order[size[order] > size.max() * 1e-7**0.5]
    return left.T[order].astype(np.float64), right[order].astype(np.float64)


def _stacked(parts: Sequence[Quantized]) -> np.ndarray:
    return np.concatenate(values_of(parts)).astype(np.float64)


def _solve(fixed: np.ndarray, same: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The rows x that minimise `|same.T @ other - fixed.T @ x|`."""
    gram = fixed @ fixed.T
    return np.linalg.solve(gram + ridge(gram), (fixed @ same.T) @ other)


def _squared_error(a: np.ndarray, b: np.ndarray, qa: np.ndarray, qb: np.ndarray) -> float:
    """`|a.T @ b - qa.T @ qb|^2` in Frobenius norm, from Gram matrices of rows."""
    terms = ((a, a, b, b, 1), (qa, a, qb, b, -2), (qa, qa, qb, qb, 1))
    return float(sum(sign * np.sum((x @ y.T) * (u @ v.T)) for x, y, u, v, sign in terms))
