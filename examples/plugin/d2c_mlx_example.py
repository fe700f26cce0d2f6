"""A merge method and a clustering for d2c-mlx, found by the entry points of pyproject.toml."""

import numpy as np
from scipy.cluster import hierarchy


def median(factors, options):
    """The entry-wise median of the updates: `(in, k)`, `(k, out)` of one module, k <= rank."""
    u, s, vt = np.linalg.svd(np.median([a @ b for a, b in factors], axis=0), full_matrices=False)
    return u[:, : options.rank] * s[: options.rank], vt[: options.rank]


def linkage(problem, n_clusters, seed):
    """Average linkage of the adapters by the cosine of their updates: one label each."""
    distances = (1 - problem.similarity)[np.triu_indices(problem.n, 1)]
    return hierarchy.fcluster(hierarchy.average(distances), n_clusters, "maxclust")
