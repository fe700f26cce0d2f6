"""Greedy answers of merged adapters, beside those of the adapters themselves: what merging forgets.

    python -m benchmarks.quality.scores --library DIR --work DIR [--tests 20] [--case estimates]

`--work` is that of `benchmarks.quality.slots` or `without_rows`: the packs of its runs of a case
are judged, by the metric of each task (metrics.py) on the first held-out rows. Every answer is also
compared with the own adapter's: whether it is the same, how far, and how long it is. Answers are
kept in the work directory, results/scores.json is written after every pack; one of other rows is
not gone on with.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.quality.answering import Answers
from benchmarks.quality.metrics import row_stats, task_score
from benchmarks.tables.pages import show
from d2c_mlx.evaluate.heldout import prompt_and_expected
from d2c_mlx.evaluate.workers import make_workers
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_text


def same_words(answer, own):
    """The share of the words of `own` that an answer has before its first other word."""
    theirs, ours = answer.split(), own.split()
    same = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b),
                min(len(theirs), len(ours)))  # fmt: skip
    return same / max(len(ours), 1)


def stats_of(rows, answers):
    """Task -> of every row what its answer adds to the score."""
    return {
        name: [row_stats(name, *row, answer) for row, answer in zip(some, answers[name])]
        for name, some in rows.items()
    }


def judged(stats, answers, own):
    """Score of every task, and of every row what it is made of and how it leaves `own`."""
    tasks = {}
    for name, some in stats.items():
        pairs = list(zip(answers[name], own[name]))
        tasks[name] = {
            "score": task_score(name, np.array(some)),
            "stats": [[round(x, 4) for x in one] for one in some],
            "is_own": [a == b for a, b in pairs],
            "same_words": [round(same_words(a, b), 3) for a, b in pairs],
            "length": [round(len(a) / max(len(b), 1), 3) for a, b in pairs],
        }  # fmt: skip
    return tasks


def worst(rows, stats, own_stats, answers, own):
    """Prompt, expected, own and merged answer of the row of each task that loses most."""
    found = {}
    for name, some in rows.items():
        lost = [b[0] - a[0] for a, b in zip(stats[name], own_stats[name])]
        i = int(np.argmax(lost))
        if lost[i] > 0:
            found[name] = dict(zip(("prompt", "expected", "own", "merged"),
                                   (*some[i], own[name][i], answers[name][i])))  # fmt: skip
    return found


def cases(options, own):
    """`(case, K, seed, adapter of every task)` of all that is judged."""
    yield "individual", None, None, own
    yield "base", None, None, dict.fromkeys(own)
    for path in sorted(options.work.glob(f"*-*-{options.case}/pack")):
        k, seed, case = path.parent.name.split("-", 2)
        pack = load_pack(path)
        budget = int(k) if k.isdigit() else k
        yield case, budget, int(seed), {name: pack.load(name) for name in own}


def main():
    """Measure what is missing, and print."""
    parser = command_line(__doc__, __spec__, "scores.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--case", default="estimates")
    parser.add_argument("--tests", type=int, default=20)
    options = parser.parse_args()
    base, adapters, paths, _ = load_library(options.library, 1)
    names = [path.name for path in paths]
    tests = {name: load_task(options.library / "tasks" / name).test[: options.tests]
             for name in names}  # fmt: skip
    rows = {name: [tuple(prompt_and_expected(row).values()) for row in some]
            for name, some in tests.items()}  # fmt: skip
    sets = [base.encode(name, some) for name, some in tests.items()]
    answers = Answers(options.work / f"answers-{options.tests}", sets, None, make_workers())
    content = {"tests": options.tests, "machine": machine(), "rows": []}
    if options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if before["tests"] != options.tests:
            raise SystemExit(f"{options.output}: found {before['tests']} tests, expected"
                             f" {options.tests}; give another --output")  # fmt: skip
        content["rows"] = before["rows"]
    there = {(one["case"], one["clusters"], one["seed"]) for one in content["rows"]}
    adapters = dict(zip(names, adapters))
    own = answers.serving(adapters)
    own_stats = stats_of(rows, own)
    for case, k, seed, serves in cases(options, adapters):
        if (case, k, seed) not in there:
            given = answers.serving(serves)
            stats = stats_of(rows, given)
            row = {"case": case, "clusters": k, "seed": seed, "tasks": judged(stats, given, own)}
            lost = worst(rows, stats, own_stats, given, own) if k else {}
            content["rows"].append(row | {"worst": lost})
            write_text(options.output, json.dumps(content, ensure_ascii=False) + "\n")
            scores = [one["score"] for one in row["tasks"].values()]
            print(case, k, seed, f"{np.mean(scores):.2f}", flush=True)
    show("answers", scores=content)


if __name__ == "__main__":
    main()
