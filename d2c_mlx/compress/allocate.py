"""The best pack for a budget, over clusters x rank x bits: measured candidates, exact choice.

A candidate stores one adapter, a task's own or a merge, in some components at some bits; it has
exact bytes and the measured regret of the tasks that it would serve. A pack serves every task once,
by one candidate or by the bare base model: a set partition under a budget, which is a small integer
program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2c_mlx.cluster.partition import Members
from d2c_mlx.compress.affine import Levels
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.file_layout import MAX_COUNT
from d2c_mlx.utils.errors import BudgetError

__all__ = ["Candidate", "allocate", "choose"]

# Share of a component's energy that is lost at each bits: squared errors of `quantize_modules`.
# Bytes of a number with its share of scale and bias.
_LOST = {2: 0.239**2, 3: 0.117**2, 4: 0.058**2, 8: 0.004**2, 16: 0.0}
_BYTES = {bits: 2.0 if bits == 16 else bits / 8 + 4 / 64 for bits in _LOST}


@dataclass(frozen=True)
class Candidate:
    """One adapter in one stored form.

    Attributes:
        members: the tasks that it would serve.
        family: "base", "own" or "merged".
        share: of the bytes of the 16-bit adapter that were allowed to its components.
        levels: module path -> levels, see `quantize.compress`; empty is the base model.
        nbytes: of its rows and its part of the index.
        regret: summed over the members, measured on their probes.
        scale: of dW.
        stored: the form itself at scale 1, which a pack writes; None is the base model.
    """

    members: Members
    family: str
    share: float
    levels: Mapping[str, Levels]
    nbytes: int
    regret: float
    scale: float = 1.0
    stored: Compressed | None = None


def allocate(
    worth: Mapping[str, np.ndarray],
    widths: Mapping[str, int],
    nbytes: float,
    offered: Sequence[int] = (2, 3, 4, 8),
) -> dict[str, Levels]:
    """How many components of every module at how many bits: the most worth per byte first.

    A step adds a module's next component at the fewest bits or stores one in more.

    Args:
        worth: module path -> what each component is worth, falling, in any one unit; rounding
            loses a share of it. Modules that are worth nothing, or less, get nothing.
        widths: module path -> in + out.
        nbytes: most bytes of all factors.
        offered: bits, rising. What 8 bits lose never shows, so 16 are not worth offering.

    Returns:
        Module path -> levels, `()` for a module that gets nothing; at most `MAX_COUNT` components
        of a module at the same bits.
    """
    steps = []
    for path, values in worth.items():
        for j, value in enumerate(values):
            before, paid = 1.0, 0.0
            for bits in offered:
                gain = float(value) * (before - _LOST[bits])
                cost = widths[path] * (_BYTES[bits] - paid)
                if gain > 0:
                    steps.append((-gain / cost, path, j, bits, cost))
                before, paid = _LOST[bits], _BYTES[bits]
    below = dict(zip(offered, (1, *offered)))
    given: dict[str, dict[int, int]] = {path: {} for path in worth}
    counts: Counter[tuple[str, int]] = Counter()
    free, before = nbytes, np.inf
    steps.sort()
    # Once, but where components had to wait until others of the same bits got more.
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


def _levels(bits: Sequence[int]) -> Levels:
    return tuple((bits.count(b), b) for b in sorted(set(bits), reverse=True))


def choose(
    candidates: Sequence[Candidate],
    n_tasks: int,
    nbytes: float,
    max_adapters: int | None = None,
) -> list[int]:
    """Indices of the candidates that serve every task exactly once with the least summed regret.

    Args:
        candidates: those of the family "base" take no bytes and are no adapters.
        n_tasks: tasks are numbered from 0.
        nbytes: most bytes of all chosen.
        max_adapters: most of them that are not "base"; None is any number.

    Raises:
        BudgetError: no choice serves every task.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    serves = np.zeros((n_tasks, len(candidates)))
    for j, one in enumerate(candidates):
        serves[list(one.members), j] = 1
    sizes = np.array([one.nbytes for one in candidates], float)
    stored = np.array([one.family != "base" for one in candidates], float)
    constraints = [
        LinearConstraint(serves, 1, 1),
        LinearConstraint(sizes / max(nbytes, 1), -np.inf, 1),
        LinearConstraint(stored, -np.inf, n_tasks if max_adapters is None else max_adapters),
    ]
    regrets = np.array([one.regret for one in candidates])
    with _silent_stdout():
        found = milp(
            regrets, integrality=np.ones(len(candidates)), bounds=Bounds(0, 1),
            constraints=constraints,
        )  # fmt: skip
    if found.x is None:
        raise BudgetError(f"budget: no choice of {len(candidates)} candidates fits {nbytes:,.0f} B")
    return np.flatnonzero(found.x > 0.5).tolist()


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what C code prints meanwhile.

    HiGHS prints a line of debugging at times, which would stand in what `--json` prints
    (https://github.com/ERGO-Code/HiGHS/issues/2783).
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:
        # Who closed stdout reads nothing from it.
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        # Into a pipe, C keeps lines back.
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
