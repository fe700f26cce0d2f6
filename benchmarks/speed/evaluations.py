"""Evaluations that a full D2C asks for, and those that are done.

An evaluation is one adapter (or merge) on the probe examples of one task. Asked for is what the
loop asks when it remembers nothing: in every round of every start each cluster's line search (at
each step the best scale so far and its neighbours, on the members' tasks) and each cluster's merge
on all tasks.
Seconds include merging; the cache is cold, rows are tokenized and adapters loaded before.
"""

import dataclasses
import os
import tempfile
import time
from pathlib import Path

from d2c_mlx.cluster.partition import d2c
from d2c_mlx.merge import merging
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.line_search import line_search


def forgetful(asked, grid):
    """The questions of a `line_search` from the middle that forgets what it knows.

    Args:
        asked: scale -> value, of all that the walk evaluated.
        grid: the scales.
    """
    best, n = len(grid) // 2, 0
    while True:
        around = [i for i in (best - 1, best, best + 1) if 0 <= i < len(grid)]
        n += len(around)
        winner = min(around, key=lambda i: (asked[grid[i]], i))
        if winner == best:
            return n
        best = winner


class Counted:
    """A problem that counts what the loop asks, as if it remembered nothing.

    Attributes:
        asked: evaluations so far.
        searches: members -> evaluations of the line search of their merge.
        problem: what the loop is given.
    """

    def __init__(self, problem):
        """Count from nothing."""
        self._problem, self._last = problem, 0
        self.asked, self.searches = 0, {}
        self.problem = dataclasses.replace(problem, merge=self._merge, measure=self._measure)

    def line_search(self, loss, scales, start=None):
        """Stand in for the search of the merger."""
        values = {}

        def once(scale):
            values[scale] = loss(scale)
            return values[scale]

        found = line_search(once, scales, start)  # None: RegMean begins in the middle
        self._last = forgetful(values, scales)
        return found

    def _merge(self, members, like=()):
        if members not in self.searches:
            self._last = 0
            self._problem.merge(members)
            self.searches[members] = self._last * len(members)
        self.asked += self.searches[members]
        return self._problem.merge(members)

    def _measure(self, jobs):
        self.asked += sum(len(tasks) for _, tasks in jobs)
        return self._problem.measure(jobs)


def measure(library, n_clusters, restarts, n_examples):
    """D2C on every adapter of a library from a cold cache."""
    cache = os.environ.get("D2C_MLX_CACHE")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["D2C_MLX_CACHE"] = directory
        config = RunConfig(
            adapters=str(library / "adapters"), tasks=str(library / "tasks"),
            output=str(Path(directory) / "run"), budget=str(n_clusters),
            probe_examples=n_examples, test_examples=1,
        )  # fmt: skip
        session = run(config, until="probe", quiet=True)
        before = session.library.scorer.counts.copy()
        counted = Counted(merging.problem_of(session.library, config.merging))
        merging.line_search = counted.line_search
        try:
            started = time.perf_counter()
            starts = [d2c(counted.problem, n_clusters)]
            starts += [d2c(counted.problem, n_clusters, init=("adapters",), seed=seed)
                       for seed in range(1, restarts)]  # fmt: skip
            seconds = time.perf_counter() - started
        finally:
            merging.line_search = line_search
            os.environ.pop("D2C_MLX_CACHE")
            if cache is not None:
                os.environ["D2C_MLX_CACHE"] = cache
    counts = session.library.scorer.counts - before
    return {
        "d2c_adapters": counted.problem.n, "d2c_clusters": n_clusters, "d2c_restarts": restarts,
        "d2c_examples": n_examples, 
        "d2c_starts": [[one.init, one.regret, one.stopped] for one in starts],
        "d2c_merges": len(counted.searches),
        "evaluations_asked": counted.asked, "evaluations_done": round(counts["done"], 1),
        "evaluations_ratio": counted.asked / counts["done"], "d2c_seconds": seconds,
    }  # fmt: skip
