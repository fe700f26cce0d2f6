"""LoRAQuant as its paper describes it, https://arxiv.org/abs/2510.26690, in numpy.

B A = U S V^T. The leading components that hold a share of the squared singular values get 2 or 3
bits a number: to the nearest code, a scale and a zero point for 128 numbers of a component, after
gradient steps that bring each rounded component closer to what it was (straight through the
rounding). The others get 1 bit: sign times mean magnitude of 128 numbers. All modules have one
share. Below the bytes that this takes at least, the others are left out.
"""

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.compact_file import layout, make_index
from d2c_mlx.compress.quantize import Components, svd_components

GROUP, STEPS, RATE = 128, 100, 1e-3


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Rows `(n, width)` as they come back from their stored bits."""
    found, top = np.empty_like(x), 2**bits - 1
    for i in range(0, x.shape[1], GROUP):
        part = x[:, i : i + GROUP]
        if bits == 1:
            size = np.abs(part).mean(axis=1, keepdims=True).astype(np.float16)
            found[:, i : i + GROUP] = np.where(part < 0, -size, size)
            continue
        low, high = part.min(axis=1, keepdims=True), part.max(axis=1, keepdims=True)
        scale = np.maximum((high - low) / top, 1e-6).astype(np.float16).astype(x.dtype)
        zero = np.clip(np.round(-low / scale), 0, top)
        codes = np.clip(np.round(part / scale) + zero, 0, top)
        found[:, i : i + GROUP] = (codes - zero) * scale
    return found


def moved(a: np.ndarray, b: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Rounded rows of both factors after gradient steps, of every component the best seen."""

    def dot(x, y):
        return np.sum(x * y, axis=1, keepdims=True)

    x, y = a.copy(), b.copy()
    best, lowest = (rounded(x, bits), rounded(y, bits)), np.inf
    for _ in range(STEPS):
        qx, qy = rounded(x, bits), rounded(y, bits)
        error = dot(a, a) * dot(b, b) - 2 * dot(a, qx) * dot(b, qy) + dot(qx, qx) * dot(qy, qy)
        better = error < lowest
        best = tuple(np.where(better, new, old) for new, old in zip((qx, qy), best))
        lowest, size = np.minimum(error, lowest), np.sqrt(np.maximum(error, 1e-12))
        x -= RATE * (qx * dot(qy, qy) - a * dot(b, qy)) / size
        y -= RATE * (qy * dot(qx, qx) - b * dot(a, qx)) / size
    return best


class LoraQuant:
    """One setting for a library: bits of the important part, whether there is another."""

    def __init__(self, adapters: list[Adapter], bits: int, rest: bool) -> None:
        """Take the adapters apart."""
        self._bits, self._rest = bits, rest
        self._parts = {one.name: svd_components(one) for one in adapters}

    def fit(self, nbytes: int) -> float:
        """The largest share whose bytes fit, to a thousandth; 0 if none does."""
        low, high = 0, 1000
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self.nbytes(middle / 1000) <= nbytes else (low, middle - 1)
            )
        return low / 1000

    def nbytes(self, share: float) -> int:
        """Bytes of a file of all adapters: codes, scales, zero points, a compact pack's header."""
        total, counts, shapes = 0.0, [], {}
        for parts in self._parts.values():
            counts.append({})
            for path, (a, b) in parts.items():
                n = important((a, b), share)
                rest = len(a) - n if self._rest else 0
                shapes[path] = a.shape[1], b.shape[1]
                # A compact pack has no level of 1 bit: 4 is named as briefly.
                counts[-1][path] = [(n, self._bits), (rest, 4)]
                for width in shapes[path]:
                    groups = -(-width // GROUP)
                    total += n * (width * self._bits / 8 + groups * (2 + self._bits / 8))
                    total += rest * (width / 8 + groups * 2)
        index = make_index([*self._parts], None, counts, shapes)
        return int(np.ceil(total)) + len(layout(index)[0]) + index.counts.size

    def adapter(self, name: str, share: float) -> Adapter:
        """One adapter with the numbers that its reader gets, float32."""
        parts, alike = self._parts[name], {}
        sizes = {path: important(pair, share) for path, pair in parts.items()}
        for path, (a, b) in parts.items():
            alike.setdefault((a.shape[1], b.shape[1]), []).append(path)
        modules = {}
        for paths in alike.values():  # Of one shape, so their components move together.
            first = moved(*(np.concatenate([parts[p][i][: sizes[p]] for p in paths])
                            for i in (0, 1)), self._bits)  # fmt: skip
            ends = np.cumsum([sizes[path] for path in paths])
            for path, end in zip(paths, ends):
                n = sizes[path]
                factors = [one[end - n : end] for one in first]
                if self._rest:
                    factors = [np.concatenate([x, rounded(y[n:], 1)])
                               for x, y in zip(factors, parts[path])]  # fmt: skip
                a, b = map(mx.array, factors)
                modules[path] = LoRA(a.T, b)
        return Adapter(name, modules)


def important(parts: Components, share: float) -> int:
    """The fewest leading components that hold this share of the squared singular values."""
    energy = np.cumsum(np.sum(parts[0] ** 2, axis=1) ** 2)
    return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-9))) + 1
