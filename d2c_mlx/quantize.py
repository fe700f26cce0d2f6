"""Low-bit factors: the leading singular components of a module's dW, a few bits each.

Which component gets how many bits is the caller's choice; giving the leading ones more is
LoRAQuant's idea (https://arxiv.org/abs/2510.26690). Codes, scales and biases are those of MLX's
affine quantization, `value = scale * code + bias` per group, so `mx.dequantize` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from d2c_mlx.adapter import Adapter, LoRA
from d2c_mlx.errors import ConfigError
from d2c_mlx.merge.core import factorise, to_core

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "Compressed",
    "Level",
    "Levels",
    "Quantized",
    "check_levels",
    "columns",
    "compress",
    "delta_error",
    "dequantize_module",
    "quantize_module",
]

BITS, GROUP_SIZES = (16, 8, 4, 3, 2), (32, 64, 128)
# (number of components, bits), the leading components first: ((2, 4), (4, 2)) is two components
# at 4 bit and the next four at 2.
Levels = Sequence[tuple[int, int]]
# Shares of a group's range that are tried: clipping the rare large entries pays when codes are few.
_SHRINK = {8: (1.0,), 4: (1.0, 0.9, 0.8), 3: (1.0, 0.85, 0.7), 2: (1.0, 0.8, 0.65, 0.5)}


@dataclass(frozen=True, eq=False)
class Quantized:
    """Rows of numbers in a few bits.

    Attributes:
        weight: uint32 `(rows, columns)`, codes packed from the lowest bit up; at 16 bits the
            numbers themselves, float16 `(rows, width)`.
        scales: float16 `(rows, groups)`; no groups at 16 bits.
        biases: float16 `(rows, groups)`.
        bits: one of `BITS`.
        group_size: numbers that share a scale and a bias.
        width: numbers in a row; the codes beyond, up to a whole group, are padding.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    group_size: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.weight.nbytes + self.scales.nbytes + self.biases.nbytes

    def values(self) -> mx.array:
        """The numbers, float16 `(rows, width)`.

        Computed in float32, where scale * code is exact, so every device rounds to the same bits.
        """
        if self.bits == 16:
            return mx.array(self.weight)
        scales, biases = (mx.array(x.astype(np.float32)) for x in (self.scales, self.biases))
        rows = mx.dequantize(mx.array(self.weight), scales, biases, self.group_size, self.bits)
        return rows[:, : self.width].astype(mx.float16)


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
    sources: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, without any header."""
        return sum(level.nbytes for levels in self.modules.values() for level in levels)

    def adapter(self, dtype: mx.Dtype = mx.float16) -> Adapter | None:
        """The plain 16-bit adapter that is evaluated and unpacked; None is the base model.

        Args:
            dtype: of the base's activations; float16 is what `values` gives, others are cast.
        """
        if not self.modules:
            return None
        modules = {path: dequantize_module(levels) for path, levels in self.modules.items()}
        return Adapter(self.name, modules, self.base, self.sources).uniform(dtype)


def compress(
    adapter: Adapter,
    levels_of: Mapping[str, Levels],
    group_size: int = 64,
    rounds: int = 3,
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


def columns(width: int, bits: int, group_size: int) -> tuple[int, int]:
    """`(columns of weight, groups)` of rows of `width` numbers."""
    if bits == 16:
        return width, 0
    groups = -(-width // group_size)
    return groups * group_size * bits // 32, groups


def quantize_module(
    a: np.ndarray, b: np.ndarray, levels: Levels, group_size: int = 64, rounds: int = 3
) -> tuple[Level, ...]:
    """Quantize the leading singular components of dW^T = a @ b.

    Starts from the nearest codes. Each round then solves one factor by least squares with the
    other one fixed as it is stored, which takes back part of its rounding and of the components
    that were dropped, and rounds it with fitted groups. The best of all is kept, so the error is
    never larger than that of nearest rounding.

    Args:
        a: `(in, r)`.
        b: `(r, out)`, the scale folded in.
        levels: components beyond r, and those that are zero, are left out.
        group_size: one of `GROUP_SIZES`.
        rounds: 0 keeps the nearest codes.

    Returns:
        One `Level` per level that got a component; `()` for dW = 0.
    """
    check_levels(levels, group_size)
    a, b = _components(a, b)
    cuts, start = [], 0
    for n, bits in levels:
        if start < len(a):
            cuts.append((start, min(start + n, len(a)), bits))
        start += n
    if not cuts:
        return ()

    def nearest(rows: np.ndarray) -> list[Quantized]:
        return [_nearest(rows[i:j], bits, group_size) for i, j, bits in cuts]

    def fitted(rows: np.ndarray) -> list[Quantized]:
        return [_fitted(rows[i:j], bits, group_size) for i, j, bits in cuts]

    best = (nearest(a), nearest(b))
    if rounds:
        lowest = _squared_error(a, b, *map(_stacked, best))
        qa = fitted(a)
        tried = []
        for _ in range(rounds):
            qb = fitted(_solve(_stacked(qa), a, b))
            tried.append((qa, qb))
            qa = fitted(_solve(_stacked(qb), b, a))
            tried.append((qa, qb))
        for pair in tried:
            error = _squared_error(a, b, *map(_stacked, pair))
            if error < lowest:
                best, lowest = pair, error
    return tuple(Level(*pair) for pair in zip(*best))


def dequantize_module(levels: Sequence[Level]) -> LoRA:
    """The plain factors of at least one level: float16, scale 1."""
    a = mx.concatenate([level.a.values() for level in levels])
    b = mx.concatenate([level.b.values() for level in levels])
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
    return np.concatenate([np.array(part.values()) for part in parts]).astype(np.float64)


def _solve(fixed: np.ndarray, same: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The rows x that minimise `|same.T @ other - fixed.T @ x|`."""
    gram = fixed @ fixed.T
    # The ridge matters only where rounding left rows that are zero or equal.
    ridge = 1e-9 * np.trace(gram) + 1e-30
    return np.linalg.solve(gram + ridge * np.eye(len(gram)), (fixed @ same.T) @ other)


def _squared_error(a: np.ndarray, b: np.ndarray, qa: np.ndarray, qb: np.ndarray) -> float:
    """`|a.T @ b - qa.T @ qb|^2` in Frobenius norm, from Gram matrices of rows."""
    terms = ((a, a, b, b, 1), (qa, a, qb, b, -2), (qa, qa, qb, qb, 1))
    return float(sum(sign * np.sum((x @ y.T) * (u @ v.T)) for x, y, u, v, sign in terms))


def _padded(rows: np.ndarray, group_size: int) -> np.ndarray:
    return np.pad(rows, [(0, 0), (0, -rows.shape[1] % group_size)]).astype(np.float32)


def _plain(rows: np.ndarray, group_size: int) -> Quantized:
    none = np.zeros((len(rows), 0), np.float16)
    return Quantized(rows.astype(np.float16), none, none, 16, group_size, rows.shape[1])


def _nearest(rows: np.ndarray, bits: int, group_size: int) -> Quantized:
    """MLX's own rounding; scales and biases are cut to float16 after it."""
    if bits == 16:
        return _plain(rows, group_size)
    found = mx.quantize(mx.array(_padded(rows, group_size)), group_size, bits)
    weight, scales, biases = (np.array(x) for x in found)
    scales, biases = scales.astype(np.float16), biases.astype(np.float16)
    return Quantized(weight, scales, biases, bits, group_size, rows.shape[1])


def _fitted(rows: np.ndarray, bits: int, group_size: int) -> Quantized:
    """Codes for the scales as stored; each group takes the clipping with the least error."""
    if bits == 16:
        return _plain(rows, group_size)
    groups = _padded(rows, group_size).reshape(-1, group_size)
    low, high = groups.min(axis=1), groups.max(axis=1)
    codes = np.zeros(groups.shape, np.uint8)
    scales, biases = np.zeros((2, len(groups)), np.float16)
    lowest = np.full(len(groups), np.inf, np.float32)
    for share in _SHRINK[bits]:
        cut = (1 - share) / 2 * (high - low)
        scale, bias = (high - low - 2 * cut) / (2**bits - 1), low + cut
        for _ in range(2):
            found = _encode(groups, scale, bias, bits)
            better = found[3] < lowest
            codes[better], scales[better], biases[better], lowest[better] = (
                x[better] for x in found
            )
            scale, bias = _refit(groups, found[0])
    n = len(rows)
    weight = _packed(codes.reshape(n, -1), bits)
    columns = scales.reshape(n, -1), biases.reshape(n, -1)
    return Quantized(weight, *columns, bits, group_size, rows.shape[1])


def _encode(
    groups: np.ndarray, scale: np.ndarray, bias: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes `(n, group_size)`, scales and biases `(n,)` in float16, squared errors `(n,)`."""
    scale, bias = scale.astype(np.float16), bias.astype(np.float16)
    wide = np.where(scale == 0, 1, scale).astype(np.float32)[:, None]
    offset = groups - bias.astype(np.float32)[:, None]
    codes = np.clip(np.rint(offset / wide), 0, 2**bits - 1)
    rest = offset - codes * scale.astype(np.float32)[:, None]
    return codes.astype(np.uint8), scale, bias, np.einsum("ij,ij->i", rest, rest)


def _refit(groups: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of each group by least squares, the codes given."""
    x = codes.astype(np.float32)
    mean_x, mean_y = x.mean(axis=1), groups.mean(axis=1)
    x -= mean_x[:, None]
    spread = np.einsum("ij,ij->i", x, x)
    scale = np.einsum("ij,ij->i", x, groups) / np.where(spread == 0, 1, spread)
    return scale, mean_y - scale * mean_x


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words of rows of codes, as one stream of bits from the lowest up."""
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view("<u4")
