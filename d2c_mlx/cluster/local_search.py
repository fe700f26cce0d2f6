"""Single moves and swaps, each judged by the merges that it changes.

The paper's loop compares a task's own cluster, which contains its adapter, with clusters that do
not. So from a partition nothing moves (self-inclusion). Here a move of task i from A to B is judged
by both clusters: the regrets under merge(A without i) and merge(B with i) against those under
merge(A) and merge(B).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from d2c_mlx.cluster.partition import Members, Problem, canonical, groups_of

__all__ = ["Costs", "improve", "predicted_partition"]

Groups = list[Members]


class Costs:
    """The cost of merging some adapters: the summed regret of their tasks, each measured once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[Members, float] = {}
        self._harm = problem.harm

    def __call__(self, members: Members) -> float:
        """The cost measured on the merge with its scale tuned; 0 for a single adapter."""
        if len(members) == 1:
            return 0.0
        if members not in self._known:
            self._known[members] = self._measured(members)
        return self._known[members]

    def tried(self, members: Members, like: Members) -> float:
        """The cost measured at another merge's scale, in a third of the evaluations.

        Args:
            members: indices of the adapters to merge.
            like: a measured cluster, whose scale is used.
        """
        if len(members) == 1 or len(like) == 1 or members in self._known:
            return self(members)
        return self._measured(members, like)

    def _measured(self, members: Members, like: Members = ()) -> float:
        tasks = list(members)
        (regrets,) = self.problem.measure([(self.problem.merge(members, like), tasks)])
        return float(regrets.sum())

    def objective(self, labels: Sequence[int] | np.ndarray) -> float:
        """Mean regret of all tasks under a partition."""
        return sum(self(group) for group in groups_of(labels)) / self.problem.n

    def predicted(self, members: Members) -> float:
        """The cost predicted from single adapters: a merge serves a task as its members average."""
        return float(self._harm[np.ix_(members, members)].sum()) / len(members)

    def expected(self, members: Members, like: Members) -> float:
        """The predicted cost, corrected by the error of a similar prediction.

        Args:
            members: indices of the adapters to merge.
            like: a measured cluster; its ratio of measured to predicted cost is the factor.
        """
        if members in self._known or len(members) == 1:
            return self(members)
        known, prediction = self(like), self.predicted(like)
        ratio = known / prediction if prediction > 1e-6 and known > 0 else 1.0
        return ratio * self.predicted(members)


def _labels(groups: Groups, n: int) -> tuple[int, ...]:
    labels = np.empty(n, int)
    for k, members in enumerate(groups):
        labels[list(members)] = k
    return canonical(labels)


def _neighbours(groups: Groups) -> Iterator[tuple[int, int, Members, Members]]:
    """Yield every move and swap as (a, b, a's new members, b's new members).

    Each gives another partition, and none empties a cluster.
    """
    for a, from_a in enumerate(groups):
        for b, from_b in enumerate(groups):
            for i in from_a:
                rest, more = _without(from_a, i), _with(from_b, i)
                if a != b and rest:
                    yield a, b, rest, more
                # A swap of two single adapters changes nothing.
                if a < b and (rest or len(from_b) > 1):
                    for j in from_b:
                        yield a, b, _with(rest, j), _without(more, j)


def _with(members: Members, i: int) -> Members:
    return tuple(sorted((*members, i)))


def _without(members: Members, i: int) -> Members:
    return tuple(j for j in members if j != i)


def predicted_partition(problem: Problem, n_clusters: int) -> tuple[int, ...]:
    """Find the partition that is best by the predictions from single adapters.

    It measures nothing. The two clusters whose union raises the cost least become one until
    `n_clusters` are left. Then the best move or swap is taken while one helps.

    Args:
        problem: only its regrets are read.
        n_clusters: K, at most N.

    Returns:
        The cluster of every adapter, numbered by first appearance.
    """
    harm = problem.harm
    member = np.eye(len(harm))  # (clusters, n)
    while len(member) > n_clusters:
        size, mutual = member.sum(axis=1), member @ harm @ member.T
        total = np.diag(mutual)
        cost = total / size
        union = (mutual + mutual.T + total[:, None] + total) / (size[:, None] + size)
        rise = union - cost[:, None] - cost
        # Ties go to the first pair, by its later cluster.
        rise[np.triu_indices(len(rise))] = np.inf
        b, a = np.unravel_index(np.argmin(rise), rise.shape)
        member[a] += member[b]
        member = np.delete(member, b, axis=0)
    labels = member.argmax(axis=0)
    while step := _best_step(harm, labels, n_clusters):
        for i, k in step:
            labels[i] = k
    return canonical(labels)


def _best_step(
    harm: np.ndarray, labels: np.ndarray, n_clusters: int
) -> list[tuple[int, int]] | None:
    """Find the move or swap that lowers the predicted cost most.

    Args:
        harm: `(n, n)` bounded regrets, zeros on the diagonal.
        labels: `(n,)` cluster of every task.
        n_clusters: number of clusters, none of them empty.

    Returns:
        Pairs of a task and its new cluster: one for a move, two for a swap; None if no step helps.
    """
    tasks, member = np.arange(len(harm)), np.eye(n_clusters)[labels]  # (n, clusters)
    both = harm + harm.T
    mutual = both @ member  # (n, clusters), harm between task i and the members of k
    size, total = member.sum(axis=0), (mutual * member).sum(axis=0) / 2
    cost, own = total / size, size[labels]
    rest = total[labels] - mutual[tasks, labels]  # total harm in i's cluster without i
    left = np.where(own > 1, rest / np.maximum(own - 1, 1), np.inf)  # no cluster becomes empty
    moves = left[:, None] + (total + mutual) / (size + 1) - cost[labels][:, None] - cost
    moves[tasks, labels] = np.inf
    # `(n, n)`, the cost of i's cluster when j has replaced i.
    swapped = (rest[:, None] + mutual.T[labels] - both) / own[:, None]
    swaps = swapped + swapped.T - cost[labels][:, None] - cost[labels]
    swaps[labels[:, None] == labels] = np.inf
    i, k = np.unravel_index(np.argmin(moves), moves.shape)
    a, b = np.unravel_index(np.argmin(swaps), swaps.shape)
    if min(moves[i, k], swaps[a, b]) > -1e-9:
        return None
    if moves[i, k] <= swaps[a, b]:
        return [(int(i), int(k))]
    return [(int(a), int(labels[b])), (int(b), int(labels[a]))]


def improve(
    costs: Costs, labels: Sequence[int], eps: float, patience: int
) -> tuple[list[dict[str, Any]], str]:
    """Take moves and swaps, the most promising first, while they lower the measured objective.

    Args:
        costs: measured and expected costs of clusters.
        labels: the partition to start from.
        eps: a step must lower the summed regret by more than this.
        patience: stop after this many steps in a row that did not.

    Returns:
        The history (objective and labels at the start and after every step taken), and why the
        search ended: "patience" or "converged".
    """
    n, groups, failed = costs.problem.n, groups_of(labels), 0
    history = [{"objective": costs.objective(labels), "labels": list(_labels(groups, n))}]
    tried: set[frozenset[Members]] = set()
    while True:
        steps = _promising(costs, groups)
        for place, (a, b, new_a, new_b) in enumerate(steps):
            if frozenset((new_a, new_b)) in tried:
                continue
            tried.add(frozenset((new_a, new_b)))
            # The work if none of them helps: a step mostly takes one merge, see `_lowers`.
            ahead = steps[place : place + patience - failed]
            costs.problem.foresee([max(step[2:], key=len) for step in ahead])
            if _lowers(costs, (groups[a], groups[b]), (new_a, new_b), eps):
                groups[a], groups[b], failed = new_a, new_b, 0
                objective = sum(map(costs, groups)) / n
                history.append({"objective": objective, "labels": list(_labels(groups, n))})
                break
            failed += 1
            if failed >= patience:
                return history, "patience"
        else:
            return history, "converged"


def _lowers(costs: Costs, old: tuple[Members, ...], new: tuple[Members, ...], eps: float) -> bool:
    """True if a step lowers the cost; scales are tuned only if it already does so untuned."""
    most = costs(old[0]) + costs(old[1]) - eps
    # A cluster hardly ever costs less than 0, so one of the two is mostly enough to refuse a step.
    one = costs.tried(new[1], old[1])
    if one >= most or one + costs.tried(new[0], old[0]) >= most:
        return False
    return costs(new[0]) + costs(new[1]) < most


def _promising(costs: Costs, groups: Groups) -> list[tuple[int, int, Members, Members]]:
    """All steps, the largest expected fall first, ties in the order of the tasks."""
    steps = list(_neighbours(groups))

    def change(step: tuple[int, int, Members, Members]) -> float:
        a, b, new_a, new_b = step
        new = costs.expected(new_a, groups[a]) + costs.expected(new_b, groups[b])
        return new - costs(groups[a]) - costs(groups[b])

    return sorted(steps, key=change)
