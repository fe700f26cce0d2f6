"""The byte budget: what a plan chooses at several budgets, beside other families of forms.

    python -m benchmarks.quality.bytes --library DIR [--budgets 25,12.5,6.25,3,1.5,0.75]
        [--families auto]

All is chosen on calibration rows and judged on held-out rows. Bytes are those of the compact file;
a shared basis has no file, its factors alone are counted. D2C in 16 bit is what slots.py measures.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import ends
from benchmarks.quality.families import ALONE, chosen, shared_basis, shared_private
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.compact_file import compact_nbytes, index_of
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

MAKERS = {"shared basis": shared_basis, "shared + private": shared_private}
FAMILIES = ("auto", *ALONE, *MAKERS)


def judge(session, adapters, serves, nbytes):
    """Held-out rows of stored adapters: excess loss, kept."""
    plain = [one.adapter(session.library.base.dtype) for one in adapters]
    served = {name: None if k is None else plain[k] for name, k in serves.items()}
    methods = {
        **ends(session),
        "plan": BenchMethod(nbytes, [served]),
    }
    benched = bench_methods(session.library.scorer, methods, session.library.held_out)["plan"]
    worst = max(benched["tasks"].items(), key=lambda item: item[1]["excess"])[0]
    share = nbytes / session.capacity.total
    keys = ("nbytes", "excess", "kept")
    return {key: benched[key] for key in keys} | {"share": share, "worst": worst}


def planned(session, name, room):
    """The choice of a family for a budget, its losses and the seconds it took."""
    started = time.perf_counter()
    stored = chosen(session, name, room)
    seconds = time.perf_counter() - started
    merged = sum(len(members) > 1 for members in stored.members)
    nbytes = compact_nbytes(index_of(stored.adapters))
    serves = stored.serves(session.library.names)
    return {
        "probe_regret": stored.regret,
        "own": len(stored.adapters) - merged,
        "merged": merged,
        "base": list(serves.values()).count(None),
        **judge(session, stored.adapters, serves, nbytes),
        "seconds": round(seconds, 1),
    }


def made(session, name, room):
    """The row of a family that makes its own adapters, if one fits."""
    found = MAKERS[name](session, room)
    if found is None:
        return None
    adapters, nbytes, merged, regret = found
    serves = {task: i for i, task in enumerate(session.library.names)}
    counts = {"own": len(adapters), "merged": merged, "base": 0}
    return {"probe_regret": regret, **counts, **judge(session, adapters, serves, nbytes)}


def line(one):
    """A line of the printed table."""
    return (
        f"| {one['budget']} | {one['family']} | {one['share']:.2%} | {one['probe_regret']:.4f} |"
        f" {one['excess']:.4f} | {one['kept']:.2%} | {one['own']} own, {one['merged']} merged,"
        f" {one['base']} base |"
    )


def rows_of(session, name, budgets):
    """Yield the rows of a family."""
    for budget in budgets:
        room = session.capacity.room(parse_budget(budget))
        row = (made if name in MAKERS else planned)(session, name, room)
        if row:
            yield {"budget": budget, "family": name, **row}


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
    """The result to write: facts, and rows of other families that are there."""
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
    asked = options.families.split(",")
    facts = {"examples": options.examples, "tests": options.tests, "machine": machine()}
    same = (
        ["examples", "tests", "machine"] if not set(asked) <= set(MAKERS) else ["examples", "tests"]
    )
    before = measured_before(options.output, facts, same)
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        config = RunConfig(
            adapters=str(options.library / "adapters"), tasks=str(options.library / "tasks"),
            output=str(Path(directory) / "run"), budget=budgets[0],
            probe_examples=options.examples, test_examples=options.tests,
        )  # fmt: skip
        session = run(config, until="probe", quiet=True)
        print(json.dumps(facts), flush=True)
        result = continued(before, facts, asked)
        for name in asked:
            for one in rows_of(session, name, budgets):
                result["rows"].append(one)
                write_json(options.output, result)
                print(line(one), flush=True)


if __name__ == "__main__":
    main()
