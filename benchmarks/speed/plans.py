"""Plans: evaluations, seconds, and loss on held-out rows.

    python -m benchmarks.speed.plans --library DIR [--budgets 12.5,3,0.75]
        [--refine [--prompts]] [--packs DIR]

An evaluation is one adapter on all calibration rows of one task. Plans start from the same probe,
teacher targets and gains of modules, which are not counted. `--refine` trains every plan, which is
timed apart from planning it; with `--prompts` also on what the adapters answer to prompts of other
rows. Results: results/plans.json, written after every plan.
`--packs` keeps the packs: `benchmarks.quality.scores --work DIR --case plan`, or a case of those
that are trained, plan-refined and plan-refined-with-prompts, judges their answers.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks import command_line
from benchmarks.quality.bytes import judge
from benchmarks.quality.families import chosen
from benchmarks.quality.without_rows import N_PROMPTS, write_prompts
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.compress.compact_file import compact_nbytes, index_of
from d2c_mlx.packs.write import write_pack
from d2c_mlx.pipeline import run
from d2c_mlx.refine.refine import refine
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.stages import manifest_of, members_of
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json


def planned(session, budget):
    """One plan, and its row: its costs, and the losses of its pack."""
    before = session.library.scorer.counts.copy()
    room = session.capacity.room(parse_budget(budget))
    started = time.perf_counter()
    plan = chosen(session, "auto", room)
    seconds, counts = time.perf_counter() - started, session.library.scorer.counts - before
    serves, nbytes = plan.serves(session.library.names), compact_nbytes(index_of(plan.adapters))
    return plan, {
        "case": "plan",
        "budget": budget,
        "evaluations": round(counts["asked"] / len(session.library.calibration[0].parts)),
        "tokens": counts["tokens"],
        "seconds": round(seconds, 1),
        "candidates": plan.facts["candidates"],
        "measured": plan.facts["measured"],
        "regret": plan.regret,
        "merged": sum(len(members) > 1 for members in plan.members),
        "base": len(plan.facts["base"]),
        **judge(session, plan.adapters, serves, nbytes),
    }


def refined(session, plan, before):
    """A plan's adapters, trained as `d2c-mlx run --refine` does, and their row."""
    started = time.perf_counter()
    forms = [
        refine(session.library.base, form, members_of(session.library, unit["tasks"])).adapter
        for unit, form in zip(plan.facts["units"], plan.adapters)
    ]
    seconds = round(time.perf_counter() - started, 1)
    nbytes = compact_nbytes(index_of(forms))
    judged = judge(session, forms, plan.serves(session.library.names), nbytes)
    case = "plan-refined" + "-with-prompts" * bool(session.inputs.prompts)
    return forms, {**before, "case": case, "seconds": seconds, **judged}


def keep(session, plan, forms, place):
    """The pack of a plan in `place/pack`, with these adapters."""
    place.mkdir(parents=True, exist_ok=True)
    write_pack(
        place / "pack", forms, manifest_of(session.inputs), plan.serves(session.library.names)
    )


def measured(session, budget, train):
    """Yield `(plan, its adapters, row)` of one plan, then of the same trained."""
    plan, row = planned(session, budget)
    yield plan, plan.adapters, row
    if train:
        yield plan, *refined(session, plan, row)


def config_of(options, directory):
    """The run whose probe all plans start from."""
    config = RunConfig(
        adapters=str(options.library / "adapters"), tasks=str(options.library / "tasks"),
        output=str(directory / "run"), budget=f"{options.budgets.split(',')[0]}%",
        probe_examples=options.examples, test_examples=options.tests,
    )  # fmt: skip
    if not options.prompts:
        return config
    n = options.examples
    tasks = write_prompts(options.library, directory / "prompts", range(n), n)
    return config.replace(refine=True, tasks=tasks)


def main():
    """Measure and print."""
    parser = command_line(__doc__, __spec__, "plans.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--budgets", default="12.5,3,0.75", help="percent")
    parser.add_argument("--refine", action="store_true", help="train the plans too")
    parser.add_argument("--prompts", action="store_true",
                        help=f"with --refine: on {N_PROMPTS} prompts per task besides")  # fmt: skip
    parser.add_argument("--packs", type=Path, help="keeps every pack")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=30)
    options = parser.parse_args()
    if options.prompts and not options.refine:
        parser.error("--prompts is for --refine")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        session = run(config_of(options, Path(directory)), until="probe", quiet=True)
        started = time.perf_counter()
        session.library.by_teacher.regrets(None, [0])
        between = time.perf_counter()
        assert session.library.module_gains
        facts = {"examples": options.examples, "tests": options.tests, "machine": machine(),
                 "teacher_seconds": round(between - started, 1),
                 "gains_seconds": round(time.perf_counter() - between, 1)}  # fmt: skip
        for budget in options.budgets.split(","):
            for plan, forms, row in measured(session, f"{budget}%", options.refine):
                rows.append(row)
                write_json(options.output, {**facts, "rows": rows})
                print(json.dumps(row), flush=True)
                if options.packs:
                    keep(session, plan, forms, options.packs / f"{budget}%-0-{row['case']}")


if __name__ == "__main__":
    main()
