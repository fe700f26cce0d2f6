"""Bytes of a plan: which components get how many bits, and what fits a budget in which form.

Form and bytes of adapters differ by storage: one compact file for all, or a GGUF for each
(`gguf_form.GgufStorage`, with the methods of `CompactStorage`).
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.budget import Budget
from d2c_mlx.compress.compact_file import (
    COMPACT,
    MAX_COUNT,
    compact_nbytes,
    layout,
    make_index,
    write_compact,
)
from d2c_mlx.compress.compressed import GROUP_SIZE, Levels, packed_columns
from d2c_mlx.compress.gguf_form import GgufStorage
from d2c_mlx.compress.quantize import Components, compress
from d2c_mlx.models.model import Model
from d2c_mlx.utils.errors import BudgetError, ConfigError

# Share of a component's energy lost at each bit width: squared relative errors measured with
# `quantize.quantize_modules`. Then bytes of a number, with its share of scale and bias.
LOST = {0: 1.0, 2: 0.239**2, 3: 0.117**2, 4: 0.058**2, 8: 0.004**2, 16: 0.0}
_BYTES = {bits: bits / 8 + 4 / GROUP_SIZE for bits in LOST} | {0: 0.0, 16: 2.0}
# Share of the worth that is spread evenly over modules.
_EVENLY = 0.25


def worth(
    parts: Mapping[str, Components], gains: Sequence[Mapping[str, float]]
) -> dict[str, np.ndarray]:
    """Worth of each component, for `allocate`: its share of its module's energy times the gain.

    A module's gain is known only roughly from ten rows, so a part of the worth is spread evenly.

    Args:
        parts: `quantize.svd_components` of a task adapter or a merge.
        gains: for each task that it serves, module path -> gain, see `distill.module_gains`;
            all tasks count alike.

    Returns:
        Module path -> worth of its components, falling; all modules together sum to 1.
    """
    totals = [sum(max(0.0, gain) for gain in task.values()) or 1.0 for task in gains]
    values = {}
    for path, factors in parts.items():
        norms = [np.sum(np.square(rows, dtype=np.float64), axis=1) for rows in factors]
        energy = norms[0] * norms[1]
        gain = sum(max(0.0, task.get(path, 0.0)) / total for task, total in zip(gains, totals))
        share = (1 - _EVENLY) * gain / len(gains) + _EVENLY / len(parts)
        # Rounding may let equal singular values rise, and `allocate` needs falling worths.
        values[path] = share * np.minimum.accumulate(energy) / max(float(energy.sum()), 1e-30)
    return values


def allocate(
    worth: Mapping[str, np.ndarray],
    widths: Mapping[str, int],
    nbytes: float,
    offered: Sequence[int] = (2, 3, 4, 8),
) -> dict[str, Levels]:
    """Allocate bits to the components of every module, the most worth per byte first.

    Use it for one adapter; `forms.choose` decides between adapters. Each greedy step adds a
    module's next component at the fewest bits, or stores one in more.

    Args:
        worth: module path -> worth of each component, falling, all in one unit; see
            `worth`. A module without positive worth gets nothing.
        widths: module path -> in + out.
        nbytes: most bytes of all factors.
        offered: bit widths, rising. The loss at 8 bits never shows, so 16 are not worth offering.

    Returns:
        Module path -> bit allocation, without modules that get nothing; at most `MAX_COUNT`
        components of a module at the same bits.
    """
    below = dict(zip(offered, (0, *offered)))
    steps = []
    for path, values in worth.items():
        for j, value in enumerate(values):
            for bits, fewer in below.items():
                gain = float(value) * (LOST[fewer] - LOST[bits])
                cost = widths[path] * (_BYTES[bits] - _BYTES[fewer])
                if gain > 0:
                    steps.append((-gain / cost, path, j, bits, cost))
    given = {path: [0] * len(values) for path, values in worth.items()}
    counts: Counter[tuple[str, int]] = Counter()
    free, before = nbytes, math.inf
    steps.sort()
    # One pass is enough, unless a component had to wait until others at its bits moved up.
    while free < before:
        before = free
        for _, path, j, bits, cost in steps:
            # Only the next bits of a component, and a component only after all larger ones.
            ready = given[path][j] == below[bits] and (j == 0 or given[path][j - 1] >= bits)
            if ready and cost <= free and counts[path, bits] < MAX_COUNT:
                given[path][j] = bits
                counts[path, bits] += 1
                counts[path, below[bits]] -= 1
                free -= cost
    levels: dict[str, Levels] = {}
    for path in worth:
        stored = tuple((counts[path, bits], bits) for bits in offered[::-1] if counts[path, bits])
        if stored:
            levels[path] = stored
    return levels


def lost_worth(worth: Mapping[str, np.ndarray], levels: Mapping[str, Levels]) -> float:
    """The share of the worth that a bit allocation does not store, between 0 and 1.

    Args:
        worth: module path -> worth of each component, falling, as for `allocate`.
        levels: module path -> bit allocation; modules that are missing are dropped.
    """
    kept = 0.0
    for path, given in levels.items():
        stored = np.repeat([1 - LOST[bits] for _, bits in given], [n for n, _ in given])
        kept += float(worth[path][: len(stored)] @ stored)
    total = sum(float(values.sum()) for values in worth.values())
    return max(0.0, 1 - kept / total) if total else 0.0


@dataclass(frozen=True)
class CompactStorage:
    """All adapters in one compact file, see `compact_file`.

    Attributes:
        names: the adapters' names.
        base: the base model's name.
        shapes: module path -> (in, out) of every module that some adapter has.
        most: family -> the largest share of the 16-bit bytes to try. For a task adapter it is above
            what 4 bits take, whose loss hardly shows; for a merge it is 8 bits, since a merge has
            the shares of several tasks.
    """

    names: Sequence[str]
    base: str | None
    shapes: Mapping[str, tuple[int, int]]
    most: ClassVar[Mapping[str, float]] = {"own": 0.35, "merged": 0.54}

    @cached_property
    def header_nbytes(self) -> int:
        """Bytes that are set aside for the header: that of all adapters and their merge at 3 bits.

        Nearly every pack stays below it; `total` is exact once counts are known.
        """
        names = [*self.names, "+".join(self.names)]
        levels = [dict.fromkeys(self.shapes, [(1, 4), (1, 3), (1, 2)])] * len(names)
        index = make_index(names, self.base or "", levels, self.shapes)
        # Numbers in the real header may have a few digits more.
        return len(layout(index)[0]) + 512

    def allocate(self, values: Mapping[str, np.ndarray], nbytes: float) -> dict[str, Levels]:
        """Module path -> levels with the most worth that fit; modules without any are left out."""
        return allocate(values, {path: sum(self.shapes[path]) for path in values}, nbytes)

    def nbytes(self, name: str, levels: Mapping[str, Levels]) -> int:
        """Bytes of the rows of one adapter of this name and of its part of the index."""
        # A count per module and bit width, of which most have 3.
        total = 3 * len(self.shapes)
        for path, given in levels.items():
            for n, bits in given:
                for width in self.shapes[path]:
                    words, groups = packed_columns(width, bits)
                    total += n * ((2 if bits == 16 else 4) * words + 4 * groups)
        return total

    def total(self, files: Sequence[tuple[Adapter, Mapping[str, Levels]]]) -> int:
        """Bytes of the file; an upper bound, since components may turn out to be zero."""
        base = next((adapter.base for adapter, _ in files if adapter.base), None)
        names, levels = [adapter.name for adapter, _ in files], [levels for _, levels in files]
        return compact_nbytes(make_index(names, base, levels, self.shapes))

    store = staticmethod(compress)

    def write(self, directory: Path, adapters: Sequence[Any]) -> None:
        """Write adapters in this form into an empty directory, in their order."""
        write_compact(directory / COMPACT, adapters)


@dataclass(frozen=True)
class Capacity:
    """Sizes of a library's adapters and merges as packs store them, and what fits a budget.

    Use `n_clusters` and `merge_rank` for merges in 16 bit, `room` for a plan.

    Attributes:
        base: the base model of all adapters.
        inputs: the adapters.
        budget: the pack's budget.
        rank: largest rank of a merge; None is the largest of the adapters.
        form: of a planned pack, "compact" or "gguf".
    """

    base: Model
    inputs: Sequence[Adapter]
    budget: Budget
    rank: int | None = None
    form: str = "compact"

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module path -> (in, out) of every module that some adapter has."""
        paths = sorted({path for adapter in self.inputs for path in adapter.modules})
        return {path: self.base.module_shapes[path] for path in paths}

    @property
    def n_clusters(self) -> int:
        """Number of adapters in the pack; all where a budget in bytes has room for them."""
        return min(self.budget.n_adapters or len(self.inputs), len(self.inputs))

    def nbytes(self, adapter: Adapter) -> int:
        """Bytes of an adapter written in mlx-lm's layout, in the base's dtype."""
        return adapter.uniform(self.base.dtype).nbytes(self.base.n_layers)

    @cached_property
    def sizes(self) -> list[int]:
        """`nbytes` of each input adapter."""
        return [self.nbytes(adapter) for adapter in self.inputs]

    @property
    def total(self) -> int:
        """Bytes of all input adapters, of which a budget in percent is a share."""
        return sum(self.sizes)

    @property
    def max_bytes(self) -> int | None:
        """Bytes that the pack may have; None if only the number of adapters counts."""
        return self.budget.allowed_bytes(self.total)

    @cached_property
    def merge_rank(self) -> int:
        """The largest rank of a merged adapter.

        Raises:
            ConfigError: it is above the full rank of every module, so the rest would be zeros.
        """
        largest = max(adapter.rank for adapter in self.inputs)
        rank, most = self.rank or largest, max(largest, *map(min, self.shapes.values()))
        if rank > most:
            raise ConfigError(
                f"merge_rank: found {rank:,}, expected at most {most:,}, which no update of these"
                " modules exceeds"
            )
        return rank

    @property
    def _longest_name(self) -> str | None:
        """The longest of the base's names: a merge has one of them, a header has room for any."""
        return max((x.base for x in self.inputs), key=lambda name: len(json.dumps(name)))

    def nbytes_of_rank(self, rank: int) -> int:
        """Bytes of a merged adapter of this rank with every module that some adapter has."""
        modules = {
            path: LoRA(mx.zeros((n_in, rank)), mx.zeros((rank, n_out)))
            for path, (n_in, n_out) in self.shapes.items()
        }
        return self.nbytes(replace(self.inputs[0], base=self._longest_name, modules=modules))

    @cached_property
    def storage(self) -> CompactStorage | GgufStorage:
        """The form of a planned pack.

        Raises:
            InputError: a base model or modules that GGUF has no names for.
        """
        if self.form == "gguf":
            return GgufStorage(self.shapes, self.base.config)
        return CompactStorage([x.name for x in self.inputs], self._longest_name, self.shapes)

    def room(self, budget: Budget | None = None) -> int:
        """Bytes that a planned pack has for rows, by this budget or another.

        Raises:
            BudgetError: the budget is not larger than the header.
        """
        budget, header = budget or self.budget, self.storage.header_nbytes
        nbytes = budget.allowed_bytes(self.total) or 0
        if nbytes <= header:
            raise BudgetError(
                f"budget: {budget.text} is {nbytes:,} bytes, and the header of a pack takes up"
                f" to {header:,}; give more than that"
            )
        return nbytes - header
