"""One adapter for a task that has none, composed of the others: one task left out at a time.

    python -m benchmarks.new_task.compose --library DIR [--tasks gec-de,num-fr] [--draws 0,1]
        [--methods "best;fresh"] [--answers 10]

Ten rows of the task's probe.jsonl (draw 0: the first, draw 1: the next) make an adapter by every
method; 30 held-out rows judge it, beside the base model and the task's real adapter, which nothing
else sees. *Score* is chrF of greedy answers to the first of them, of base, real, `auto`'s choice,
`best` and `fresh`. Seconds are those of the method with cross-validation and refit, without what an
earlier method of the list has trained or measured. Resumes task by task.

`arithmetic` is a method of this script: every task is of a kind and a language, and its update is
the kind's mean over the other languages, plus the language's mean over the other kinds, minus the
mean over both (qa-fr: qa-X + Y-fr - Y-X, for all X and Y), times a scale.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.new_task.controls import CONTROLS
from benchmarks.quality.metrics import answer_metrics
from benchmarks.tables.pages import show
from d2c_mlx.compose.compose import choose, cross_validate, join, split
from d2c_mlx.compose.methods import METHODS, Method, NewTask, find_method
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.heldout import BenchMethod, answer_rows
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.tasks import load_task
from d2c_mlx.plugins import COMPOSE_METHODS, names
from d2c_mlx.serve.router import prompt_states, router_from_states
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.files import write_json

N_ROWS = 10
# A task of each kind in turn.
TASKS = "num-de,qa-fr,gec-es,date-en,reply-de,summ-en,num-fr,gec-de"


def arithmetic_weights(names, new):
    """Weights of `arithmetic`, one per name, which are KIND-LANGUAGE as `new` is."""
    kind, language = new.split("-")
    parts = [name.split("-") for name in names]
    same = [(one == kind, other == language) for one, other in parts]
    counts = {one: same.count(one) for one in set(same)}
    signs = {(True, False): 1, (False, True): 1, (False, False): -1}
    return np.array([signs[one] / counts[one] for one in same])


def arithmetic(task, rows, choice):
    """The method of this script, see above."""
    weights = arithmetic_weights([one.name for one in task.library], task.name)
    return scaled(task.mixed(task.library, weights), choice)


PLUGINS = {name: find_method(name) for name in names(COMPOSE_METHODS)}
ALL = METHODS | PLUGINS | CONTROLS | {"arithmetic": Method(arithmetic, (0.5, 0.7, 1.0))}


def prompts_of(rows):
    """Token ids of every prompt."""
    return [one.prompt_tokens for one in rows.examples]


def similarity(states, name, new):
    """Cosines of the mean state of new prompts `(n, hidden)` with every other task."""
    others = {task: one for task, one in states.items() if task != name}
    router = router_from_states(others, 1)
    found = {one.task: one.similarity for one in router.matches(new.mean(axis=0), len(others))}
    return np.array([found[task] for task in others])


def composed(task, rows, names):
    """Adapter, score by cross-validation and seconds of every method."""
    folds, made, scores, seconds = split(rows), {}, {}, {}
    for name in names:
        started = time.perf_counter()
        scores |= cross_validate(task, {name: ALL[name]}, folds)
        one = ALL[name](task, join(folds), scores[name].choice)
        made[name] = replace(one, name=task.name).uniform(task.base.dtype)
        seconds[name] = time.perf_counter() - started
        print(f"  {name} {scores[name].loss:.3f}, {seconds[name]:.0f} s", flush=True)
    return made, scores, seconds


def judge(scorer, judged, tests, rows, answered):
    """Loss on held-out rows of every adapter, and scores of the answers of some to `rows`."""
    losses = dict(zip(judged, np.concatenate(
        scorer.losses([(one, [tests]) for one in judged.values()]))))  # fmt: skip
    methods = {key: BenchMethod(0, [{tests.task: one}]) for key, one in judged.items()
               if rows and key in answered}  # fmt: skip
    answers = answer_rows(scorer.engine.base, methods, [(rows, tests)] if rows else [])
    found = answer_metrics(answers, list(methods))
    return {key: {"loss": losses[key], **scores(found.get(key, {}))} for key in judged}


def scores(metrics):
    """The two of `answer_metrics` that tables show; None where nothing was answered."""
    return {key: metrics.get(key) for key in ("chrf", "exact_match")}


def measure(scorer, adapters, states, name, draw, options):
    """The row of one task and draw."""
    base = scorer.engine.base
    read = load_task(options.library / "tasks" / name)
    rows = base.encode(name, read.probe[draw * N_ROWS : (draw + 1) * N_ROWS])
    tests = base.encode(name, read.test[: options.tests])
    base.attach(None)
    place = base.n_layers // 2 + 1
    new = prompt_states(base.model, prompts_of(rows), place)
    near = similarity(states, name, new)
    library = [one for one in adapters if one.name != name]
    task = NewTask(name, base, scorer, library, near)
    made, expected, seconds = composed(task, rows, options.methods)
    auto = [key for key in options.methods if key in METHODS]
    chosen = choose({key: expected[key] for key in auto})
    (real,) = [one for one in adapters if one.name == name]
    judged = {"base": None, "real": real, **made}
    answered = {"base", "real", "best", "fresh", chosen} & judged.keys()
    parts = judge(scorer, judged, tests, read.test[: options.answers], answered)
    for part in parts.values():
        part["excess"] = part["loss"] - parts["real"]["loss"]
    for key in made:
        score = expected[key]
        parts[key] |= {"expected": score.loss, "choice": score.choice, "seconds": seconds[key]}
    # `auto` trains all that it compares, which is what it takes.
    total = sum(seconds[key] for key in auto)
    return {"task": name, "draw": draw, "auto": chosen, "seconds": total, "methods": parts}


def main():
    """Measure what is missing, print all of it."""
    parser = command_line(__doc__, __spec__, "compose.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--draws", default="0,1")
    parser.add_argument("--methods", default=";".join((*METHODS, "fresh-random", "arithmetic")),
                        help="separated by semicolons")  # fmt: skip
    parser.add_argument("--tests", type=int, default=30)
    parser.add_argument("--answers", type=int, default=10)
    options = parser.parse_args()
    options.methods = [name for name in ALL if name in options.methods.split(";")]
    found = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    base, adapters, _, sets = load_library(options.library, N_ROWS)
    place = base.n_layers // 2 + 1
    states = {one.task: prompt_states(base.model, prompts_of(one), place) for one in sets}
    scorer = Scorer(Engine(base), LossCache(cache_directory() / "losses.sqlite"))
    for draw in map(int, options.draws.split(",")):
        for name in options.tasks.split(","):
            there = [row for row in found["rows"] if (row["task"], row["draw"]) == (name, draw)]
            if there and set(options.methods) <= there[0]["methods"].keys():
                continue
            row = measure(scorer, adapters, states, name, draw, options)
            rows = [one for one in found["rows"] if one not in there]
            found = {"machine": machine(), "rows": [*rows, row]}
            write_json(options.output, found)
            best = min((key for key in row["methods"] if key != "real"),
                       key=lambda key: row["methods"][key]["loss"])  # fmt: skip
            print(f"{name} {draw}: auto {row['auto']} {row['methods'][row['auto']]['excess']:.3f},"
                  f" {best} {row['methods'][best]['excess']:.3f}, {row['seconds']:.0f} s",
                  flush=True)  # fmt: skip
    show("compose", compose=found)


if __name__ == "__main__":
    main()
