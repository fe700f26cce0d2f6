"""Choosing a pack: against enumeration of every set partition; allocations against their rules."""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.compress.compact_file import MAX_COUNT
from d2c_mlx.compress.forms import Candidate, _silent_stdout, choose
from d2c_mlx.compress.storage import _BYTES, LOST, allocate
from d2c_mlx.utils.errors import BudgetError


def best_by_enumeration(candidates, n_tasks, nbytes):
    lowest = np.inf
    for k in range(1, n_tasks + 1):
        for chosen in itertools.combinations(candidates, k):
            served = sorted(i for candidate in chosen for i in candidate.members)
            if served == list(range(n_tasks)) and sum(x.nbytes for x in chosen) <= nbytes:
                lowest = min(lowest, sum(x.regret for x in chosen))
    return lowest


@settings(max_examples=40, derandomize=True)
@given(st.integers(1, 4), st.integers(0, 8), st.integers(1, 200), st.integers(0, 2**16))
def test_the_choice_is_the_best_of_all(n_tasks, n_units, nbytes, seed):
    rng = np.random.default_rng(seed)
    candidates = [Candidate((i,), 0, float(rng.uniform(0.5, 1))) for i in range(n_tasks)]
    for _ in range(n_units):
        members = tuple(np.flatnonzero(rng.random(n_tasks) < 0.5).tolist()) or (0,)
        size, regret = int(rng.integers(1, 100)), float(rng.uniform(-0.1, 1) * len(members))
        candidates.append(Candidate(members, size, regret))
    chosen = [candidates[j] for j in choose(candidates, n_tasks, nbytes)]
    assert sorted(i for x in chosen for i in x.members) == list(range(n_tasks))
    assert sum(x.nbytes for x in chosen) <= nbytes
    best = best_by_enumeration(candidates, n_tasks, nbytes)
    assert sum(x.regret for x in chosen) == pytest.approx(best, abs=1e-6)


def test_a_task_that_nothing_serves():
    with pytest.raises(BudgetError, match="no choice of 1 candidates"):
        choose([Candidate((0,), 10, 0.0)], 2, 100)


def test_nothing_is_printed_while_a_solver_is_at_work(capfd):
    """By C, whose standard output is that of `--json`."""
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with _silent_stdout():
        libc.puts(b"meanwhile")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after"]


def spent(levels, widths):
    return sum(n * widths[path] * _BYTES[bits] for path, ls in levels.items() for n, bits in ls)


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 9), st.floats(0, 3000), st.integers(0, 10**6))
def test_allocations_fit_and_grow(n_modules, rank, nbytes, seed):
    rng = np.random.default_rng(seed)
    worth = {f"m{i}": np.sort(rng.uniform(0, 1, rank))[::-1] ** 4 for i in range(n_modules)}
    widths = {path: int(rng.integers(10, 200)) for path in worth}
    levels = allocate(worth, widths, nbytes)
    assert spent(levels, widths) <= nbytes + 1e-6
    for given_levels in levels.values():
        bits = [b for _, b in given_levels]
        assert bits == sorted(set(bits), reverse=True) and set(bits) <= set(LOST)
        assert sum(n for n, _ in given_levels) <= rank
    assert allocate(worth, widths, 1e9) == dict.fromkeys(worth, ((rank, 8),))


def test_worth_per_byte_decides():
    worth = {"steep": np.array([2.0, 0.01]), "flat": np.array([1.0, 1.0])}
    widths = dict.fromkeys(worth, 100)
    two, three = (n * 100 * _BYTES[2] + 0.01 for n in (2, 3))
    assert allocate(worth, widths, two) == {"steep": ((1, 2),), "flat": ((1, 2),)}
    assert allocate(worth, widths, three) == {"steep": ((1, 2),), "flat": ((2, 2),)}
    wide = {"steep": 100, "flat": 10_000}
    assert allocate(worth, wide, two) == {"steep": ((1, 4),)}
    worth = {"good": np.array([1e-3]), "nothing": np.zeros(2), "harm": np.array([-1.0, -0.5])}
    assert allocate(worth, dict.fromkeys(worth, 10), 1e9) == {"good": ((1, 8),)}


def test_no_more_alike_than_a_pack_can_count():
    """Rank 600: those that must wait until others have more bits are not forgotten."""
    worth = {"long": 1 / np.sqrt(np.arange(1, 601)), "short": np.ones(3)}
    widths = dict.fromkeys(worth, 100)
    for nbytes in (6_000, 15_000, 1e9):
        levels = allocate(worth, widths, nbytes)
        assert max(n for n, _ in levels["long"]) <= MAX_COUNT
        assert spent(levels, widths) <= nbytes
    assert sum(n for n, _ in levels["long"]) == 600 and levels["short"] == ((3, 8),)
