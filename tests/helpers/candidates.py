"""Candidates of a planner."""

import numpy as np

from d2c_mlx.compress.allocate import Candidate


def candidates_that_highs_talks_about():
    """With scipy 1.17.1: found among 700 such."""
    rng, found = np.random.default_rng(208), []
    n = int(rng.integers(20, 31))
    for i in range(n):
        found.append(Candidate((i,), "base", 0, {}, 0, 1.0))
        for bits in (2, 3, 4, 8):
            nbytes = int(rng.integers(100, 10000) * bits)
            found.append(Candidate((i,), "own", 1, {}, nbytes, float(rng.random() - 0.1 * bits)))
    for _ in range(20):
        members = tuple(sorted(set(map(int, rng.integers(0, n, 3)))))
        nbytes = int(rng.integers(100, 10000))
        found.append(Candidate(members, "merged", 1, {}, nbytes, float(rng.random() * 2)))
    return found, n, float(rng.integers(1, 300000)), int(rng.integers(1, n + 1))
