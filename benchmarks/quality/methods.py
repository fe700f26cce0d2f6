"""The methods of the experiment: what each stores of a library, in how many bytes."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from benchmarks.quality.families import ALONE, chosen
from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.core_space import gram, similarity
from d2c_mlx.cluster.partition import Clusters, canonical, d2c, kmeans, random_partition
from d2c_mlx.cluster.search import search_by_estimates
from d2c_mlx.compress.compact_file import compact_nbytes, index_of
from d2c_mlx.merge.merging import merge, problem_of
from d2c_mlx.merge.methods import merge_adapters

# Methods that are drawn several times: partitions, and orders in which adapters arrive.
DRAWN = {"random": 10, "K-Merge": 3}


@dataclass(frozen=True)
class Stored:
    """The adapters that a method stores.

    Attributes:
        serves: task -> the adapter that serves it, None for the bare base model.
        nbytes: of all adapters.
        n_adapters: how many there are.
        about: JSON value: clusters, merge methods and scales, rank.
    """

    serves: dict[str, Adapter | None]
    nbytes: int
    n_adapters: int
    about: dict[str, object]


def planned(session, method: str, room: int) -> Stored:
    """The plan for a budget: "auto", or of a family alone (`ALONE`)."""
    stored, names = chosen(session, method, room), session.library.names
    plain = [form.adapter(session.library.base.dtype) for form in stored.adapters]
    places = stored.serves(names)
    serves = {name: None if k is None else plain[k] for name, k in places.items()}
    about = {
        "clusters": [[names[i] for i in members] for members in stored.members],
        "probe_regret": stored.regret,
    }
    nbytes = compact_nbytes(index_of(stored.adapters))
    return Stored(serves, nbytes, len(plain), about)


def slots_of(session, nbytes: int, k: int | None = None) -> tuple[int, int]:
    """`(K, rank)` of merged adapters for so many bytes.

    K is the paper's unless it is given: the budget's share of N, one at least. As adapters differ
    in size, the rank is then the largest with which K adapters of every module take no more bytes
    than the budget; where rank 1 takes more, K is less.

    Raises:
        ValueError: not even one adapter of rank 1 fits.
    """
    most = max(one.rank for one in session.inputs.library.adapters)
    share = max(1, round(len(session.library.names) * nbytes / session.capacity.total))
    for n in range(k or share, 0, -1):
        rank = bisect_right(range(1, most + 1), nbytes / n, key=session.capacity.nbytes_of_rank)
        if rank:
            return n, rank
    raise ValueError(f"{nbytes:,} bytes: no adapter of rank 1 fits")


def merged(session, partition, merge_method: str, nbytes: int, seed: int) -> Stored:
    """The merges of the clusters that a function like those in `METHODS` finds."""
    k, rank = slots_of(session, nbytes, 1 if partition is all_in_one else None)
    library = session.library
    merging = replace(session.config.merging, method=merge_method, rank=rank)
    problem = problem_of(library, merging)
    # With one cluster there is nothing to choose.
    clustering = (
        partition(problem, library.adapters, k, seed)
        if k > 1
        else Clusters("merge-all", (0,) * problem.n)
    )
    merges = [merge(library, members, merging) for members in clustering.groups]
    adapters = [
        # An adapter that is alone may take no more than a merge does.
        merge_adapters([one.adapter], rank=rank, weights=[1.0]).uniform(session.library.base.dtype)
        if one.adapter.rank > rank else one.adapter
        for one in merges
    ]  # fmt: skip
    about = {
        "clusters": [[session.library.names[i] for i in members] for members in clustering.groups],
        "merges": [[one.method, one.scale] for one in merges],
        "rank": rank,
        "probe_regret": clustering.regret,
    }
    return Stored(
        {session.library.names[i]: adapters[c] for i, c in enumerate(clustering.labels)},
        sum(one.nbytes(session.library.base.n_layers) for one in adapters), len(adapters), about,
    )  # fmt: skip


def follows(clusters: Sequence[Sequence[str]]) -> dict[str, float]:
    """Adjusted Rand index of clusters of tasks `kind-language` with `kinds` and `languages`.

    1: they are these groups; 0: they have no more to do with them than chance.
    """
    placed = [(name.split("-"), c) for c, names in enumerate(clusters) for name in names]
    labels = [c for _, c in placed]
    truths = zip(*(parts for parts, _ in placed))
    return {
        what: float(adjusted_rand_score(truth, labels))
        for what, truth in zip(("kinds", "languages"), truths)
    }


def all_in_one(problem, _adapters, _k, _seed) -> Clusters:
    """One adapter for all tasks, in the rank that the whole budget holds."""
    return Clusters("merge-all", (0,) * problem.n)


def at_random(problem, _adapters, k, seed) -> Clusters:
    """Every adapter into any cluster."""
    return random_partition(problem.n, k, seed)


def by_features(problem, _adapters, k, seed) -> Clusters:
    """K-Means on SVD features of dW."""
    return kmeans(problem.features, k, seed)


def by_estimates(problem, _adapters, k, seed) -> Clusters:
    """D2C as a run has it by default."""
    return search_by_estimates(problem, k, seed)


def by_d2c(**options):
    """The paper's loop with options of its own."""
    return lambda problem, _adapters, k, seed: d2c(problem, k, seed=seed, **options)


def by_linkage(_problem, adapters, k, _seed) -> Clusters:
    """Average linkage of 1 - cosine of dW."""
    distance = np.clip(1 - similarity(adapters), 0, None)
    np.fill_diagonal(distance, 0)
    fit = AgglomerativeClustering(k, metric="precomputed", linkage="average").fit(distance)
    return Clusters("agglomerative", canonical(fit.labels_))


def by_arrival(_problem, adapters, k, seed) -> Clusters:
    """Adapters arrive in any order; when all slots are taken, into the most alike by cosine of dW.

    A slot is the mean of what is in it, as in K-Merge (https://arxiv.org/abs/2510.13537). Merges
    are then made of all members at once, which is that mean before any rank is cut.
    """
    products = gram(adapters)
    slots: list[list[int]] = []
    for i in np.random.default_rng(seed).permutation(len(adapters)):
        if len(slots) < k:
            slots.append([int(i)])
            continue
        # The length of the new adapter, and the number in the slot, change no comparison.
        alike = [
            products[i, slot].sum() / np.sqrt(max(products[np.ix_(slot, slot)].sum(), 1e-30))
            for slot in slots
        ]
        slots[int(np.argmax(alike))].append(int(i))
    labels = np.empty(len(adapters), int)
    for c, slot in enumerate(slots):
        labels[slot] = c
    return Clusters("k-merge", canonical(labels))


# The loop of the paper from single adapters; which start it has, the paper does not say.
PAPER = by_d2c(init=("adapters",))


def restarted(n):
    """The best of n such loops by what they minimise, each from another first adapter."""

    def partition(problem, adapters, k, seed):
        loops = [PAPER(problem, adapters, k, 1000 * i + seed) for i in range(n)]
        return min(loops, key=lambda one: one.regret)

    return partition


# Name -> how adapters are clustered, and how clusters are merged. "mean" is that of dW; the scale
# of every merge is tuned on the probes of its members, whoever clustered them. None: a plan.
METHODS = {
    "merge-all": (all_in_one, "linear"),
    "random": (at_random, "linear"),
    "K-Means": (by_features, "linear"),
    "agglomerative": (by_linkage, "linear"),
    "K-Merge": (by_arrival, "linear"),
    "D2C, mean": (PAPER, "linear"),
    "D2C, TIES": (PAPER, "ties"),
    "K-Means, layerwise": (by_features, "layerwise"),
    "D2C": (by_estimates, "layerwise"),
    **dict.fromkeys(ALONE),
    "auto": None,
}
