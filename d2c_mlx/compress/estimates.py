"""Estimated regrets of stored forms, corrected by the few that are measured.

The worth that a form lacks foresees its regret up to a factor of its adapter's own: on 24 real
adapters at nine sizes the log of the regret is linear in the log odds of the lost worth, and
off by a factor of 1.5 once that adapter's factor is known. So one measurement places a whole ladder
of sizes, an integer program chooses by the estimates, and only what it chooses is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from d2c_mlx.cluster.partition import Members
from d2c_mlx.compress.allocate import Candidate
from d2c_mlx.compress.candidates import Form, FormMeter

__all__ = ["FormErrors", "FormEstimates"]

# log regret = _AT_EVEN + _SLOPE * log odds of the lost worth, before anything is measured; then the
# standard deviations of the slope, of an adapter's own factor, and of a measurement.
_AT_EVEN, _SLOPE = -3.5, 1.25
_SD_SLOPE, _SD_OWN, _SD_MEASURED = 0.3, 1.2, 0.35
# The best scale, fitted on the same adapters: log scale = _SCALE_AT_EVEN + _SCALE_SLOPE * log odds.
_SCALE_AT_EVEN, _SCALE_SLOPE = 0.46, 0.14
# Regrets below this differ by rounding and luck.
_LEAST = 2e-4


_Key = tuple[Members, str, float]


@dataclass
class _Ladder:
    """One adapter's forms, with the regret that it has before it is compressed."""

    forms: list[Form]
    floor: float
    scales: tuple[float, ...]
    stronger: float = 0.0  # Log of its best scale over the estimated one, where it was tuned.
    measured: dict[int, Candidate] = field(default_factory=dict)

    @property
    def lowest(self) -> float:
        """Regret per member that no form goes below; measurements may have been lower."""
        least = min((one.regret for one in self.measured.values()), default=self.floor)
        return min(self.floor, least) / len(self.forms[0].members)


class FormEstimates:
    """Forms of adapters with their regrets, measured or estimated.

    `add` adapters, `measure` those that a choice among `candidates` takes, `tune` the final ones.
    """

    def __init__(self, meter: FormMeter) -> None:
        """Start without adapters.

        Args:
            meter: measures forms.
        """
        self._meter = meter
        self._ladders: list[_Ladder] = []
        self._places: dict[_Key, tuple[_Ladder, int]] = {}

    def add(self, forms: Sequence[Form], share: float, floor: float = 0.0) -> None:
        """Add an adapter, and measure the form nearest to `share` of its 16-bit bytes.

        Args:
            forms: its forms, see `FormMeter.ladders`; without any nothing is added.
            share: where to measure it first.
            floor: regret of the adapter itself, summed over its members.
        """
        if not forms:
            return
        ladder = _Ladder(list(forms), floor, self._meter.scales(forms[0].members))
        self._ladders.append(ladder)
        self._places |= {_key(form): (ladder, k) for k, form in enumerate(forms)}
        first = min(range(len(forms)), key=lambda k: abs(math.log(forms[k].share / share)))
        self._measure(ladder, first)
        if ladder.scales[0] < 1:  # It may be better much weaker, which no estimate knows.
            best = self._tune(ladder, first)
            ladder.stronger = math.log(best.scale) - self._wanted(ladder.forms[first])

    def candidates(self) -> list[Candidate]:
        """Every form, measured ones with their stored form."""
        offset, slope, own = self._fitted()
        found = []
        for ladder, one in zip(self._ladders, own):
            n = len(ladder.forms[0].members)
            for k, form in enumerate(ladder.forms):
                regret = math.exp(offset + one + slope * _odds(form)) + ladder.lowest
                found.append(ladder.measured.get(k) or self._meter.estimate(form, n * regret))
        return found

    def measure(self, chosen: Sequence[Candidate]) -> None:
        """Measure candidates that are estimates, each at its estimated scale."""
        for one in chosen:
            ladder, k = self._places[_key(one)]
            if k not in ladder.measured:
                self._measure(ladder, k)

    def tune(self, chosen: Sequence[Candidate]) -> None:
        """Search the scale of measured candidates."""
        for one in chosen:
            self._tune(*self._places[_key(one)])

    def _measure(self, ladder: _Ladder, k: int) -> None:
        wanted = self._wanted(ladder.forms[k]) + ladder.stronger
        scale = min(ladder.scales, key=lambda scale: abs(math.log(scale) - wanted))
        ladder.measured[k] = self._meter.measure(ladder.forms[k], (scale,), scale)

    def _tune(self, ladder: _Ladder, k: int) -> Candidate:
        known = ladder.measured[k]
        ladder.measured[k] = self._meter.measure(ladder.forms[k], ladder.scales, known.scale, known)
        return ladder.measured[k]

    @staticmethod
    def _wanted(form: Form) -> float:
        """Log of the estimated best scale; scales below 1 are not foreseen."""
        return max(0.0, _SCALE_AT_EVEN + _SCALE_SLOPE * _odds(form))

    def _fitted(self) -> tuple[float, float, np.ndarray]:
        """Offset, slope and every adapter's own factor (log): ridge regression to the priors."""
        rows, logs = [], []
        for i, ladder in enumerate(self._ladders):
            n = len(ladder.forms[0].members)
            for k, one in ladder.measured.items():
                rows.append((i, _odds(ladder.forms[k])))
                logs.append(math.log(max(one.regret / n - ladder.lowest, _LEAST)))
        each = np.eye(len(self._ladders))[[i for i, _ in rows]]
        x = np.column_stack([np.ones(len(rows)), [odds for _, odds in rows], each])
        prior = np.concatenate([[_AT_EVEN, _SLOPE], np.zeros(each.shape[1])])
        spread = np.concatenate([[3.0, _SD_SLOPE], np.full(each.shape[1], _SD_OWN)])
        system = x.T @ x + np.diag((_SD_MEASURED / spread) ** 2)
        found = prior + np.linalg.solve(system, x.T @ (np.array(logs) - x @ prior))
        return float(found[0]), float(found[1]), found[2:]


class FormErrors:
    """Forms of adapters where there are no rows, with the methods of `FormEstimates`.

    All modules count alike there, so the worth that a form lacks is its error of dW but for
    rounding, and nothing has to be fitted.
    """

    def __init__(self, meter: FormMeter) -> None:
        """Start without adapters.

        Args:
            meter: measures errors of forms.
        """
        self._meter = meter
        self._forms: dict[_Key, Form] = {}
        self._candidates: dict[_Key, Candidate] = {}

    def add(self, forms: Sequence[Form], share: float, floor: float = 0.0) -> None:
        """Add an adapter; arguments of `FormEstimates.add`, of which `share` is not needed."""
        for form in forms:
            self._forms[_key(form)] = form
            error = floor + len(form.members) * form.lost
            self._candidates[_key(form)] = self._meter.estimate(form, error)

    def candidates(self) -> list[Candidate]:
        """Every form, measured ones with their stored form."""
        return list(self._candidates.values())

    def measure(self, chosen: Sequence[Candidate]) -> None:
        """Store candidates, and replace their errors by those of what is stored."""
        for one in chosen:
            form = self._forms[_key(one)]
            self._candidates[_key(one)] = self._meter.measure(form, (1.0,), 1.0)

    def tune(self, chosen: Sequence[Candidate]) -> None:
        """Leave every scale at 1, the closest in dW."""


def _key(one: Form | Candidate) -> _Key:
    return one.members, one.family, one.share


def _odds(form: Form) -> float:
    """Log odds of the worth that a form lacks."""
    lost = min(max(form.lost, 1e-4), 1 - 1e-4)
    return math.log(lost / (1 - lost))
