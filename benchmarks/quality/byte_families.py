"""Families of the byte budget that a run does not offer, and the choice of hindsight."""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.allocate import allocate
from d2c_mlx.compress.candidates import Form, worth
from d2c_mlx.compress.quantize import svd_components


def bits_alone(session):
    """Candidates with all components of an adapter at the same bits."""
    found, forms = [], session.planner.forms
    for bits in (2, 3, 4, 8):
        for i, adapter in enumerate(session.adapters):
            levels = {path: ((lora.rank, bits),) for path, lora in adapter.modules.items()}
            found.append(forms.measure(Form((i,), adapter, levels, "bits", bits / 16)))
    return found


def rank_alone(session):
    """Candidates with some components of an adapter in 16 bit."""
    found, forms = [], session.planner.forms
    widths = {path: sum(shape) for path, shape in session.inputs.base.module_shapes.items()}
    for share in (2.0**k for k in range(-6, 1)):
        for i, adapter in enumerate(session.adapters):
            values = worth(svd_components(adapter), [session.study.module_gains[i]])
            levels = allocate(values, widths, share * session.inputs.capacity.sizes[i], (16,))
            kept = {path: some for path, some in levels.items() if some}
            found.append(forms.measure(Form((i,), adapter, kept, "rank", share)))
    return found


ALONE = {"bits alone": bits_alone, "rank alone": rank_alone}


def shared_basis(session, room):
    """All adapters as `U S_i V^T` in 16 bit, U and V common to all (arXiv 2407.00066).

    U and V are the leading directions of all dW together, of the largest rank that fits `room`
    bytes in every module; scales are tuned on the probes as for every other form.

    Returns:
        The adapters in the order of the tasks, their bytes and the mean regret on the probes; None
        where not even rank 1 fits.
    """
    shapes = {
        path: session.inputs.base.module_shapes[path]
        for path in session.inputs.capacity.target_paths
    }

    def nbytes(rank):
        ranks = [min(rank, *shape) for shape in shapes.values()]
        return sum(
            2 * (r * sum(s) + len(session.adapters) * r * r) for r, s in zip(ranks, shapes.values())
        )

    rank = max((r for r in range(1, 513) if nbytes(r) <= room), default=None)
    if rank is None:
        return None
    modules = [{} for _ in session.adapters]
    for path, shape in shapes.items():
        updates = [
            one.modules[path].delta().T if path in one.modules else np.zeros(shape, np.float32)
            for one in session.adapters
        ]
        u = np.linalg.eigh(sum(x @ x.T for x in updates))[1][:, -rank:]
        v = np.linalg.eigh(sum(x.T @ x for x in updates))[1][:, -rank:]
        for one, x in zip(modules, updates):
            one[path] = LoRA(mx.array(u), mx.array(u.T @ x @ v @ v.T))
    adapters = [Adapter(name, one) for name, one in zip(session.inputs.names, modules)]
    found, forms = [], session.planner.forms
    for i, one in enumerate(adapters):
        levels = {path: ((lora.rank, 16),) for path, lora in one.modules.items()}
        found.append(forms.measure(Form((i,), one, levels, "shared basis")))
    served = [one.stored.scaled(one.scale) for one in found]
    return served, nbytes(rank), sum(one.regret for one in found) / len(found)


def in_hindsight(session, candidates):
    """The candidates with the regret of held-out rows in place of the probes'."""
    jobs = [
        (None, session.inputs.tests),
        *((one, [test]) for one, test in zip(session.adapters, session.inputs.tests)),
    ]
    base, *own = session.evaluator.losses(jobs)
    own = np.concatenate(own)
    found = []
    for one in candidates:
        members = list(one.members)
        losses = base[members]
        if one.family != "base":
            adapter = one.stored.scaled(one.scale).adapter(session.inputs.base.dtype)
            (losses,) = session.evaluator.losses_in_parts(
                [(adapter, [session.inputs.tests[i] for i in members])]
            )
        regret = (losses - own[members]) / (base[members] - own[members])
        found.append(replace(one, regret=float(regret.sum())))
    return found
