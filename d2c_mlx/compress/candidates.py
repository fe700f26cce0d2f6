"""Candidates of a plan, and the choice among them.

A candidate stores one adapter, a task adapter or a merge, in some components at some bits. Its
bytes are exact, and the regret of the tasks that it would serve is measured or estimated. A pack
serves every task once, by one candidate or by the bare base model: a set partition under a budget.

The choice is an integer program (HiGHS through scipy) instead of a greedy search. It is exact and
mixes clusters with single adapters.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.cluster.partition import Members
from d2c_mlx.compress.compressed import Levels
from d2c_mlx.compress.gguf_form import GgufStorage
from d2c_mlx.compress.storage import CompactStorage
from d2c_mlx.utils.device import give_back_memory
from d2c_mlx.utils.errors import BudgetError

__all__ = ["Candidate", "choose", "fitting"]

# Share of the summed regret by which a choice may miss the best. The last 0.001 of 24 adapters with
# errors much alike took HiGHS minutes, and no regret is known as well as that.
_GAP = 1e-3


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


def choose(candidates: Sequence[Candidate], n_tasks: int, nbytes: float) -> list[int]:
    """Choose the candidates that serve every task exactly once with the least summed regret.

    Args:
        candidates: those of the base model take no bytes.
        n_tasks: number of tasks, which are numbered from 0.
        nbytes: most bytes of all chosen candidates.

    Returns:
        Indices into `candidates`, rising.

    Raises:
        BudgetError: no choice serves every task within the budget.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    serves = np.zeros((n_tasks, len(candidates)))
    for j, candidate in enumerate(candidates):
        serves[list(candidate.members), j] = 1
    sizes = np.array([candidate.nbytes for candidate in candidates], float)
    constraints = [
        LinearConstraint(serves, 1, 1),
        LinearConstraint(sizes / max(nbytes, 1), -np.inf, 1),
    ]
    regrets = np.array([candidate.regret for candidate in candidates])
    with _silent_stdout():
        solution = milp(
            regrets, integrality=np.ones(len(candidates)), bounds=Bounds(0, 1),
            constraints=constraints, options={"mip_rel_gap": _GAP},
        )  # fmt: skip
    give_back_memory()  # A search tree may take 20 MB, and a plan asks for dozens.
    if solution.x is None:
        raise BudgetError(f"budget: no choice of {len(candidates)} candidates fits {nbytes:,.0f} B")
    return np.flatnonzero(solution.x > 0.5).tolist()


def fitting(
    candidates: Sequence[Candidate],
    n_tasks: int,
    storage: CompactStorage | GgufStorage,
    room: float,
) -> list[int]:
    """Choose the candidates with the least regret whose files, with headers, fit.

    Args:
        candidates: for tasks 0 to `n_tasks` - 1.
        n_tasks: number of tasks.
        storage: the form of the files.
        room: bytes for rows, without the header.

    Returns:
        Indices into `candidates`, rising.

    Raises:
        BudgetError: no choice serves every task.
    """
    free = room
    while True:
        chosen = choose(candidates, n_tasks, free)
        forms = [candidates[j] for j in chosen if candidates[j].measured]
        files = [(form.adapter, form.levels) for form in forms if form.adapter]
        over = storage.total(files) - room - storage.header_nbytes
        if over <= 0:
            return chosen
        free -= over


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what C code prints inside the block, unless stdout is closed.

    HiGHS prints a debugging line at times, which would stand among the results
    (https://github.com/ERGO-Code/HiGHS/issues/2783).
    """
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
