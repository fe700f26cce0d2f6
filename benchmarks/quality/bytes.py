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

import numpy as np

from benchmarks import command_line
from benchmarks.common import ends
from benchmarks.quality.families import bits_alone, rank_alone, shared_basis, shared_private
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.compact_file import index_of
from d2c_mlx.compress.file_layout import compact_nbytes
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json
from d2c_mlx.utils.line_search import FINE_SCALES

# Candidates that a family may choose from; none for those that make their own.
FAMILIES = {
    "auto": ("base", "own", "merged"),
    "rank and bits": ("base", "own"),
    "merges": ("base", "merged"),
    "bits alone": ("base", "bits"),
    "rank alone": ("base", "rank"),
    "shared basis": (),
    "shared + private": (),
    "hindsight": ("base", "own", "merged"),
}

ALONE = {"bits alone": bits_alone, "rank alone": rank_alone}
MAKERS = {"shared basis": shared_basis, "shared + private": shared_private}


def in_hindsight(session, candidates):
    """The candidates with the regret of held-out rows in place of the probes'."""
    jobs = [
        (None, session.inputs.tests),
        *((one, [test]) for one, test in zip(session.adapters, session.inputs.tests)),
    ]
    base, *own = session.scorer.losses(jobs)
    own = np.concatenate(own)
    found = []
    for one in candidates:
        members = list(one.members)
        losses = base[members]
        if one.family != "base":
            adapter = one.load().adapter(session.inputs.base.dtype)
            (losses,) = session.scorer.losses_in_parts(
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
    benched = bench_methods(session.scorer, methods, session.inputs.tests)["plan"]
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


def made(session, name, room):
    """The row of a family that makes its own adapters, if one fits."""
    found = MAKERS[name](session, room)
    if found is None:
        return None
    adapters, nbytes, merged, regret = found
    serves = {task: i for i, task in enumerate(session.inputs.names)}
    counts = {"own": len(adapters), "merged": merged, "base": 0}
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
        found = made(session, name, room) if name in MAKERS else chosen(session, name, room, pool)
        if found:
            yield {"budget": budget, "family": name, **found}


def measured(session, rooms):
    """The candidates for all budgets, and what they cost."""
    before, started = session.scorer.counts, time.perf_counter()
    candidates = session.planner.measure(rooms)
    counts = session.scorer.counts
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


def measured_before(output, facts, same):
    """The content of results that can be continued; None where there are none.

    Raises:
        SystemExit: it was measured of something else; in one line.
    """
    if not output.exists():
        return None
    before = json.loads(output.read_text())
    if other := [key for key in same if before.get(key) != facts[key]]:
        raise SystemExit(f"{output}: has other {', '.join(other)}; give another --output")
    return before


def continued(before, facts, families):
    """The result to write: facts, and rows of other families that are there.

    Costs are the first run's: one that continues finds its losses in the cache.
    """
    if before is None:
        return facts | {"rows": []}
    return before | {"rows": [row for row in before["rows"] if row["family"] not in families]}


def main():
    """Measure and print."""
    parser = command_line(__doc__, __spec__, "bytes.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--budgets", default="25,12.5,6.25,3,1.5,0.75", help="percent")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=30)
    options = parser.parse_args()
    budgets = [f"{x}%" for x in options.budgets.split(",")]
    asked, candidates = options.families.split(","), []
    facts = {"examples": options.examples, "tests": options.tests, "machine": machine()}
    whole = not set(asked) <= set(MAKERS)
    same = ["examples", "tests", "machine"] if whole else ["examples", "tests"]
    measured_before(options.output, facts, same)
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        config = RunConfig(
            adapters=str(options.library / "adapters"), tasks=str(options.library / "tasks"),
            output=str(Path(directory) / "run"), budget=budgets[0],
            probe_examples=options.examples, test_examples=options.tests,
        )  # fmt: skip
        session = run(config, until="probe", quiet=True)
        rooms = [session.inputs.capacity.room_of(parse_budget(one)) for one in budgets]
        if whole:
            candidates, costs = measured(session, rooms)
            facts |= costs
            same += ["candidates", "every"]
        print(json.dumps(facts), flush=True)
        result = continued(measured_before(options.output, facts, same), facts, asked)
        for name in asked:
            for one in rows_of(session, name, budgets, rooms, candidates):
                result["rows"].append(one)
                write_json(options.output, result)
                print(line(one), flush=True)


if __name__ == "__main__":
    main()
