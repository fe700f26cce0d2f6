"""The byte budget: what `--plan auto` chooses at several budgets, and each family alone.

    python -m benchmarks.quality.bytes --library DIR [--budgets 25,12.5,6.25,3,1.5,0.75]
        [--families auto]

Candidates are measured once for all budgets, on probes only; the choices are then judged on
held-out rows. The family "hindsight" chooses among the candidates of "auto" by held-out rows: what
choosing by ten probe rows costs. Bytes are those of the compact file; a shared basis has no file,
its factors alone are counted. D2C in 16 bit is what slots.py measures.
"""

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks import command_line
from benchmarks.common import ends
from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.allocate import allocate
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.candidates import Form, worth
from d2c_mlx.compress.compact_file import index_of
from d2c_mlx.compress.file_layout import compact_nbytes
from d2c_mlx.compress.quantize import svd_components
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json
from d2c_mlx.utils.line_search import FINE_SCALES

# Candidates that a family may choose from.
FAMILIES = {
    "auto": ("base", "own", "merged"),
    "rank and bits": ("base", "own"),
    "merges": ("base", "merged"),
    "bits alone": ("base", "bits"),
    "rank alone": ("base", "rank"),
    "shared basis": (),
    "hindsight": ("base", "own", "merged"),
}


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


def judge(session, adapters, serves, nbytes):
    """Held-out rows of stored adapters: excess loss, retention."""
    plain = [one.adapter(session.inputs.base.dtype) for one in adapters]
    served = {name: None if k is None else plain[k] for name, k in serves.items()}
    methods = {
        **ends(session),
        "plan": BenchMethod(nbytes, [served]),
    }
    benched = bench_methods(session.evaluator, methods, session.inputs.tests)["plan"]
    worst = max(benched["tasks"].items(), key=lambda item: item[1]["excess"])[0]
    share = nbytes / session.inputs.capacity.total
    keys = ("nbytes", "excess", "retention")
    return {key: benched[key] for key in keys} | {"share": share, "worst": worst}


def chosen(session, name, room, candidates):
    """The choice of a family for a budget, and its losses."""
    some = [one for one in candidates if one.family in FAMILIES[name]]
    plan = session.planner.plan(some, room)
    units, left = plan.content["units"], plan.content["base"]
    merged = [unit["family"] for unit in units].count("merged")
    stored = {"own": len(units) - merged, "merged": merged, "base": len(left)}
    nbytes = compact_nbytes(index_of(plan.adapters))
    judged = judge(session, plan.adapters, plan.serves, nbytes)
    return {"probe_regret": plan.content["regret"], **stored, **judged}


def basis(session, room):
    """The row of a shared basis, if one fits."""
    found = shared_basis(session, room)
    if found is None:
        return None
    adapters, nbytes, regret = found
    serves = {name: i for i, name in enumerate(session.inputs.names)}
    counts = {"own": len(adapters), "merged": 0, "base": 0}
    return {"probe_regret": regret, **counts, **judge(session, adapters, serves, nbytes)}


def line(one):
    """A line of the printed table."""
    return (
        f"| {one['budget']} | {one['family']} | {one['share']:.2%} | {one['probe_regret']:.4f} |"
        f" {one['excess']:.4f} | {one['retention']:.2%} | {one['own']} own, {one['merged']} merged,"
        f" {one['base']} base |"
    )


def rows_of(session, name, budgets, rooms, candidates):
    """Yield the rows of a family."""
    pool = candidates
    if name in ALONE:
        pool = [*candidates, *ALONE[name](session)]
    elif name == "hindsight":
        pool = in_hindsight(session, candidates)
    for budget, room in zip(budgets, rooms):
        found = (
            basis(session, room) if name == "shared basis" else chosen(session, name, room, pool)
        )
        if found:
            yield {"budget": budget, "family": name, **found}


def measured(session, rooms):
    """The candidates for all budgets, and what they cost."""
    before, started = replace(session.evaluator.counts), time.perf_counter()
    candidates = session.planner.measure(rooms)
    counts = session.evaluator.counts
    every = sum(
        len(FINE_SCALES) * len(session.inputs.probes[i].parts)
        for one in candidates if one.family != "base" for i in one.members
    )  # fmt: skip
    return candidates, {
        "candidates": len(candidates),
        "seconds": round(time.perf_counter() - started, 1),
        # Of one adapter on a part of a task's probes. `every`: all candidates at all scales.
        "asked": counts.asked - before.asked,
        "every": every,
        "tokens": counts.tokens - before.tokens,
    }


def continued(output, facts, families):
    """The result to write: facts, and rows of other families that are there.

    Costs are the first run's: one that continues finds its losses in the cache.
    """
    if not output.exists():
        return facts | {"rows": []}
    before = json.loads(output.read_text())
    same = ("candidates", "every", "examples", "tests", "machine")
    if any(before.get(key) != facts[key] for key in same):
        raise SystemExit(f"{output}: of other candidates, rows or another machine; move it away")
    return before | {"rows": [row for row in before["rows"] if row["family"] not in families]}


def main():
    """Measure and print."""
    parser = command_line(__doc__, __spec__, "bytes.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--budgets", default="25,12.5,6.25,3,1.5,0.75", help="percent")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=100)
    options = parser.parse_args()
    budgets = [f"{x}%" for x in options.budgets.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        config = RunConfig(
            adapters=str(options.library / "adapters"), tasks=str(options.library / "tasks"),
            output=str(Path(directory) / "run"), budget=budgets[0],
            probe_examples=options.examples, test_examples=options.tests,
        )  # fmt: skip
        session = run(config, until="probe", quiet=True)
        rooms = [session.inputs.capacity.room_of(parse_budget(one)) for one in budgets]
        candidates, facts = measured(session, rooms)
        facts |= {"examples": options.examples, "tests": options.tests, "machine": machine()}
        print(json.dumps(facts), flush=True)
        asked = options.families.split(",")
        result = continued(options.output, facts, asked)
        for name in asked:
            for one in rows_of(session, name, budgets, rooms, candidates):
                result["rows"].append(one)
                write_json(options.output, result)
                print(line(one), flush=True)


if __name__ == "__main__":
    main()
