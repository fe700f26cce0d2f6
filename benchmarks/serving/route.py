"""Routing without labels: accuracy on held-out rows, what it costs, and prompts of no task.

    python -m benchmarks.serving.route --library DIR [--pack PACK] [--model MODEL]

Fitted on ten probe prompts per task. *Left out*: the held-out prompts of a task that the router was
not fitted on, which should go to the base model. *Foreign*: prompts of none of the tasks, listed
here. With a pack, also the held-out loss of every row under the adapter that it is routed to,
beside that under its own task's. Seconds are of one prompt alone, after one that is not counted.
"""

import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks import command_line
from benchmarks.common import load_library
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import run_blocks
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.serve.router import fit_router, router_from_states
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json

FOREIGN = (
    "What is the capital of Australia?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Explain photosynthesis to a child.",
    "def fibonacci(n): complete this function",
    "Give me three ideas for a birthday present for my brother.",
    "What is 17 times 23?",
    "Who wrote The Old Man and the Sea?",
    "Translate 'good morning' into Italian.",
    "List the planets of the solar system.",
    "I feel sad today. What can I do?",
    "Write an SQL query that counts users per country.",
    "Why is the sky blue?",
    "Plan a weekend in Lisbon.",
    "Tell me a joke about computers.",
    "What does 'carpe diem' mean?",
    "Wie wird das Wetter morgen in Berlin?",
    "Schreibe ein Gedicht über den Herbst.",
    "Was kostet ein Liter Milch?",
    "¿Cuál es la montaña más alta del mundo?",
    "Cuéntame un cuento corto sobre un dragón.",
    "¿Cómo se hace una tortilla de patatas?",
    "Qui a peint la Joconde ?",
    "Donne-moi une recette de crêpes.",
    "Raconte une blague.",
    "Sort these words by length: pear, fig, banana.",
    "Is it safe to eat raw mushrooms?",
    "Draft an email asking my landlord to fix the heating.",
    "What year did the Berlin Wall fall?",
    "Name a song by the Beatles.",
)


def prompts_of(examples):
    """Token ids up to the answer."""
    return [row.tokens[: row.offset] for row in examples.examples]


def routed(router, states):
    """The task of every state, None below the threshold."""
    best = [router.best(state) for state in states]
    return [one and one.task for one in best]


def share(values):
    """In percent."""
    return 100 * float(np.mean(list(values)))


def left_out(fitted, states, like):
    """The share of every task's held-out prompts that a router without it gives to another task."""
    wrong = []
    for test, own in states.items():
        others = {t: x for t, x in fitted.items() if t != test}
        router = router_from_states(others, like.n_blocks)
        wrong += [task is not None for task in routed(router, own)]
    return share(wrong)


def seconds(base, router, prompts):
    """Medians of routing one prompt, and of its prefill by the whole model."""
    times = []
    for prompt in prompts:
        x = mx.array([prompt])
        pair = []
        for work in (lambda p=prompt: router.best(router.states(base.model, [p])[0]),
                     lambda x=x: mx.eval(run_blocks(base.model, x))):  # fmt: skip
            started = time.perf_counter()
            work()
            pair.append(time.perf_counter() - started)
        times.append(pair)
    return [statistics.median(column) for column in zip(*times[1:])]


def routed_losses(base, pack, tests, found):
    """Mean over tasks of the loss under the routed adapters and under the labelled ones."""
    scorer = Scorer(Engine(base))
    loaded = {task: pack.load(task) for task in pack.tasks}
    rows = []
    for test in tests:
        nll = 0.0
        for task in sorted(set(found[test.task]), key=str):
            some = [x for x, t in zip(test.examples, found[test.task]) if t == task]
            part = ExampleSet(test.task, tuple(some))
            ((loss,),) = scorer.losses([(task and loaded[task], [part])])
            nll += loss * part.n_targets
        ((labelled,),) = scorer.losses([(loaded[test.task], [test])])
        rows.append((nll / test.n_targets, labelled))
    return [float(x) for x in np.mean(rows, axis=0)]


def main():
    """Measure, print, write."""
    parser = command_line(__doc__, __spec__, "route.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--pack", type=Path)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--tests", type=int, default=30)
    options = parser.parse_args()
    base, _, paths, probes = load_library(options.library, 10, model=options.model)
    tests = [
        base.encode(path.name, load_task(options.library / "tasks" / path.name).test)
        for path in paths
    ]
    tests = [ExampleSet(one.task, one.examples[: options.tests]) for one in tests]
    router = fit_router(base.model, probes)
    fitted, states = (
        {one.task: router.states(base.model, prompts_of(one)) for one in sets}
        for sets in (probes, tests)
    )
    found = {task: routed(router, own) for task, own in states.items()}
    rows = [{"prompt": prompt, "completion": "-"} for prompt in FOREIGN]
    foreign = router.states(base.model, prompts_of(base.encode("foreign", rows)))
    nearest = [router.matches(s)[0].task == task for task, own in states.items() for s in own]
    route_s, prefill_s = seconds(base, router, [prompts_of(one)[0] for one in tests])
    result = {
        **environment(),
        "tasks": len(tests), "probes": 10, "tests": options.tests,
        "n_blocks": router.n_blocks, "accuracy": router.accuracy,
        "of_blocks": base.n_layers, "threshold": router.threshold,
        "nearest_is_right": share(nearest),
        "routed_right": share(t == task for task, own in found.items() for t in own),
        "to_the_base": share(t is None for own in found.values() for t in own),
        "left_out_accepted": left_out(fitted, states, router),
        "foreign_accepted": share(t is not None for t in routed(router, foreign)),
        "route_seconds": route_s, "prefill_seconds": prefill_s,
    }  # fmt: skip
    if options.pack:
        losses = routed_losses(base, load_pack(options.pack), tests, found)
        result |= dict(zip(("routed_loss", "labelled_loss"), losses))
    write_json(options.output, result)
    for key in list(result)[-len(result) + len(environment()) :]:
        value = result[key]
        print(f"| {key} | {value:.4f} |" if isinstance(value, float) else f"| {key} | {value} |")


if __name__ == "__main__":
    main()
