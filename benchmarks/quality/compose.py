"""One adapter for a task that has none, composed of the others: one task left out at a time.

    python -m benchmarks.quality.compose --library DIR [--tasks gec-de,num-fr] [--draws 0,1]
        [--methods "best;fresh"] [--answers 10]

Ten rows of the task's probe.jsonl (draw 0: the first, draw 1: the next) make an adapter by every
method; 30 held-out rows judge it, beside the base model and the task's real adapter, which nothing
else sees. *Score* is chrF of greedy answers to the first of them. Seconds are those of the method
with cross-validation and refit, without what an earlier method of the list has trained or measured.
Resumes task by task.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.tables.pages import show
from d2c_mlx.compose.cross_validation import choose, cross_validate, join, split
from d2c_mlx.compose.methods import AUTO, METHODS
from d2c_mlx.compose.new_task import Kept, NewTask
from d2c_mlx.evaluate.answers import answer_rows
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.evaluate.heldout import BenchMethod
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.evaluate.metrics import answer_metrics
from d2c_mlx.models.tasks import load_task
from d2c_mlx.serve.router import fit_router
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.files import write_json

N_ROWS = 10
# A task of each kind in turn.
TASKS = "num-de,qa-fr,gec-es,date-en,reply-de,summ-en,num-fr,gec-de"


def similarity(base, library, sets, rows):
    """Cosines of the new prompts' mean state with every task of the library."""
    router = fit_router(base.model, sets)
    states = router.states(base.model, [one.prompt_tokens for one in rows.examples])
    found = {one.task: one.similarity for one in router.matches(states.mean(axis=0), len(sets))}
    return np.array([found[one.name] for one in library])


def composed(task, rows, names):
    """Adapter, score by cross-validation and seconds of every method."""
    folds, made, scores, seconds = split(rows), {}, {}, {}
    for name in names:
        started = time.perf_counter()
        scores |= cross_validate(task, {name: METHODS[name]}, folds)
        one = METHODS[name].make(task, join(folds), scores[name].choice)
        made[name] = replace(one, name=task.name).uniform(task.base.dtype)
        seconds[name] = time.perf_counter() - started
    return made, scores, seconds


def measure(evaluator, adapters, sets, name, draw, options):
    """The row of one task and draw."""
    base = evaluator.runner.base
    read = load_task(options.library / "tasks" / name)
    rows = base.encode(name, read.probe[draw * N_ROWS : (draw + 1) * N_ROWS])
    tests = base.encode(name, read.test[: options.tests])
    library = [one for one in adapters if one.name != name]
    near = similarity(base, library, [one for one in sets if one.task != name], rows)
    task = NewTask(name, base, evaluator, library, near, kept=Kept(cache_directory() / "trained"))
    made, scores, seconds = composed(task, rows, options.methods)
    (real,) = [one for one in adapters if one.name == name]
    judged = {"base": None, "real": real, **made}
    losses = dict(zip(judged, np.concatenate(
        evaluator.losses([(one, [tests]) for one in judged.values()]))))  # fmt: skip
    chrf = {}
    if options.answers:
        methods = {key: BenchMethod(0, [{name: one}]) for key, one in judged.items()}
        answers = answer_rows(base, methods, [(read.test[: options.answers], tests)])
        chrf = {key: one["chrf"] for key, one in answer_metrics(answers, list(judged)).items()}
    chosen = choose({key: one for key, one in scores.items() if key in AUTO})
    parts = {key: {"loss": losses[key], "excess": losses[key] - losses["real"],
                   "chrf": chrf.get(key)} for key in judged}  # fmt: skip
    for key in made:
        score = scores[key]
        parts[key] |= {"expected": score.loss, "choice": score.choice, "seconds": seconds[key]}
    # `auto` trains all that it compares, which is what it takes.
    total = sum(seconds[key] for key in made if key in AUTO)
    return {"task": name, "draw": draw, "auto": chosen, "seconds": total, "methods": parts}


def main():
    """Measure what is missing, print all of it."""
    parser = command_line(__doc__, __spec__, "compose.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--draws", default="0,1")
    parser.add_argument("--methods", default=";".join(AUTO), help="separated by semicolons")
    parser.add_argument("--tests", type=int, default=30)
    parser.add_argument("--answers", type=int, default=10)
    options = parser.parse_args()
    options.methods = [name for name in METHODS if name in options.methods.split(";")]
    found = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    base, adapters, _, sets = load_library(options.library, N_ROWS)
    evaluator = Evaluator(Engine(base), LossCache(cache_directory() / "losses.sqlite"))
    for draw in map(int, options.draws.split(",")):
        for name in options.tasks.split(","):
            there = [row for row in found["rows"] if (row["task"], row["draw"]) == (name, draw)]
            if there and set(options.methods) <= there[0]["methods"].keys():
                continue
            row = measure(evaluator, adapters, sets, name, draw, options)
            rows = [one for one in found["rows"] if one not in there]
            found = {"machine": machine(), "rows": [*rows, row]}
            write_json(options.output, found)
            best = min(row["methods"].items(), key=lambda one: one[1]["loss"] if one[0] != "real"
                       else np.inf)  # fmt: skip
            print(f"{name} {draw}: auto {row['auto']} {row['methods'][row['auto']]['excess']:.3f},"
                  f" {best[0]} {best[1]['excess']:.3f}, {row['seconds']:.0f} s",
                  flush=True)  # fmt: skip
    show("compose", compose=found)


if __name__ == "__main__":
    main()
