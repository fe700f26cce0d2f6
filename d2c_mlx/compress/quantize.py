"""Quantizing an adapter: the leading singular components of every dW, a few bits each.

The caller chooses the bit allocation; `storage.allocate` makes one. Giving the leading components
more bits follows LoRAQuant, https://arxiv.org/abs/2510.26690. Rows of components are rounded by
GPTQ: one by one, with error compensation by the rows that are left. Groups are clipped besides,
which GPTQ itself does not do.

Source: GPTQ, https://arxiv.org/abs/2210.17323.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.linalg import block_diag
from threadpoolctl import threadpool_limits

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.core_space import factorise, to_core
from d2c_mlx.compress.compressed import GROUP_SIZE, Compressed, Level, Levels, Quantized
from d2c_mlx.evaluate.batches import indices_by_key
from d2c_mlx.utils.gguf_file import pack_codes

# Rows `(n, in)` and `(n, out)` of dW^T = a.T @ b.
Components = tuple[np.ndarray, np.ndarray]
# Modules that are rounded together, and the numbers that they have at most: more would leave the
# processor's cache, and take a hundred bytes of memory each.
_AT_ONCE, _NUMBERS_AT_ONCE = 16, 1 << 19
# Shares of a group's range to try. Clipping the rare large entries pays when codes are few (error
# of dW of a real adapter: 2 % less at 4 bit, 4 % at 3, 7 % at 2).
_SHRINK = {8: (1.0,), 4: (1.0, 0.9, 0.8), 3: (0.9, 0.75), 2: (0.9, 0.7)}


def compress(
    adapter: Adapter,
    levels_of: Mapping[str, Levels],
    parts: Mapping[str, Components] | None = None,
) -> Compressed:
    """Quantize every module of an adapter by `quantize_modules`.

    Args:
        adapter: any ranks and scales.
        levels_of: module path -> bit allocation; modules that are missing are dropped.
        parts: `svd_components` of the adapter, if they are known.
    """
    parts = parts or svd_components(adapter)
    kept = [path for path, (rows, _) in parts.items() if levels_of.get(path) and len(rows)]
    stored: dict[str, tuple[Level, ...]] = {}
    for paths, precise in together(kept, parts):
        chosen = [levels_of[path] for path in paths]
        stored |= zip(paths, quantize_modules(precise, chosen))
    modules = dict(sorted(stored.items()))
    return Compressed(adapter.name, modules, adapter.base, adapter.sources)


def svd_components(adapter: Adapter) -> dict[str, Components]:
    """Module path -> the singular components of its dW^T = a @ b, the largest first.

    They are rows `(n, in)` and `(n, out)` in float32, each with the root of its singular value;
    components that are zero are left out, so n may be below the rank. Compute them once to try
    several bit allocations of one adapter. They take the bytes of its float32 factors.
    """
    components: dict[str, Components] = {}
    with threadpool_limits(1):
        for path, lora in sorted(adapter.modules.items()):
            a, b = lora.factors()
            if not a.shape[1]:
                components[path] = a.T, b
                continue
            space = to_core([(a, b)])
            core = space.weighted_sum(np.ones(1))
            left, right = factorise(core, space.q_a, space.q_b, a.shape[1])
            size = np.linalg.norm(left, axis=0)
            order = np.argsort(-size, kind="stable")
            # Both factors hold the root of the singular value; a value below 1e-7 of the largest is
            # rounding.
            order = order[size[order] > np.max(size) * 1e-7**0.5]
            components[path] = left.T[order], right[order]
    return components


def together(
    paths: Sequence[str], parts: Mapping[str, Components]
) -> Iterator[tuple[list[str], list[Components]]]:
    """Yield modules by shape and path, as many at a time as should be rounded together.

    BLAS has one thread inside: several cost more than they save on matrices as small as these.

    Returns:
        Paths, and their components in float64.
    """
    batches: list[list[str]] = []
    numbers = 0
    for path in sorted(paths, key=lambda path: (*(x.shape[1] for x in parts[path]), path)):
        more = sum(x.size for x in parts[path])
        if not batches or len(batches[-1]) == _AT_ONCE or numbers + more > _NUMBERS_AT_ONCE:
            batches.append([])
            numbers = 0
        batches[-1].append(path)
        numbers += more
    with threadpool_limits(1):
        for batch in batches:
            pairs = (parts[path] for path in batch)
            yield batch, [(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs]


def quantize_modules(
    parts: Sequence[Components], levels: Sequence[Levels]
) -> list[tuple[Level, ...]]:
    """Quantize the leading singular components of every module's dW^T = a.T @ b.

    Three things make the error smaller than that of rounding to nearest, at the same bytes:

    - The rows of a level are mixed by an orthogonal matrix, which leaves dW as it is and gives all
      rows one size; otherwise the rounding of the largest component dominates.
    - Error compensation (GPTQ): the rows still to be rounded make up for each row's error. The
      mixing makes it possible, since rows then overlap.
    - The other factor is solved anew, given the stored values of this one.

    Relative error of dW, all modules of the library's date-de (rank 8), nearest -> here: 8 bit
    0.0071 -> 0.0038, 4 bit 0.118 -> 0.062, 3 bit 0.246 -> 0.126, 2 bit 0.509 -> 0.254.

    Args:
        parts: components of every module in float64, at least one row.
        levels: bit allocation of every module, at least one level; components beyond the module's
            rows are left out.

    Returns:
        For every module one `Level` per level that got a component.
    """
    sizes: list[list[tuple[int, int]]] = []  # The levels that get components, and how many.
    for module, (a, _) in zip(levels, parts):
        starts = np.cumsum([0, *(n for n, _ in module)]).tolist()
        counts = [(min(n, len(a) - start), bits) for (n, bits), start in zip(module, starts)]
        sizes.append([(n, bits) for n, bits in counts if n > 0])
    every_a, every_b = zip(*parts)
    leading = [b[: sum(n for n, _ in size)] for size, b in zip(sizes, every_b)]
    mixed = [hartley_rotation(size) @ b for size, b in zip(sizes, leading)]
    codes_a, values_a = gptq_round(mixed, every_b, every_a, sizes)
    codes_b, _ = gptq_round(values_a, every_a, every_b, sizes)
    return [tuple(map(Level, a, b)) for a, b in zip(codes_a, codes_b)]


def hartley_rotation(levels: Levels) -> np.ndarray:
    """`(n, n)` orthogonal matrix that mixes the components within each level.

    Each block is a Hartley matrix, whose entries are all of about one size, so after it the rows of
    a level have one size too; components at 16 bits are left alone.
    """
    blocks = []
    for n, bits in levels:
        angle = 2 * np.pi / n * np.outer(np.arange(n), np.arange(n))
        blocks.append(np.eye(n) if bits == 16 else (np.cos(angle) + np.sin(angle)) / np.sqrt(n))
    return block_diag(*blocks)


def solve(gram: np.ndarray, products: np.ndarray) -> np.ndarray:
    """The least-squares factor, by the Gram matrix of the other factor's rows."""
    return np.linalg.solve(_regular(gram), products)


def _regular(gram: np.ndarray) -> np.ndarray:
    """A Gram matrix made regular where rounding left zero or equal rows."""
    return gram + (1e-9 * np.trace(gram) + 1e-30) * np.eye(len(gram))


def gptq_round(
    fixed: Sequence[np.ndarray],
    same: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    levels: Sequence[Levels],
    group_size: int = GROUP_SIZE,
    symmetric: bool = False,
) -> tuple[list[list[Quantized]], list[np.ndarray]]:
    """Round the rows x that minimise `|same.T @ other - fixed.T @ x|`, for every module.

    Each row's error is compensated by those not yet rounded. Use it for rows that overlap (after
    `hartley_rotation`, say): orthogonal rows cannot compensate each other.

    Args:
        fixed: `(n, width of same)`, the rows of the other factor as they are.
        same: `(m, width of same)`, the factor that `fixed` replaces.
        other: `(m, width)`, the factor that x replaces.
        levels: bit allocation of every module, n components in all.
        group_size: numbers that share a scale and a bias.
        symmetric: every bias is -2**(bits - 1) times its scale, as in GGUF's Q4_0 and Q8_0.

    Returns:
        For every module its levels, and the float64 numbers `(n, width)` that they stand for.
    """
    grams = [rows @ rows.T for rows in fixed]
    exact = [solve(g, (x @ y.T) @ z) for g, x, y, z in zip(grams, fixed, same, other)]
    stored: dict[int, list[Quantized]] = {}
    numbers: dict[int, np.ndarray] = {}
    # Modules of one width are rounded together: one by one they take three times as long.
    for width, members in indices_by_key(rows.shape[1] for rows in exact).items():
        # The most rows first, so that the modules still active at a step are the first ones.
        members.sort(key=lambda i: -len(exact[i]))
        m, n, groups = len(members), len(exact[members[0]]), -(-width // group_size)
        # Step k rounds the k-th row from each module's end. The last level has the fewest bits, so
        # its errors come first and finer rows compensate them.
        left, metric = np.zeros((m, n, width)), np.tile(np.eye(n), (m, 1, 1))
        bits = np.zeros((m, n), int)
        for k, i in enumerate(members):
            last = len(exact[i])
            left[k, :last] = exact[i][::-1]
            metric[k, :last, :last] = _regular(grams[i])[::-1, ::-1]
            bits[k, :last] = np.repeat([b for _, b in levels[i]], [c for c, _ in levels[i]])[::-1]
        codes = np.zeros((m, n, groups * group_size), np.uint8)
        scales, biases = (np.zeros((m, n, groups), np.float16) for _ in range(2))
        values = np.zeros((m, n, width), np.float16)
        for k in range(n):
            active = np.count_nonzero(bits[:, k])
            now = left[:active, k]
            for b in map(int, np.unique(bits[:active, k])):
                at = np.flatnonzero(bits[:active, k] == b)
                if b == 16:
                    values[at, k] = now[at]
                else:
                    fitted = _fit_codes(now[at], b, group_size, symmetric)
                    codes[at, k], scales[at, k], biases[at, k], values[at, k] = fitted
            if k + 1 < n:
                later = metric[:active, k + 1 :]
                carry = np.linalg.solve(later[:, :, k + 1 :], later[:, :, k : k + 1])
                left[:active, k + 1 :] += carry * (now - values[:active, k])[:, None]
        for k, i in enumerate(members):
            rows = [x[k, : len(exact[i])][::-1] for x in (codes, scales, biases, values)]
            numbers[i], stored[i] = rows[-1].astype(np.float64), []
            ends = np.cumsum([count for count, _ in levels[i]])[:-1]
            pieces = (np.split(x, ends) for x in rows)
            for (_, b), code, scale, bias, value in zip(levels[i], *pieces):
                weight = value if b == 16 else pack_codes(code, b)
                kept = slice(0 if b == 16 else None)
                part = Quantized(weight, scale[:, kept], bias[:, kept], b, group_size, width)
                stored[i].append(part)
    return [stored[i] for i in range(len(exact))], [numbers[i] for i in range(len(exact))]


def _fit_codes(
    rows: np.ndarray, bits: int, group_size: int, symmetric: bool
) -> tuple[np.ndarray, ...]:
    """Round rows to nearest; each group takes the clipping with the least error, refitted or not.

    Returns codes, float16 scales and biases `(rows, groups)`, and float16 values `(rows, width)`.
    """
    n, width = rows.shape
    padded = np.pad(rows, [(0, 0), (0, -width % group_size)]).astype(np.float32)
    groups = padded.reshape(-1, group_size)
    shares = np.array(_SHRINK[bits], np.float32)[:, None]
    if symmetric:
        # The largest number gets code 0: that side has one code more.
        largest = np.abs(groups).argmax(axis=1)[:, None]
        peaks = np.take_along_axis(groups, largest, axis=1)[:, 0]
        first = _encode(groups, shares * peaks / -(2 ** (bits - 1)), None, bits)
        centred = first[0] - np.float32(2 ** (bits - 1))
        second = _encode(groups, _slope(centred, groups), None, bits)
    else:
        low, high = groups.min(axis=1), groups.max(axis=1)
        cut = (1 - shares) / 2 * (high - low)
        first = _encode(groups, (high - low - 2 * cut) / (2**bits - 1), low + cut, bits)
        # Scales and biases by least squares, the codes given.
        mean = first[0].mean(axis=-1)
        scale = _slope(first[0] - mean[..., None], groups)
        second = _encode(groups, scale, groups.mean(axis=-1) - scale * mean, bits)
    codes, scales, biases, values = (np.concatenate(x) for x in zip(first, second))
    rest = groups - values
    best = np.einsum("cij,cij->ci", rest, rest).argmin(axis=0), np.arange(len(groups))
    *code, values = (x[best].reshape(n, -1) for x in (codes, scales, biases, values))
    return *code, values[:, :width]


def _encode(
    groups: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, bits: int
) -> tuple[np.ndarray, ...]:
    """Codes, scales and biases as stored, and values, of several candidates `(c, groups)`.

    Without biases they are those of symmetric codes.
    """
    scale = scale.astype(np.float16)
    bias = scale * np.float16(-(2 ** (bits - 1))) if bias is None else bias.astype(np.float16)
    wide, offset = scale.astype(np.float32)[..., None], bias.astype(np.float32)[..., None]
    codes = (groups - offset) / np.where(wide == 0, 1, wide)
    codes = np.clip(np.rint(codes, out=codes), 0, 2**bits - 1, out=codes)
    return codes, scale, bias, codes * wide + offset


def _slope(centred: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The factor `(c, groups)` of centred codes that is closest to the numbers."""
    spread = np.einsum("cij,cij->ci", centred, centred)
    return np.einsum("cij,ij->ci", centred, groups) / np.where(spread == 0, 1, spread)
