"""Families of stored adapters that the planner does not offer, for comparison with what it does.

Each is tuned on the probe rows, as the planner's candidates are.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from d2c_mlx_methods.factorwise import concat

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.cluster.partition import groups_of
from d2c_mlx.cluster.search import MergeEstimates, estimated_partition
from d2c_mlx.compress.compact_file import COMPACT, compact_nbytes, index_of, read_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.forms import Candidate, Forms, choose
from d2c_mlx.compress.plan import plan
from d2c_mlx.compress.quantize import svd_components
from d2c_mlx.compress.storage import allocate, worth
from d2c_mlx.merge.merging import merge
from d2c_mlx.utils.line_search import line_search


def form_of(members, adapter, levels):
    """A form that is not measured."""
    return Candidate(members, 0, 1.0, False, adapter, levels)


def bits_alone(session):
    """Forms with all components of an adapter at the same bits."""
    for bits in (2, 3, 4, 8):
        for i, adapter in enumerate(session.library.adapters):
            levels = {path: ((lora.rank, bits),) for path, lora in adapter.modules.items()}
            yield form_of((i,), adapter, levels)


def rank_alone(session):
    """Forms with some components of an adapter in 16 bit."""
    widths = {path: sum(shape) for path, shape in session.library.base.module_shapes.items()}
    for share in (2.0**k for k in range(-6, 1)):
        for i, adapter in enumerate(session.library.adapters):
            values = worth(svd_components(adapter), [session.library.module_gains[i]])
            levels = allocate(values, widths, share * session.capacity.sizes[i], (16,))
            yield form_of((i,), adapter, levels)


ALONE = {"bits alone": bits_alone, "rank alone": rank_alone}


@dataclass(frozen=True)
class Chosen:
    """The bytes and excess of one family at a budget.

    Attributes:
        adapters: stored forms.
        members: numbers of the tasks that each of them serves.
        regret: mean over all tasks, on calibration rows.
        facts: of a plan, as `plan.json` has them.
    """

    adapters: Sequence[Compressed]
    members: Sequence[tuple[int, ...]]
    regret: float
    facts: dict

    def serves(self, names):
        """Task -> position of its adapter, None for the base model."""
        placed = {names[i]: k for k, members in enumerate(self.members) for i in members}
        return dict.fromkeys(names) | placed


def chosen(session, method, room):
    """The choice of a plan ("auto"), or of a family of `ALONE`, whose forms are all measured."""
    capacity, n = session.capacity, len(session.library.adapters)
    if method not in ALONE:
        with tempfile.TemporaryDirectory() as output:
            found = plan(session.library, capacity, Path(output), session.config.merging, room)
            kept = [form for form in found.chosen if form.adapter]
            adapters = [read_compact(Path(output) / COMPACT, k) for k in range(len(kept))]
            regret, facts = found.content["regret"], found.content
        return Chosen(adapters, [form.members for form in kept], regret, facts)
    forms = Forms(session.library, session.capacity, 0)
    regrets = session.library.by_teacher.regrets(None, range(n))
    every = [Candidate((i,), 0, float(x)) for i, x in enumerate(regrets)]
    for form in ALONE[method](session):
        measured = forms.measure(form)
        nbytes = capacity.storage.nbytes(form.adapter.name, form.levels)
        every.append(replace(measured, nbytes=nbytes))
    best = [every[j] for j in choose(every, n, room, capacity.storage)]
    kept = [form for form in best if form.adapter]
    regret = sum(form.regret for form in best) / n
    return Chosen([forms.load(form) for form in kept], [form.members for form in kept], regret, {})


def shared_basis(session, room):
    """All adapters as `U S_i V^T` in 16 bit, U and V common to all (arXiv 2407.00066).

    U and V are the leading directions of all dW together, of the largest rank that fits `room`
    bytes in every module; scales are tuned on the probes as for every other form.

    Returns:
        As `shared_private`; None where not even rank 1 fits.
    """
    shapes = {path: session.library.base.module_shapes[path] for path in session.capacity.shapes}

    def nbytes(rank):
        ranks = [min(rank, *shape) for shape in shapes.values()]
        return sum(
            2 * (r * sum(s) + len(session.library.adapters) * r * r)
            for r, s in zip(ranks, shapes.values())
        )

    rank = max((r for r in range(1, 513) if nbytes(r) <= room), default=None)
    if rank is None:
        return None
    modules = [{} for _ in session.library.adapters]
    for path, shape in shapes.items():
        updates = [
            one.modules[path].delta().T if path in one.modules else np.zeros(shape, np.float32)
            for one in session.library.adapters
        ]
        u = np.linalg.eigh(sum(x @ x.T for x in updates))[1][:, -rank:]
        v = np.linalg.eigh(sum(x.T @ x for x in updates))[1][:, -rank:]
        for one, x in zip(modules, updates):
            one[path] = LoRA(mx.array(u), mx.array(u.T @ x @ v @ v.T))
    adapters = [Adapter(name, one) for name, one in zip(session.library.names, modules)]
    served, regrets = [], []
    forms = Forms(session.library, session.capacity, 0)
    for i, adapter in enumerate(adapters):
        levels = {path: ((lora.rank, 16),) for path, lora in adapter.modules.items()}
        form = forms.measure(form_of((i,), adapter, levels))
        served.append(forms.load(form))
        regrets.append(form.regret)
    return served, nbytes(rank), 0, float(np.mean(regrets))


@dataclass(frozen=True)
class Both:
    """A shared merge and what one task adds to it."""

    shared: Compressed
    private: Compressed | None

    def adapter(self, dtype):
        """The sum of both, as one adapter of the sum of their ranks."""
        return total([one.adapter(dtype) for one in (self.shared, self.private) if one])


def total(adapters, signs=(1.0, 1.0)):
    """The adapter whose dW is the signed sum of those of one or two adapters."""
    some = [(one, sign) for one, sign in zip(adapters, signs) if one is not None]
    modules = {}
    for path in dict.fromkeys(path for one, _ in some for path in one.modules):
        here = [(one.modules[path], sign) for one, sign in some if path in one.modules]
        a, b = concat([lora.factors() for lora, _ in here], np.array([sign for _, sign in here]))
        modules[path] = LoRA(mx.array(a), mx.array(b))
    return Adapter(some[0][0].name, modules)


# Numbers of clusters, and the share of the bytes that their merges have: all are tried.
DIVISORS, SHARED = (4, 8), (0.5, 0.75)
PRIVATE_SCALES = (0.35, 0.5, 0.7, 1.0, 1.2, 1.4, 1.7)


def shared_private(session, room):
    """K merges, and for every task a small update that brings its merge closer to its adapter.

    After TUNA's universal adapter beside a task's own. The merges are those that a plan would try
    for estimated clusters; a private update is the difference between adapter and stored merge, in
    the components and bits that a plan would give it.

    Returns:
        What serves the tasks, in their order, its bytes, the number of merges and the mean regret
        on the probes.
    """
    estimates = MergeEstimates(session.library.fading, session.library.similarity)
    n, found = len(session.library.adapters), []
    for k in sorted({max(1, n // divisor) for divisor in DIVISORS}):
        groups = groups_of(estimated_partition(estimates, k))
        for share in SHARED:
            units = shared(session, groups, share * room / len(groups))
            served = [private(session, merge, i, (1 - share) * room / n)
                      for members, merge in zip(groups, units) for i in members]  # fmt: skip
            served.sort(key=lambda one: one[0])
            regret = sum(one[2] for one in served) / n
            stored = [*units]
            stored += [both.private for _, both, _ in served if both.private]
            nbytes = compact_nbytes(index_of(stored))
            found.append(([both for _, both, _ in served], nbytes, k, regret))
            print(f"shared + private, {k} merges with {share:.0%}: regret {regret:.4f}", flush=True)
    return min(found, key=lambda one: one[3])


def shared(session, groups, nbytes):
    """The merge of every group, stored in at most so many bytes, at its best scale."""
    found, taught = [], session.library.by_teacher
    forms = Forms(session.library, session.capacity, 0)
    for members in groups:
        adapter = session.library.adapters[members[0]]
        if len(members) > 1:
            adapter = merge(taught, members, session.config.merging).adapter
        gains = [session.library.module_gains[i] for i in members]
        values = worth(svd_components(adapter), gains)
        levels = session.capacity.storage.allocate(values, nbytes)
        found.append(forms.load(forms.measure(form_of(members, adapter, levels))))
    return found


def private(session, merge, i, nbytes):
    """Task, what serves it, and its regret: the stored merge and what task i adds to it."""
    taught, dtype = session.library.by_teacher, session.library.base.dtype
    rest = total([session.library.adapters[i], merge.adapter(dtype)], (1.0, -1.0))
    parts = svd_components(rest)
    storage = session.capacity.storage
    levels = storage.allocate(worth(parts, [session.library.module_gains[i]]), nbytes)
    if not levels:
        return i, Both(merge, None), float(taught.regrets(merge.adapter(dtype), (i,)).sum())
    small = storage.store(rest, levels, parts)

    def regret(scale):
        served = Both(merge, small.scaled(scale)).adapter(dtype)
        return float(taught.regrets(served, (i,)).sum())

    scale, lowest = line_search(regret, PRIVATE_SCALES, 1.0)
    return i, Both(merge, small.scaled(scale)), lowest
