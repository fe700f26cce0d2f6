"""Adapters in stored forms: which components in how many bits, at which scale, and what they lose.

Dropped components leave the rest too weak: the less is kept, the more it gains from a scale above 1
(0.75 % of the bytes of gec-en: regret 0.122 at scale 1, 0.057 at 1.7). A scale costs no byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.cluster.partition import Members
from d2c_mlx.compress.affine import Levels, packed_columns
from d2c_mlx.compress.allocate import Candidate, allocate
from d2c_mlx.compress.capacity import GROUP_SIZE, Capacity
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.quantize import Components, compress, svd_components
from d2c_mlx.merge.study import Study
from d2c_mlx.utils.line_search import FINE_SCALES, line_search

__all__ = ["Form", "FormMeter", "stored", "worth"]

# Sizes that are tried: so many times smaller and larger than an equal share of the budget, on a
# grid of their own, so that plans for several budgets ask the same. Steps are powers of two: a
# merge costs all its tasks' probes, and matters only where bytes are scarce.
_SMALLER, _LARGER = 4, 4
_STEPS = {"own": 0.5, "merged": 1.0}
# The largest: more than 4 bits take, which hardly shows; 8 for a merge, which has several shares.
_MOST = {"own": 0.35, "merged": 0.54}
# Share of the worth that all modules get alike.
_EVENLY = 0.25

Units = Sequence[tuple[Members, Adapter]]


@dataclass(frozen=True)
class Form:
    """One adapter in one stored form.

    Attributes:
        members: the tasks that it serves.
        adapter: it, before it is stored.
        levels: module path -> how many components in how many bits; modules without are dropped.
        parts: `svd_components` of the adapter, if they are known.
    """

    members: Members
    adapter: Adapter
    levels: Mapping[str, Levels]
    parts: Mapping[str, Components] | None = None


class FormMeter:
    """Measures adapters in stored forms, each at its best scale.

    Regrets are those of `Study.teacher_regret`: by the answers of ten rows alone a small form may
    look better than the adapter itself.
    """

    def __init__(self, study: Study, capacity: Capacity) -> None:
        """Measure for a library under a budget.

        Args:
            study: the measured library.
            capacity: sizes of its adapters.
        """
        self._study, self._capacity = study, capacity
        self._library = study.library

    def sized(self, units: Units, family: str, rooms: Sequence[float]) -> list[Candidate]:
        """Measure every unit at several sizes.

        Args:
            units: members and the adapter that serves them.
            family: "own" or "merged".
            rooms: bytes to plan for, rising.
        """
        teacher, meter = self._study.teacher_regret, self._library.evaluator.meter
        widths = {path: sum(shape) for path, shape in self._library.base.module_shapes.items()}
        whole = [self._capacity.nbytes(adapter) for _, adapter in units]
        shares = _grid(rooms[0] / sum(whole), rooms[-1] / sum(whole), family)[::-1]
        tokens = [sum(teacher.sets[i].n_tokens for i in members) for members, _ in units]
        found: list[Candidate] = []
        for u, ((members, adapter), nbytes) in enumerate(zip(units, whole)):
            # Of every size at least two scales are tried.
            meter.foresee(2 * len(shares) * sum(tokens[u:]))
            parts = svd_components(adapter)
            values = worth(parts, [self._study.module_gains[i] for i in members])
            known: set[str] = set()
            # The largest first: the less is kept, the larger is the best scale. Below 1 only where
            # the rows themselves may say so.
            least = FINE_SCALES[0] if any(teacher.trust[i] for i in members) else 1.0
            for share in shares:
                levels = allocate(values, widths, share * nbytes)
                levels = {path: some for path, some in levels.items() if some}
                if levels and repr(levels) not in known:
                    known.add(repr(levels))
                    form = Form(members, adapter, levels, parts)
                    found.append(self.measure(form, family, share, least))
                    least = found[-1].scale
        meter.foresee(0)
        return found

    def measure(self, form: Form, family: str, share: float, least: float = 1.0) -> Candidate:
        """Measure one stored form, its scale tuned.

        Args:
            form: what is stored.
            family: of the candidate.
            share: of the 16-bit bytes, as the candidate says it.
            least: one of `FINE_SCALES`, below which none is tried.
        """
        small = stored(form.adapter, form.levels, parts=form.parts)

        def regret(scale: float) -> float:
            plain = small.scaled(scale).adapter(self._library.base.dtype)
            return float(self._study.teacher_regret.under(plain, form.members).sum())

        scale, lowest = line_search(regret, FINE_SCALES[FINE_SCALES.index(least) :], least)
        nbytes = self._rows_nbytes(form.levels) + self._counts_nbytes()
        return Candidate(form.members, family, share, form.levels, nbytes, lowest, scale, small)

    def _rows_nbytes(self, levels: Mapping[str, Levels]) -> int:
        total = 0
        for path, some in levels.items():
            for n, bits in some:
                for width in self._library.base.module_shapes[path]:
                    words, groups = packed_columns(width, bits, GROUP_SIZE)
                    total += n * ((2 if bits == 16 else 4) * words + 4 * groups)
        return total

    def _counts_nbytes(self) -> int:
        """Bytes of one adapter in the index: one per module and bits, mostly three in a plan."""
        return 3 * len(self._capacity.target_paths)


def stored(
    adapter: Adapter,
    levels: Mapping[str, Levels],
    scale: float = 1.0,
    size: int = GROUP_SIZE,
    parts: Mapping[str, Components] | None = None,
) -> Compressed:
    """The stored form, in groups of `size`; modules without levels are dropped."""
    every = {path: levels.get(path, ()) for path in adapter.modules}
    return compress(adapter, every, size, parts=parts).scaled(scale)


def _grid(least: float, most: float, family: str) -> list[float]:
    """Powers of two, or of its root, around shares of the 16-bit bytes; the largest at least."""
    step = _STEPS[family]
    ends = math.log2(least / _SMALLER), math.log2(min(most * _LARGER, _MOST[family]))
    first, last = (round(end / step) for end in ends)
    return [2 ** (k * step) for k in range(min(first, last), last + 1)]


def worth(
    parts: Mapping[str, Components], gains: Sequence[Mapping[str, float]]
) -> dict[str, np.ndarray]:
    """What each component is worth: its share of its module's energy, times the module's gain.

    Ten rows say roughly what a module gains, so a part of the worth is shared out evenly.

    Args:
        parts: `quantize.svd_components` of an adapter of one task, or a merge.
        gains: of the tasks that it serves, see `attribution.module_gains`; each counts alike.

    Returns:
        Module path -> values of its components, falling; 1 in all.
    """
    totals = [sum(max(0.0, gain) for gain in one.values()) or 1.0 for one in gains]
    values = {}
    for path, (a, b) in parts.items():
        energy = np.sum(a**2, axis=1) * np.sum(b**2, axis=1)
        gain = sum(max(0.0, one.get(path, 0.0)) / t for one, t in zip(gains, totals))
        share = (1 - _EVENLY) * gain / len(gains) + _EVENLY / len(parts)
        # Equal singular values are equal but for rounding, which may let them rise.
        values[path] = share * np.minimum.accumulate(energy) / max(float(energy.sum()), 1e-30)
    return values
