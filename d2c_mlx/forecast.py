"""Forecasts for `d2c-mlx run --dry-run`: the work of a run, and about how long it takes.

Work is counted in tokens that pass through the model, and time is that of as many tokens on this
machine, measured in a second or two. Linear algebra beside them is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from d2c_mlx.cluster.estimates import STRENGTHS
from d2c_mlx.cluster.partition import Members, groups_of, merge_all, random_partition
from d2c_mlx.cluster.search import MOST_FAILED
from d2c_mlx.evaluate.answers import max_answer_tokens
from d2c_mlx.merge.library import Library
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.make_rows import AT_ONCE
from d2c_mlx.pipeline import STAGES
from d2c_mlx.refine.refine import RefineOptions
from d2c_mlx.run.config import ANSWERED_ROWS, RANDOM_PARTITIONS, RunConfig
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.run.run import Run

__all__ = ["Forecast", "StageForecast", "forecast"]

# Passes over the calibration rows, beside those that are counted one by one. Teacher targets take
# three, the gains of modules too; a layer-wise merge runs the members and itself and then solves; a
# form is rounded and measured about twice; the paper's loop measures about five partitions.
_TEACHER, _GAINS, _LAYERWISE, _FORMS, _PAPER = 3, 3, 4, 8, 20
# A step of refining runs forwards and backwards.
_STEP = 3
# A step of answers takes about as long as so many tokens of prompts.
_STEP_TOKENS = 20
# Steps of an adapter's own answers, which nobody knows before.
_OWN_STEPS = 100


@dataclass(frozen=True)
class StageForecast:
    """One stage of a run.

    Attributes:
        name: name of the stage.
        done: True if it is done already, and will not be repeated.
        tokens: tokens that pass through the model, 0 if it is done.
        seconds: about how long they take here.
    """

    name: str
    done: bool
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """The work of a run that is not done yet.

    Attributes:
        stages: the stages in their order.
        evaluations: about how many times an adapter is evaluated on all rows of one task.
        nbytes: most bytes of the pack.
        adapters: adapters of the pack, None where a plan chooses.
        tokens_per_second: measured on the base model, on this machine.
    """

    stages: Sequence[StageForecast]
    evaluations: int
    nbytes: int
    adapters: int | None
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        """About how long the stages that are not done take."""
        return sum(one.seconds for one in self.stages)


def forecast(config: RunConfig, until: str = "report", inputs: Inputs | None = None) -> Forecast:
    """Load and check all inputs, and estimate the run; nothing is written.

    Args:
        config: options of the run.
        until: name of the last stage.
        inputs: loaded for these options already; None loads them.

    Raises:
        InputError: bad input, all problems at once.
    """
    run = Run(config, inputs=inputs, dry=True)
    inputs = run.inputs
    library, rate, stages = inputs.library, _rate(inputs.library), []
    for name in run.stages(until):
        library = STAGES[name](run, library)
        asked = library.tasks and name in run.left and name in _WORK
        work = round(_WORK[name](inputs)) if asked else 0
        seconds = work / rate if work else 0.0
        stages.append(StageForecast(name, name not in run.left, work, seconds))
    n_tokens = sum(one.tokens for one in stages)
    evaluations = n_tokens * len(library.names) / max(1, _probe_tokens(inputs))
    capacity = inputs.capacity
    slots = None if run.planned else capacity.n_clusters
    # Merges of a higher rank than the adapters' may take more than all of them.
    nbytes = capacity.max_bytes or (slots or 0) * capacity.largest
    if capacity.max_bytes or slots == len(library.names):
        nbytes = min(nbytes, capacity.total)
    return Forecast(stages, round(evaluations), nbytes, slots, rate)


def _rate(library: Library) -> float:
    """Tokens per second of the base model on the first sets, for at least a second."""
    sets: list[ExampleSet] = [part for rows in library.calibration for part in rows.parts]
    if not sets:
        return 0.0
    list(library.scorer.engine.run([(None, sets[0])]))  # the first pass prepares kernels
    done, started = 0, time.perf_counter()
    for i in range(0, len(sets), 4):
        list(library.scorer.engine.run([(None, one) for one in sets[i : i + 4]]))
        done += sum(one.n_tokens for one in sets[i : i + 4])
        if time.perf_counter() - started > 1:
            break
    return done / (time.perf_counter() - started)


def _probe_tokens(inputs: Inputs) -> int:
    return sum(rows.n_tokens for rows in inputs.library.calibration)


def _answer(inputs: Inputs) -> float:
    asked = [rows for task in inputs.prompts.values() for rows in (task.prompts, task.test_prompts)]
    batches = sum(-(-len(rows) // AT_ONCE) for rows in asked)
    return float(_STEP_TOKENS * _OWN_STEPS * batches)


def _probe(inputs: Inputs) -> float:
    return (2 + len(STRENGTHS)) * float(_probe_tokens(inputs))


def _plan(inputs: Inputs) -> float:
    return (_TEACHER + _GAINS + _FORMS) * _probe_tokens(inputs)


def _cluster(inputs: Inputs) -> float:
    passes = _PAPER if inputs.config.search == "paper" else 2 + MOST_FAILED
    return (
        passes * _probe_tokens(inputs)
        if inputs.capacity.n_clusters < len(inputs.library.names)
        else 0.0
    )


def _merge(inputs: Inputs) -> float:
    # K-Means and D2C are not known yet.
    return _merging(inputs, [_about_equal(inputs)])


def _merging(inputs: Inputs, partitions: Iterable[Sequence[Members]]) -> float:
    """Tokens of the layer-wise merges of some partitions; each cluster is merged once."""
    tokens = [task.calibration_and_extra.n_tokens for task in inputs.library.tasks]
    clusters = {members for groups in partitions for members in groups if len(members) > 1}
    return _LAYERWISE * float(sum(tokens[i] for members in clusters for i in members))


def _about_equal(inputs: Inputs) -> list[Members]:
    n, k = len(inputs.library.names), inputs.capacity.n_clusters
    return groups_of([i * k // n for i in range(n)])


def _refine(inputs: Inputs) -> float:
    """Each step runs some rows of a task, and as many answers to prompts."""
    step = 0.0
    for task in inputs.library.tasks:
        for rows in filter(None, (task.calibration, task.extra)):
            step += min(RefineOptions.rows, len(rows.examples)) * rows.n_tokens / len(rows.examples)
    return _STEP * RefineOptions.steps * step


def _bench(inputs: Inputs) -> float:
    c, tests = inputs.config, [rows.n_tokens for rows in inputs.library.held_out]
    partitions = [] if c.budget.in_bytes else _baselines(inputs)
    served = {members for groups in partitions for members in groups}
    # Base, adapters and pack; what is merged or served twice is measured once.
    held_out = (3 + c.refine) * sum(tests) + sum(tests[i] for members in served for i in members)
    return held_out + _merging(inputs, partitions) + _STEP_TOKENS * _answer_steps(inputs)


def _baselines(inputs: Inputs) -> list[list[Members]]:
    c, n, k = inputs.config, len(inputs.library.names), inputs.capacity.n_clusters
    found = {
        "kmeans": [_about_equal(inputs)],
        "random": [random_partition(n, k, c.seed + i).groups for i in range(RANDOM_PARTITIONS)],
        "merge-all": [merge_all(n).groups],
    }
    return [groups for name in c.baselines for groups in found[name]]


def _answer_steps(inputs: Inputs) -> int:
    """Steps of the answers: a batch takes as many as its longest, under each adapter.

    The base model, which knows no end, is cut; adapters end where the rows do.
    """
    asked = [one.examples[:ANSWERED_ROWS] for one in inputs.library.held_out]
    longest = [max((row.n_targets for row in rows), default=0) for rows in asked]
    base = max((max_answer_tokens(row) for rows in asked for row in rows), default=0)
    return 2 * sum(longest) + base


_WORK: Mapping[str, Callable[[Inputs], float]] = {
    "answer": _answer, "probe": _probe, "plan": _plan, "cluster": _cluster, "merge": _merge,
    "refine": _refine, "bench": _bench,
}  # fmt: skip
