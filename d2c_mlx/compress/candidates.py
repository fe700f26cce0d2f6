"""Candidates of a plan: adapters in stored forms, each measured at its best scale.

A stored form has some components at some bits. Dropping components leaves the rest too weak: the
less is kept, the more a scale above 1 gains (0.75 % of the bytes of gec-en: regret 0.122 at scale
1, 0.057 at 1.7). A scale costs no byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.cluster.partition import Members
from d2c_mlx.compress.affine import Levels
from d2c_mlx.compress.allocate import Candidate, lost_worth
from d2c_mlx.compress.capacity import Capacity
from d2c_mlx.compress.quantize import Components, svd_components
from d2c_mlx.compress.waiting import WaitingForm
from d2c_mlx.evaluate.workers import ByteCache
from d2c_mlx.merge.library import Library
from d2c_mlx.utils.device import give_back_memory
from d2c_mlx.utils.line_search import FINE_SCALES, line_search

__all__ = ["Form", "FormMeter", "worth"]

# Sizes to try: from four times smaller to four times larger than the equal share of the budget that
# an adapter's tasks have. The grid is fixed, so that plans for several budgets measure the same
# forms. A step is a power of two with this exponent. Merges have a coarser grid: measuring one runs
# the calibration rows of all its tasks, and merges matter only where bytes are scarce.
_SMALLER, _LARGER = 4, 4
_STEPS = {"own": 0.5, "merged": 1.0}
# Share of the worth that is spread evenly over modules.
_EVENLY = 0.25
# Scales where the rows' own answers are not trusted.
_FROM_ONE = FINE_SCALES[FINE_SCALES.index(1.0) :]

Units = Sequence[tuple[Members, Adapter]]


@dataclass(frozen=True)
class Form:
    """One adapter in one stored form.

    Attributes:
        members: the tasks that it serves.
        adapter: the adapter before it is quantized.
        levels: module path -> bit allocation; modules that are missing are dropped.
        family: `Candidate.family`, "own" or "merged".
        share: `Candidate.share`, the share of the 16-bit bytes.
        lost: share of the adapter's worth that is not stored, between 0 and 1.
    """

    members: Members
    adapter: Adapter
    levels: Mapping[str, Levels]
    family: str = "own"
    share: float = 1.0
    lost: float = 0.0


class FormMeter:
    """Measures adapters in stored forms, each at its best scale.

    `ladder` gives an adapter's forms; `measure` measures one. Regrets are measured on teacher
    targets (`Library.by_teacher`): judged by the answers of ten calibration rows alone, a small
    form may look better than the adapter itself.
    """

    def __init__(self, library: Library, capacity: Capacity) -> None:
        """Measure for a library under a budget.

        Args:
            library: the measured library.
            capacity: sizes of its adapters.
        """
        self._library, self._capacity = library, capacity
        # In float32, so twice as large as their adapters.
        self._parts: ByteCache[str, dict[str, Components]] = ByteCache(
            library.scorer.engine.free // 8
        )

    def ladders(self, units: Units, family: str, room: float) -> Iterator[list[Form]]:
        """Yield every unit's forms at several sizes, the largest first; nothing is measured.

        Args:
            units: pairs of members and the adapter that serves them.
            family: "own" or "merged".
            room: bytes for rows.
        """
        for members, adapter in units:
            nbytes = self._capacity.nbytes(adapter)
            fair, most = self.fair(members, adapter, room), self._capacity.storage.most[family]
            shares = _grid(fair, _STEPS[family], most)[::-1]
            gains = [self._library.module_gains[i] for i in members]
            values = worth(self._components(adapter), gains)
            forms: dict[str, Form] = {}
            for share in shares:
                levels = self._capacity.storage.allocate(values, share * nbytes)
                lost = lost_worth(values, levels)
                form = Form(members, adapter, levels, family, share, lost)
                if levels:
                    forms.setdefault(repr(levels), form)
            yield list(forms.values())

    def fair(self, members: Members, adapter: Adapter, room: float) -> float:
        """The share of an adapter's 16-bit bytes that is its tasks' equal part of a budget.

        Args:
            members: the tasks that it serves.
            adapter: a task adapter or a merge, which has the parts of all its members.
            room: bytes for rows of the budget.
        """
        sizes = self._capacity.sizes
        part = sum(sizes[i] for i in members) / sum(sizes)
        return room * part / self._capacity.nbytes(adapter)

    def _components(self, adapter: Adapter) -> dict[str, Components]:
        """`svd_components`, computed again if memory had no room to keep them."""
        found = self._parts.get(adapter.digest)
        if found is None:
            found = svd_components(adapter)
            nbytes = sum(a.nbytes + b.nbytes for a, b in found.values())
            self._parts.put(adapter.digest, found, nbytes)
        return found

    def scales(self, members: Members) -> tuple[float, ...]:
        """Scales to try: those below 1 only where the rows' own answers are trusted."""
        trusted = any(self._library.by_teacher.trust[i] for i in members)
        return FINE_SCALES if trusted else _FROM_ONE

    def measure(
        self,
        form: Form,
        scales: Sequence[float] = _FROM_ONE,
        start: float = 1.0,
        known: Candidate | None = None,
    ) -> Candidate:
        """Measure one stored form at its best scale.

        Args:
            form: the form to store.
            scales: scales to try, rising.
            start: one of `scales`, from which a line search goes.
            known: the form as measured at `start`, if it was; it is not stored or measured again.

        Returns:
            The candidate, whose stored form waits in a file.
        """
        waiting = known.stored if known else None
        if waiting:
            small = waiting.load()
        else:
            parts = self._components(form.adapter)
            small = self._capacity.storage.store(form.adapter, form.levels, parts)

        def regret(scale: float) -> float:
            if known and scale == known.scale:
                return known.regret
            plain = small.scaled(scale).adapter(self._library.base.dtype)
            return float(self._library.by_teacher.regrets(plain, form.members).sum())

        scale, lowest = line_search(regret, scales, start)
        waiting = waiting or WaitingForm(small)
        give_back_memory()
        return replace(self.estimate(form, lowest), scale=scale, stored=waiting, measured=True)

    def estimate(self, form: Form, regret: float) -> Candidate:
        """The form as a candidate that is not measured."""
        nbytes = self._capacity.storage.nbytes(form.adapter.name, form.levels)
        return Candidate(
            form.members, form.family, form.share, form.levels, nbytes, regret, measured=False
        )


def _grid(fair: float, step: float, most: float) -> list[float]:
    """Shares of the 16-bit bytes to try: powers of two, or of its root, around the given one."""
    ends = math.log2(fair / _SMALLER), math.log2(min(fair * _LARGER, most))
    first, last = (round(end / step) for end in ends)
    return [2 ** (k * step) for k in range(min(first, last), last + 1)]


def worth(
    parts: Mapping[str, Components], gains: Sequence[Mapping[str, float]]
) -> dict[str, np.ndarray]:
    """Worth of each component, for `allocate`: its share of its module's energy times the gain.

    A module's gain is known only roughly from ten rows, so a part of the worth is spread evenly.

    Args:
        parts: `quantize.svd_components` of a task adapter or a merge.
        gains: for each task that it serves, module path -> gain, see `attribution.module_gains`;
            all tasks count alike.

    Returns:
        Module path -> worth of its components, falling; all modules together sum to 1.
    """
    totals = [sum(max(0.0, gain) for gain in one.values()) or 1.0 for one in gains]
    values = {}
    for path, (a, b) in parts.items():
        energy = _squares(a) * _squares(b)
        gain = sum(max(0.0, one.get(path, 0.0)) / t for one, t in zip(gains, totals))
        share = (1 - _EVENLY) * gain / len(gains) + _EVENLY / len(parts)
        # Rounding may let equal singular values rise, and `allocate` needs falling worths.
        values[path] = share * np.minimum.accumulate(energy) / max(float(energy.sum()), 1e-30)
    return values


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.sum(np.square(rows, dtype=np.float64), axis=1)
