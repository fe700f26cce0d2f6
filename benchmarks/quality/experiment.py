"""The paper's experiment on real text: methods x budgets x probe seeds, by task metrics and loss.

    python -m benchmarks.quality.experiment --library DIR --work DIR [--budgets 12.5,6.25,3,25,1.5]
        [--seeds 0,1,2] [--methods "auto;K-Means"] [--tests 20] [--rows DIR] [--list]

DIR has `adapters/` (benchmarks.library.train) and `tasks/` (benchmarks.library.rows). Every method
has at most the same bytes, a share of all adapters in 16 bit: see `methods.slots_of`. A seed takes
other probe rows of every task (0-9, 10-19, ...), never test rows. Judged on the first test rows of
each task, by the loss and by greedy answers under the metric of the task (metrics.py).

Resumes method by method: the work directory keeps rows, answers and losses. Rows may be kept in
another place (`--rows`), where they outlive it: a row is one line, with what its score is made of.
What was measured of all that was asked for is in results/experiment.json; `--list` only writes
that.
"""

import json
import os
import time
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.quality.answering import Answers
from benchmarks.quality.methods import DRAWN, METHODS, Stored, follows, merged, planned
from benchmarks.quality.metrics import (
    METRIC_OF,
    paired_bootstrap,
    pooled_bootstrap,
    row_stats,
    task_score,
)
from benchmarks.quality.slots import probes_of
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.evaluate.heldout import BenchMethod, method_losses, prompt_and_expected
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import hash_tree, write_json, write_text

SETTINGS = "settings.json"
CEILING, FLOOR = "individual", "base"
# What is compared, besides `auto` with all others: all draws of both that have the same probe rows.
PAIRS = (
    ("auto", CEILING),
    ("D2C", "K-Means"),
    ("D2C", "K-Means, layerwise"),
    ("K-Means, layerwise", "K-Means"),
    ("D2C, mean", "K-Means"),
    ("D2C, TIES", "K-Means"),
    ("D2C, mean", "random"),
)


class Judge:
    """Losses and scores of what a method stores, on the same test rows for all."""

    def __init__(self, session, directory: Path) -> None:
        """Take a session; answers are kept in a directory."""
        self._session = session
        self._answers = Answers(
            directory,
            session.library.held_out,
            session.config.model,
            session.library.scorer.engine.workers,
        )
        n = session.config.test_examples
        self._rows = {
            task.name: [tuple(prompt_and_expected(row).values()) for row in task.test[:n]]
            for task in [task.rows for task in session.library.tasks]
        }

    def row(self, stored: Stored) -> dict[str, object]:
        """`tasks`: task -> loss, score, and of every test row what the score is made of."""
        losses = method_losses(
            self._session.library.scorer,
            BenchMethod(0, [stored.serves]),
            self._session.library.held_out,
        )
        answers = self._answers.serving(stored.serves)
        tasks = {}
        for name, loss in zip(self._session.library.names, losses):
            stats = [
                row_stats(name, prompt, expected, answer)
                for (prompt, expected), answer in zip(self._rows[name], answers[name])
            ]
            score = task_score(name, np.array(stats))
            tasks[name] = {"loss": float(loss), "score": score, "stats": stats}
        return {
            "nbytes": stored.nbytes,
            "share": stored.nbytes / self._session.capacity.total,
            "n_adapters": stored.n_adapters,
            **stored.about,
            "tasks": tasks,
        }


def cases(options):
    """`(seed, budget, method, draw)` of everything asked for, what matters most first."""
    for seed in map(int, options.seeds.split(",")):
        for budget in options.budgets.split(","):
            for method in options.methods.split(";"):
                for draw in range(min(DRAWN.get(method, 1), options.draws)):
                    yield seed, budget, method, draw


def claim(options, *directories):
    """Make directories; what is kept there is of one library, base model and test rows.

    Raises:
        SystemExit: one has been used with others; in one line.
    """
    now = {"model": options.model, "tests": options.tests}
    # One that is trained or drawn anew at the same place is another.
    now |= {name: hash_tree(options.library / name) for name in ("adapters", "tasks")}
    for directory in directories:
        path = directory / SETTINGS
        if not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            write_json(path, now)
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != now:
            raise SystemExit(f"{path}: found {before}, expected {now}; take another directory")


def place(options, seed, budget, method, draw):
    """The file of a row."""
    return options.rows / file_name(method, budget, seed, draw, options.examples)


def file_name(*parts):
    """The file of the row that these parts name."""
    return "-".join(map(str, parts)).replace(", ", "-").replace(" ", "-") + ".json"


def write_row(path, row):
    """In one line, with the machine that measured it."""
    write_text(path, json.dumps(row | {"machine": machine()}, allow_nan=False) + "\n")


def session_of(options, seed):
    """The run of a seed up to its losses."""
    name = f"{seed}-{options.examples}"
    tasks = probes_of(options.library, seed, options.examples, options.work / f"tasks-{name}")
    config = RunConfig(
        adapters=str(options.library / "adapters"), tasks=str(tasks),
        output=str(options.work / f"run-{name}"), budget=f"{options.budgets.split(',')[0]}%",
        probe_examples=options.examples, test_examples=options.tests, seed=seed,
        model=options.model,
    )  # fmt: skip
    return run(config, until="probe")


def write(path, about, row, seconds):
    """A row of the experiment."""
    write_row(path, about | row | {"seconds": seconds})
    score = np.mean([one["score"] for one in row["tasks"].values()])
    loss = np.mean([one["loss"] for one in row["tasks"].values()])
    print(*about.values(), f"{row['share']:.2%} score {score:.2f} loss {loss:.4f} {seconds} s",
          flush=True)  # fmt: skip


def measure_seed(options, seed, wanted):
    """Measure the rows of one seed that are missing."""
    session = session_of(options, seed)
    judge = Judge(session, options.work / "answers")
    ends = {
        FLOOR: Stored(dict.fromkeys(session.library.names), 0, 0, {}),
        CEILING: Stored(
            dict(zip(session.library.names, session.library.adapters)),
            session.capacity.total,
            len(session.library.names),
            {},
        ),
    }
    for name, stored in ends.items():
        path, started = options.rows / f"{name}.json", time.perf_counter()
        if not path.exists():
            row = judge.row(stored)
            write(path, {"method": name}, row, round(time.perf_counter() - started, 1))
    rooms = {
        budget: session.capacity.room(parse_budget(f"{budget}%"))
        for budget in options.budgets.split(",")
    }
    began = time.perf_counter()
    for done, (budget, method, draw) in enumerate(wanted, 1):
        started = time.perf_counter()
        with session.library.scorer.progress.section(f"{method}, {budget}%"):
            if METHODS[method] is None:
                stored = planned(session, method, rooms[budget])
            else:
                allowed = int(session.capacity.total * float(budget) / 100)
                stored = merged(session, *METHODS[method], allowed, 1000 * seed + draw)
            row = judge.row(stored)
        about = {"method": method, "budget": f"{budget}%", "seed": seed, "draw": draw,
                 "examples": options.examples}  # fmt: skip
        now = time.perf_counter()
        write(place(options, seed, budget, method, draw), about, row, round(now - started, 1))
        left = (now - began) / done * (len(wanted) - done) / 3600
        print(f"{done} of {len(wanted)} rows of seed {seed}, about {left:.1f} h left", flush=True)


def summary(options):
    """The content of results/experiment.json: all rows, without statistics of single test rows."""
    files = sorted(set(options.rows.glob("*.json")) - {options.rows / SETTINGS})
    rows = [json.loads(file.read_text("utf-8")) for file in files]
    rows = [row for row in rows if row.get("examples") in (None, options.examples)]
    stats = {
        id(row): {task: np.array(one["stats"]) for task, one in row["tasks"].items()}
        for row in rows
    }
    (ceiling,) = (row for row in rows if row["method"] == CEILING)
    pairs = list(paired(rows, stats))
    for row in rows:
        if row["method"] not in (CEILING, FLOOR):
            row["against_individual"] = paired_bootstrap(stats[id(row)], stats[id(ceiling)])
        ours = [
            one for one in rows
            if one["method"] == "auto" and row["method"] not in ("auto", CEILING, FLOOR)
            and (one["budget"], one["seed"]) == (row["budget"], row["seed"])
        ]  # fmt: skip
        if ours:
            row["auto_against_it"] = paired_bootstrap(stats[id(ours[0])], stats[id(row)])
    for row in rows:
        # A plan has own adapters, most of them alone.
        if METHODS.get(row["method"]) and len(row.get("clusters", [])) > 1:
            row["follows"] = follows(row["clusters"])
        row["tasks"] = {
            task: [round(one["loss"], 5), round(one["score"], 3)]
            for task, one in row["tasks"].items()
        }
    settings = {name: getattr(options, name) for name in ("examples", "tests", "draws")}
    return {"settings": settings, "metrics": METRIC_OF, "rows": rows, "pairs": pairs}


def paired(rows, stats):
    """Yield the `PAIRS` at every budget at which both are measured, their draws pooled."""
    for budget in dict.fromkeys(row["budget"] for row in rows if "budget" in row):
        there = [row for row in rows if row.get("budget") in (None, budget)]
        for names in PAIRS:
            ours, theirs = ([row for row in there if row["method"] == name] for name in names)
            both = [(a, b) for a in ours for b in theirs if b.get("seed") in (None, a["seed"])]
            if both:
                found = pooled_bootstrap([(stats[id(a)], stats[id(b)]) for a, b in both])
                seeds = sorted({a["seed"] for a, _ in both})
                about = {"budget": budget, **dict(zip(("method", "beside"), names))}
                yield {**about, "seeds": seeds, **found}


def main():
    """Measure what is missing, write all of it."""
    parser = command_line(__doc__, __spec__, "experiment.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="kept, and used again")
    parser.add_argument("--rows", type=Path, help="kept, and used again; default: WORK/rows")
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--budgets", default="12.5,6.25,3,25,1.5", help="percent")
    parser.add_argument("--seeds", default="0,1,2", help="each takes other probe rows")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--examples", type=int, default=10, help="probe rows per task")
    parser.add_argument("--tests", type=int, default=20, help="test rows per task")
    parser.add_argument("--draws", type=int, default=10, help="at most, of methods that are drawn")
    parser.add_argument("--list", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.rows = options.rows or options.work / "rows"
    claim(options, options.work, options.rows)
    os.environ.setdefault("D2C_MLX_CACHE", str(options.work / "cache"))
    missing = [one for one in cases(options) if not place(options, *one).exists()]
    for seed in dict.fromkeys(seed for seed, *_ in missing):
        if not options.list:
            measure_seed(options, seed, [case for own, *case in missing if own == seed])
            write_json(options.output, summary(options))
    write_json(options.output, summary(options))


if __name__ == "__main__":
    main()
