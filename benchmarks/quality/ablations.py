"""The worth of each choice inside D2C, on the library of the experiment, at one budget.

    python -m benchmarks.quality.ablations --library DIR --work DIR [--budget 12.5] [--seeds 0,1,2]
        [--cases "agreement;examples: 3, mean"] [--rows DIR] [--list]

- `examples`: 1, 3, 5, 10, 20 probe rows per task decide.
- `init`, `restarts`: starts of the paper's loop, and how many from single adapters, the first of
  which is drawn. Other starts and the search by moves are gone (`PAST`); rows of before are still
  shown.
- `score`: the paper's loop, from K-Means, four rounds at most, asks for the loss or for the task's
  metric of greedy answers to the probes.
- `agreement`: how often the cluster that is best for a task on its probes is so on its test rows.

DIR and the work directory are those of experiment.py, and so are seeds: each takes other probe rows
of every task, never test rows. Tasks of 40 probe rows have 20 of them for two seeds only, which is
said. Judged by held-out excess, in nats per target token, and by task metrics of greedy answers.
Resumes case by case: rows are kept as those of experiment.py are, in a directory beside them, and
what was measured of all cases is in results/ablations.json; `--list` only writes that.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.common import ends
from benchmarks.quality.answering import Answers
from benchmarks.quality.experiment import Judge, claim, file_name, session_of, write_row
from benchmarks.quality.methods import (
    PAPER,
    by_d2c,
    by_estimates,
    by_features,
    follows,
    merged,
    restarted,
)
from benchmarks.quality.metrics import row_stats, task_score
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods, prompt_and_expected
from d2c_mlx.evaluate.scorer import LossTable
from d2c_mlx.utils.files import write_json

# Answers to all probes under every merge take minutes a round.
FROM_KMEANS = by_d2c(init=("kmeans",), rounds=4)
INITS = ("adapters", "kmeans", "random", "table", "pairs")
# Cases that no code can measure any more, `(case, value)`: their rows are kept.
PAST = {
    *(("init", one) for one in ("random", "table", "pairs")),
    ("agreement", "D2C, moves, mean"), ("agreement", "D2C, moves, RegMean++"),
    *(("examples", f"{n}, moves") for n in (1, 3, 5, 10, 20)),
}  # fmt: skip


def judged(session, stored):
    """Held-out rows of what is stored."""
    methods = {
        **ends(session),
        "it": BenchMethod(stored.nbytes, [stored.serves]),
    }
    found = bench_methods(session.library.scorer, methods, session.library.held_out)["it"]
    kept = {key: found[key] for key in ("excess", "kept")}
    return kept | stored.about | {"follows": follows(stored.about["clusters"])}


def agreement(session, stored):
    """Which cluster serves a task best: by its probes, and by its test rows."""
    adapters = list({one.digest: one for one in stored.serves.values()}.values())
    table, held_out = (
        np.stack(session.library.scorer.losses([(one, sets) for one in adapters]), axis=1)
        for sets in (session.library.calibration, session.library.held_out)
    )
    chosen, best, rows = (
        table.argmin(axis=1),
        held_out.argmin(axis=1),
        np.arange(len(session.library.names)),
    )
    own = np.array([adapters.index(stored.serves[name]) for name in session.library.names])
    cost = held_out[rows, chosen] - held_out[rows, best]
    return {
        "agree": float((chosen == best).mean()),
        "costs": float(cost.mean()),
        # That a task is best served where its own adapter is.
        "own_is_best": float((own == best).mean()),
    }


def by_metric(session, directory):
    """The loop of the paper, from K-Means, on 1 - score of answers to the probes."""
    answers = Answers(
        directory,
        session.library.calibration,
        session.config.model,
        session.library.scorer.engine.workers,
    )
    n = session.config.probe_examples
    rows = {
        task.name: [tuple(prompt_and_expected(row).values()) for row in task.probe[:n]]
        for task in [task.rows for task in session.library.tasks]
    }

    def cost(name, found):
        stats = [row_stats(name, *pair, answer) for pair, answer in zip(rows[name], found)]
        return 1 - task_score(name, np.array(stats)) / 100

    def costs(jobs):
        found = []
        for adapter, tasks in jobs:
            names = [session.library.names[i] for i in tasks]
            texts = answers.of(adapter, names)
            found.append(np.array([cost(name, texts[name]) for name in names]))
        return found

    def partition(problem, adapters, k, seed):
        everything = list(range(problem.n))
        (base,) = costs([(None, everything)])
        own = np.array([costs([(one, [i])])[0][0] for i, one in enumerate(adapters)])

        def measure(jobs):
            tasks = [list(some) for _, some in jobs]
            return [LossTable((), own[some], base[some]).regret(found)
                    for found, some in zip(costs(jobs), tasks)]  # fmt: skip

        return FROM_KMEANS(replace(problem, measure=measure), adapters, k, seed)

    return partition


# `(case, value, probe rows, partition, merge method)`; None: `by_metric`.
CASES = (
    ("agreement", "K-Means, mean", 10, by_features, "linear"),
    ("agreement", "D2C, mean", 10, PAPER, "linear"),
    ("agreement", "D2C, moves, mean", 10, None, "linear"),
    ("agreement", "D2C, moves, RegMean++", 10, None, "regmean++"),
    ("agreement", "D2C, RegMean++", 10, by_estimates, "regmean++"),
    *(("init", one, 10, by_d2c(init=(one,)), "linear") for one in INITS),
    *(("restarts", str(n), 10, restarted(n), "linear") for n in (1, 3, 5)),
    ("score", "loss", 10, FROM_KMEANS, "linear"),
    ("score", "metric", 10, None, "linear"),
    *(
        ("examples", f"{n}, {name}", n, *how)
        for n in (1, 3, 5, 10, 20)
        for name, how in (
            ("mean", (PAPER, "linear")),
            ("moves", (None, "regmean++")),
            ("estimates", (by_estimates, "regmean++")),
        )
    ),
)


def wanted(text):
    """Cases that are named by themselves, or by `case: value`.

    Raises:
        SystemExit: a name of none; in one line.
    """
    names = text.split(";")
    cases = [one for one in CASES if one[:2] not in PAST]
    known = {name: one for one in cases for name in (one[0], f"{one[0]}: {one[1]}")}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(
            f"--cases: found {', '.join(unknown)}; expected some of {'; '.join(known)}"
        )
    return [one for one in cases if one[0] in names or f"{one[0]}: {one[1]}" in names]


def fewest_probes(library):
    """Probe rows of the task that has fewest."""
    files = (library / "tasks").glob("*/probe.jsonl")
    return min(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def main():
    """Measure what is missing."""
    parser = command_line(__doc__, __spec__, "ablations.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--budget", type=float, default=12.5, help="percent")
    parser.add_argument("--seeds", default="0,1,2", help="each takes other probe rows")
    parser.add_argument("--cases", default="agreement;init;restarts;score;examples")
    parser.add_argument("--tests", type=int, default=20)
    parser.add_argument("--rows", type=Path, help="kept, and used again; default: WORK/rows")
    parser.add_argument("--list", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.rows = options.rows or options.work / "rows"
    claim(options, options.work, options.rows)
    options.budgets = str(options.budget)
    os.environ.setdefault("D2C_MLX_CACHE", str(options.work / "cache"))
    some = wanted(options.cases)
    for seed in () if options.list else map(int, options.seeds.split(",")):
        missing = [one for one in some if not place(options, *one[:2], seed).exists()]
        measure_seed(options, seed, missing)
    write_json(options.output, summary(options))


def place(options, case, value, seed):
    """The file of a row."""
    return options.rows / "ablations" / file_name(case, value, f"{options.budget:g}", seed)


def summary(options):
    """The content of results/ablations.json: all rows at the budget, by case and seed."""
    order = [one[:2] for one in CASES]
    files = (options.rows / "ablations").glob("*.json")
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = [row for row in rows if row["budget"] == options.budget]
    rows.sort(key=lambda row: (order.index((row["case"], row["value"])), row["seed"]))
    return {"rows": rows}


def measure_seed(options, seed, cases):
    """Some cases of one seed."""
    sessions, most = {}, fewest_probes(options.library) // (seed + 1)
    for case, value, n, partition, method in cases:
        if n > most:
            print(f"seed {seed}, {case}: {value}: not measured, too few probe rows", flush=True)
            continue
        started = time.perf_counter()
        options.examples = n
        if n not in sessions:
            sessions[n] = session_of(options, seed)
        session = sessions[n]
        partition = partition or by_metric(session, options.work / f"probe-answers-{seed}")
        allowed = int(session.capacity.total * options.budget / 100)
        # As experiment.py draws first.
        stored = merged(session, partition, method, allowed, 1000 * seed)
        tasks = Judge(session, options.work / "answers").row(stored)["tasks"]
        about = {"case": case, "value": value, "budget": options.budget, "seed": seed,
                 "tests": options.tests}  # fmt: skip
        row = about | judged(session, stored)
        row["score"] = float(np.mean([one["score"] for one in tasks.values()]))
        if case == "agreement":
            row |= agreement(session, stored)
        row["seconds"] = round(time.perf_counter() - started, 1)
        write_row(place(options, case, value, seed), row)
        write_json(options.output, summary(options))
        print(f"seed {seed}, {case}: {value}: excess {row['excess']:.4f}, {row['seconds']} s",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
