"""Stored forms of adapters at several sizes, their regrets, and the choice among them.

A candidate stores one adapter, a task adapter or a merge, in some components at some bits. Its
bytes are exact, and the regret of the tasks that it would serve is estimated, or measured where it
is chosen. A pack serves every task once, by one candidate or by the bare base model.

Dropping components leaves the rest too weak: the less is kept, the more a scale above 1 gains
(0.75 % of the bytes of gec-en: regret 0.122 at scale 1, 0.057 at 1.7). A scale costs no byte.
"""

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.gguf_format import GgufAdapter
from d2c_mlx.cluster.partition import Members
from d2c_mlx.compress.compressed import Compressed, Levels
from d2c_mlx.compress.gguf_form import GgufStorage
from d2c_mlx.compress.quantize import Components, svd_components
from d2c_mlx.compress.storage import Capacity, CompactStorage, lost_worth, worth
from d2c_mlx.evaluate.workers import ByteCache
from d2c_mlx.merge.library import Library
from d2c_mlx.utils.device import give_back_memory
from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.line_search import FINE_SCALES, line_search

# Share of the summed regret by which a choice may miss the best. The last 0.001 of 24 adapters with
# errors much alike took HiGHS minutes, and no regret is known as well as that.
_GAP = 1e-3
# Sizes to try: from four times smaller to four times larger than the equal share of the budget that
# an adapter's tasks have. The grid is fixed, so that plans for several budgets measure the same
# forms. A step is a power of two with this exponent. Merges have a coarser grid: measuring one runs
# the calibration rows of all its tasks, and merges matter only where bytes are scarce.
_SPAN, _STEPS = 4, {"own": 0.5, "merged": 1.0}
# Scales where the rows' own answers are not trusted.
_FROM_ONE = FINE_SCALES[FINE_SCALES.index(1.0) :]
# The worth that a form lacks tells its regret up to a factor of its adapter's own: on 24 real
# adapters at nine sizes log regret = _AT_EVEN + _SLOPE * log odds of the lost worth, off by a
# factor of 1.5 once that adapter's factor is known. Then the standard deviations of the slope, of
# an adapter's own factor, and of a measurement.
_AT_EVEN, _SLOPE = -3.5, 1.25
_SD_SLOPE, _SD_OWN, _SD_MEASURED = 0.3, 1.2, 0.35
# The best scale, fitted on the same adapters: log scale = _SCALE_AT_EVEN + _SCALE_SLOPE * log odds.
_SCALE_AT_EVEN, _SCALE_SLOPE = 0.46, 0.14
# Regrets below this differ by rounding and luck.
_LEAST = 2e-4
# Scales are not searched for the best forms, which hold this share of the regret together.
_LIGHT = 0.2


@dataclass(frozen=True)
class Candidate:
    """A stored form of one adapter, or the bare base model, for the tasks that it would serve.

    Attributes:
        members: numbers of the tasks.
        nbytes: bytes of its rows and of its part of the index.
        regret: normalised regret, summed over the members, on their calibration rows.
        measured: False if the regret is an estimate.
        adapter: the adapter before it is quantized; None for the base model, as the following.
        levels: module path -> bit allocation, see `compressed.Levels`.
        share: share of the adapter's 16-bit bytes that its components were allowed.
        lost: share of the adapter's worth that is not stored, between 0 and 1.
        scale: factor of dW.
    """

    members: Members
    nbytes: int
    regret: float
    measured: bool = True
    adapter: Adapter | None = None
    levels: Mapping[str, Levels] = field(default_factory=dict)
    share: float = 0.0
    lost: float = 1.0
    scale: float = 1.0

    @property
    def family(self) -> str:
        """Kind: "base" (the bare base model), "own" (a task adapter) or "merged"."""
        if self.adapter is None:
            return "base"
        return "own" if len(self.members) == 1 else "merged"

    @property
    def odds(self) -> float:
        """Log odds of the worth that it lacks."""
        return _log_odds(self.lost)

    @property
    def log_scale(self) -> float:
        """Log of the estimated best scale; scales below 1 are not foreseen."""
        return max(0.0, _SCALE_AT_EVEN + _SCALE_SLOPE * self.odds)


def _log_odds(share: float) -> float:
    bounded = min(max(share, 1e-4), 1 - 1e-4)
    return math.log(bounded / (1 - bounded))


def regret_of(lost: float) -> float:
    """The regret that a form is expected to have which lacks this share of its adapter's worth."""
    return math.exp(_AT_EVEN + _SLOPE * _log_odds(lost))


def choose(
    candidates: Sequence[Candidate],
    n_tasks: int,
    nbytes: float,
    storage: CompactStorage | GgufStorage | None = None,
) -> list[int]:
    """Choose the candidates that serve every task exactly once with the least summed regret.

    It is an integer program (HiGHS through scipy): exact, and clusters mix with single adapters.

    Args:
        candidates: those of the base model take no bytes.
        n_tasks: number of tasks, which are numbered from 0.
        nbytes: most bytes of all chosen candidates, without the header.
        storage: the form of the files, which then fit with their headers; None adds candidates up.

    Returns:
        Indices into `candidates`, rising.

    Raises:
        BudgetError: no choice serves every task within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    serves = [[i in candidate.members for candidate in candidates] for i in range(n_tasks)]
    sizes = np.array([candidate.nbytes for candidate in candidates], float)
    regrets = np.array([candidate.regret for candidate in candidates])
    free, gap = nbytes, {"mip_rel_gap": _GAP}
    while True:
        rows = np.array([*serves, sizes / max(free, 1)], float)
        limits = LinearConstraint(rows, [1] * n_tasks + [-np.inf], 1)
        with _silent_stdout():
            solution = milp(
                regrets, integrality=1, bounds=Bounds(0, 1), constraints=limits, options=gap
            )
        give_back_memory()  # A search tree may take 20 MB, and a plan asks for dozens.
        if solution.x is None:
            raise BudgetError(
                f"budget: no choice of {len(candidates)} candidates fits {free:,.0f} B"
            )
        chosen = np.flatnonzero(solution.x > 0.5).tolist()
        forms = [candidates[j] for j in chosen if candidates[j].measured]
        files = [(form.adapter, form.levels) for form in forms if form.adapter]
        over = storage.total(files) - nbytes - storage.header_nbytes if storage else 0
        if over <= 0:
            return chosen
        free -= over


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    # HiGHS prints a debugging line at times, which would stand among the results of `--json`
    # (https://github.com/ERGO-Code/HiGHS/issues/2783).
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stdout = os.dup(1)
            stack.callback(os.close, stdout)
            stack.callback(os.dup2, stdout, 1)
            # C buffers lines that go into a pipe.
            stack.callback(libc.fflush, None)
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
        yield


@dataclass
class _Ladder:
    """One adapter's forms, with the regret that it has before it is compressed."""

    forms: list[Candidate]
    floor: float
    scales: tuple[float, ...]
    stronger: float = 0.0  # Log of its best scale over the estimated one, where it was tuned.
    measured: dict[int, Candidate] = field(default_factory=dict)

    @property
    def lowest(self) -> float:
        """Regret per member that no form goes below; measurements may have been lower."""
        least = min((form.regret for form in self.measured.values()), default=self.floor)
        return min(self.floor, least) / len(self.forms[0].members)


class Forms:
    """Stored forms of adapters at several sizes, with their regrets, measured or estimated.

    `add` adapters, `settle` on a choice, `tune` its scales. Regrets are measured on teacher targets
    (`Library.by_teacher`): judged by the answers of ten calibration rows alone, a small form may
    look better than the adapter itself. Without rows all modules count alike, so the worth that a
    form lacks is its error of dW but for rounding, and nothing has to be fitted.
    """

    def __init__(self, library: Library, capacity: Capacity, room: float) -> None:
        """Start with the base model alone, which is estimated to have a regret of 1.

        Args:
            library: the measured library.
            capacity: sizes of its adapters.
            room: bytes for rows.
        """
        self._library, self._taught, self._room = library, library.by_teacher, room
        self._capacity, self._storage, self._ladders = capacity, capacity.storage, list[_Ladder]()
        self._bare = [Candidate((i,), 0, 1.0, measured=False) for i in range(len(library.names))]
        # Components are float32, so twice as large as their adapters.
        most = library.scorer.engine.free // 8
        self._parts: ByteCache[dict[str, Components]] = ByteCache(most)
        self._stored: ByteCache[Compressed | GgufAdapter] = ByteCache(most)

    def add(self, members: Members, adapter: Adapter, floor: float = 0.0) -> None:
        """Add an adapter's forms, and measure the one that is nearest to its share of the budget.

        Args:
            members: the tasks that it serves.
            adapter: a task adapter or a merge.
            floor: regret of the adapter itself, summed over its members.
        """
        forms, fair = self.ladder(members, adapter)
        if not forms:
            return
        # Scales below 1 are tried only where the rows' own answers are trusted.
        by_rows = bool(self._library.tasks)
        trusted = by_rows and any(self._taught.trust[i] for i in members)
        # The closest in dW has a scale of 1.
        scales = FINE_SCALES if trusted else _FROM_ONE if by_rows else (1.0,)
        ladder = _Ladder(forms, floor, scales)
        self._ladders.append(ladder)
        first = min(range(len(forms)), key=lambda k: abs(math.log(forms[k].share / fair)))
        if by_rows:
            self._measure(ladder, first)
        if trusted:  # It may be better much weaker, which no estimate knows.
            form = ladder.measured[first]
            ladder.measured[first] = tuned = self.measure(form, ladder.scales, form.scale)
            ladder.stronger = math.log(tuned.scale) - tuned.log_scale

    def ladder(self, members: Members, adapter: Adapter) -> tuple[list[Candidate], float]:
        """An adapter's forms at several sizes, the largest first, and its fair share of 16 bits.

        The fair share is its tasks' equal part of the budget; a merge has those of all its members.
        Nothing is measured, and regrets are left at the lost worth.
        """
        sizes, storage = self._capacity.sizes, self._storage
        family = "merged" if len(members) > 1 else "own"
        nbytes, step = self._capacity.nbytes(adapter), _STEPS[family]
        fair = self._room * (sum(sizes[i] for i in members) / sum(sizes)) / nbytes
        ends = math.log2(fair / _SPAN), math.log2(min(fair * _SPAN, storage.most[family]))
        first, last = (round(end / step) for end in ends)
        values = worth(self._components(adapter), [self._library.module_gains[i] for i in members])
        forms: dict[str, Candidate] = {}
        for power in range(last, min(first, last) - 1, -1):
            share = 2 ** (power * step)
            levels = storage.allocate(values, share * nbytes)
            if levels and repr(levels) not in forms:
                size, lost = storage.nbytes(adapter.name, levels), lost_worth(values, levels)
                forms[repr(levels)] = Candidate(
                    members, size, lost, False, adapter, levels, share, lost
                )
        return list(forms.values()), fair

    def candidates(self) -> list[Candidate]:
        """The base model for every task, then every form, measured or estimated."""
        candidates, by_rows = list(self._bare), bool(self._library.tasks)
        offset, slope, *factors = self._fitted() if by_rows else (0.0, 0.0)
        for i, ladder in enumerate(self._ladders):
            n = len(ladder.forms[0].members)
            for k, form in enumerate(ladder.forms):
                regret = ladder.floor + n * form.lost
                if by_rows:
                    excess = math.exp(offset + factors[i] + slope * form.odds)
                    regret = n * (excess + ladder.lowest)
                candidates.append(ladder.measured.get(k) or replace(form, regret=regret))
        return candidates

    def settle(self) -> list[Candidate]:
        """Choose by the estimates and measure the choice, until nothing of it is estimated."""
        places = [(ladder, k) for ladder in self._ladders for k in range(len(ladder.forms))]
        n = len(self._bare)
        while True:
            candidates = self.candidates()
            chosen = choose(candidates, n, self._room, self._storage)
            missing = [j for j in chosen if not candidates[j].measured]
            if not missing:
                return [candidates[j] for j in chosen]
            tasks = [j for j in missing if j < n]
            for i, regret in zip(tasks, self._taught.regrets(None, tasks) if tasks else ()):
                self._bare[i] = Candidate((i,), 0, float(regret))
            for j in missing[len(tasks) :]:
                self._measure(*places[j - n])

    def tune(self, chosen: Sequence[Candidate]) -> list[Candidate]:
        """Search the scales of the chosen forms that hold nearly all of the regret; settle again.

        A scale gains a share of a form's regret, so that of the others would not show.
        """
        stored = sorted((form for form in chosen if form.adapter), key=lambda form: -form.regret)
        regrets = np.maximum([form.regret for form in stored], 0.0)
        before = np.cumsum(regrets) - regrets
        heavy = stored[: np.count_nonzero(before < (1 - _LIGHT) * regrets.sum())]
        for ladder in self._ladders:
            for k, form in list(ladder.measured.items()):
                if any(form is other for other in heavy):
                    ladder.measured[k] = self.measure(form, ladder.scales, form.scale)
        return self.settle()

    def measure(
        self, form: Candidate, scales: Sequence[float] = _FROM_ONE, start: float = 1.0
    ) -> Candidate:
        """Measure one form at its best scale; if it was measured, from that scale on.

        Args:
            form: a form of an adapter.
            scales: scales to try, rising.
            start: one of `scales`, from which a line search goes.
        """
        small = self.load(replace(form, scale=1.0))

        def regret(scale: float) -> float:
            if form.measured and scale == form.scale:
                return form.regret
            plain = small.scaled(scale).adapter(self._library.base.dtype)
            return float(self._taught.regrets(plain, form.members).sum())

        scale, lowest = line_search(regret, scales, start)
        give_back_memory()
        return replace(form, regret=lowest, scale=scale, measured=True)

    def load(self, form: Candidate) -> Compressed | GgufAdapter:
        """A form as it is stored, at its scale; made again if memory had no room to keep it."""
        assert form.adapter
        key = form.adapter.digest, repr(form.levels)
        small = self._stored.get(key)
        if small is None:
            parts = self._components(form.adapter)
            small = self._storage.store(form.adapter, form.levels, parts)
            self._stored.put(key, small, form.nbytes)
        return small.scaled(form.scale)

    def _measure(self, ladder: _Ladder, k: int) -> None:
        """Measure a form at its estimated scale."""
        log_scale = ladder.forms[k].log_scale + ladder.stronger
        scale = min(ladder.scales, key=lambda scale: abs(math.log(scale) - log_scale))
        ladder.measured[k] = self.measure(ladder.forms[k], (scale,), scale)

    def _components(self, adapter: Adapter) -> dict[str, Components]:
        """`svd_components`, computed again if memory had no room to keep them."""
        parts = self._parts.get(adapter.digest)
        if parts is None:
            parts = svd_components(adapter)
            nbytes = sum(a.nbytes + b.nbytes for a, b in parts.values())
            self._parts.put(adapter.digest, parts, nbytes)
        return parts

    def _fitted(self) -> list[float]:
        """Offset, slope and every adapter's own factor (log): ridge regression to the priors."""
        rows, logs = [], []
        for i, ladder in enumerate(self._ladders):
            n = len(ladder.forms[0].members)
            for form in ladder.measured.values():
                rows.append((i, form.odds))
                logs.append(math.log(max(form.regret / n - ladder.lowest, _LEAST)))
        each = np.eye(len(self._ladders))[[i for i, _ in rows]]
        x = np.column_stack([np.ones(len(rows)), [odds for _, odds in rows], each])
        prior = np.concatenate([[_AT_EVEN, _SLOPE], np.zeros(each.shape[1])])
        spread = np.concatenate([[3.0, _SD_SLOPE], np.full(each.shape[1], _SD_OWN)])
        system = x.T @ x + np.diag((_SD_MEASURED / spread) ** 2)
        return (prior + np.linalg.solve(system, x.T @ (np.array(logs) - x @ prior))).tolist()
