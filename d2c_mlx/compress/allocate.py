"""Bit allocation of one adapter, and the choice of a pack among measured candidates.

A candidate stores one adapter, a task adapter or a merge, in some components at some bits. Its
bytes are exact, and the regret of the tasks it would serve is measured. A pack serves every task
once, by one candidate or by the bare base model: a set partition under a budget.

The choice is an integer program (HiGHS through scipy) instead of a greedy search. It is exact and
mixes clusters with single adapters.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2c_mlx.adapters.gguf_format import GgufAdapter
from d2c_mlx.cluster.partition import Members
from d2c_mlx.compress.affine import Levels
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.file_layout import MAX_COUNT
from d2c_mlx.compress.waiting import WaitingForm
from d2c_mlx.utils.device import give_back_memory
from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.sequences import shared

__all__ = ["LOST", "Candidate", "allocate", "choose", "lost_worth"]

# Share of a component's energy lost at each bit width: squared relative errors measured with
# `quantize.quantize_modules`. Then bytes of a number, with its share of scale and bias.
LOST = {2: 0.239**2, 3: 0.117**2, 4: 0.058**2, 8: 0.004**2, 16: 0.0}
# Share of the summed regret by which a choice may miss the best. The last 0.001 of 24 adapters with
# errors much alike took HiGHS minutes, and no regret is known as well as that.
_GAP = 1e-3
_BYTES = {bits: 2.0 if bits == 16 else bits / 8 + 4 / 64 for bits in LOST}


@dataclass(frozen=True)
class Candidate:
    """One adapter in one stored form.

    Attributes:
        members: numbers of the tasks that it would serve.
        family: "base" (the bare base model), "own" (a task adapter) or "merged".
        share: share of the 16-bit adapter's bytes that its components were allowed.
        levels: module path -> bit allocation, see `affine.Levels`; empty for the base model.
        nbytes: bytes of its rows and of its part of the index.
        regret: normalized regret, summed over the members, on their calibration rows.
        scale: factor of dW.
        stored: the stored form at scale 1, in a file; None for the base model and for an estimate.
        measured: False if the regret is an estimate, see estimates.py.
    """

    members: Members
    family: str
    share: float
    levels: Mapping[str, Levels]
    nbytes: int
    regret: float
    scale: float = 1.0
    stored: WaitingForm | None = None
    measured: bool = True

    def load(self) -> Compressed | GgufAdapter:
        """Read the stored form, at its scale; only where there is one."""
        assert self.stored
        return self.stored.load().scaled(self.scale)


def allocate(
    worth: Mapping[str, np.ndarray],
    widths: Mapping[str, int],
    nbytes: float,
    offered: Sequence[int] = (2, 3, 4, 8),
) -> dict[str, Levels]:
    """Allocate bits to the components of every module, the most worth per byte first.

    Use it for one adapter; `choose` decides between adapters. Each greedy step adds a module's next
    component at the fewest bits, or stores one in more.

    Args:
        worth: module path -> worth of each component, falling, all in one unit; see
            `candidates.worth`. A module without positive worth gets nothing.
        widths: module path -> in + out.
        nbytes: most bytes of all factors.
        offered: bit widths, rising. The loss at 8 bits never shows, so 16 are not worth offering.

    Returns:
        Module path -> bit allocation, `()` for a module that gets nothing; at most `MAX_COUNT`
        components of a module at the same bits.
    """
    steps = []
    for path, values in worth.items():
        for j, value in enumerate(values):
            before, paid = 1.0, 0.0
            for bits in offered:
                gain = float(value) * (before - LOST[bits])
                cost = widths[path] * (_BYTES[bits] - paid)
                if gain > 0:
                    steps.append((-gain / cost, path, j, bits, cost))
                before, paid = LOST[bits], _BYTES[bits]
    below = dict(zip(offered, (1, *offered)))
    given: dict[str, dict[int, int]] = {path: {} for path in worth}
    counts: Counter[tuple[str, int]] = Counter()
    free, before = nbytes, np.inf
    steps.sort()
    # One pass is enough, unless a component had to wait until others at its bits moved up.
    while free < before:
        before = free
        for _, path, j, bits, cost in steps:
            # Only the next bits of a component, and a component only after all larger ones.
            ready = given[path].get(j, 1) == below[bits]
            ready &= j == 0 or given[path].get(j - 1, 0) >= bits
            if ready and cost <= free and counts[path, bits] < MAX_COUNT:
                given[path][j] = bits
                counts[path, bits] += 1
                counts[path, below[bits]] -= 1
                free -= cost
    return {path: _levels(list(one.values())) for path, one in given.items()}


def lost_worth(worth: Mapping[str, np.ndarray], levels: Mapping[str, Levels]) -> float:
    """The share of the worth that a bit allocation does not store, between 0 and 1.

    Args:
        worth: module path -> worth of each component, falling, as for `allocate`.
        levels: module path -> bit allocation; modules that are missing are dropped.
    """
    kept = 0.0
    for path, some in levels.items():
        stored = np.repeat([1 - LOST[bits] for _, bits in some], [n for n, _ in some])
        kept += float(worth[path][: len(stored)] @ stored)
    total = sum(float(values.sum()) for values in worth.values())
    return max(0.0, 1 - kept / total) if total else 0.0


def _levels(bits: Sequence[int]) -> Levels:
    return shared(tuple((bits.count(b), b) for b in sorted(set(bits), reverse=True)))


def choose(candidates: Sequence[Candidate], n_tasks: int, nbytes: float) -> list[int]:
    """Choose the candidates that serve every task exactly once with the least summed regret.

    Args:
        candidates: those of the family "base" take no bytes.
        n_tasks: number of tasks, which are numbered from 0.
        nbytes: most bytes of all chosen candidates.

    Returns:
        Indices into `candidates`, rising.

    Raises:
        BudgetError: no choice serves every task within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    serves = np.zeros((n_tasks, len(candidates)))
    for j, one in enumerate(candidates):
        serves[list(one.members), j] = 1
    sizes = np.array([one.nbytes for one in candidates], float)
    constraints = [
        LinearConstraint(serves, 1, 1),
        LinearConstraint(sizes / max(nbytes, 1), -np.inf, 1),
    ]
    regrets = np.array([one.regret for one in candidates])
    with _silent_stdout():
        found = milp(
            regrets, integrality=np.ones(len(candidates)), bounds=Bounds(0, 1),
            constraints=constraints, options={"mip_rel_gap": _GAP},
        )  # fmt: skip
    give_back_memory()  # A search tree may take 20 MB, and a plan asks for dozens.
    if found.x is None:
        raise BudgetError(f"budget: no choice of {len(candidates)} candidates fits {nbytes:,.0f} B")
    return np.flatnonzero(found.x > 0.5).tolist()


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what C code prints inside the block.

    HiGHS prints a debugging line at times, which would spoil the output of `--json`
    (https://github.com/ERGO-Code/HiGHS/issues/2783).
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:
        # Stdout is closed, so nothing can spoil it.
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        # C buffers lines that go into a pipe.
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
