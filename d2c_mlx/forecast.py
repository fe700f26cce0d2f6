"""Forecasts for `d2c-mlx run --dry-run`: the work of a run, and about how long it takes.

Work is counted in tokens that pass through the model, and time is that of as many tokens on this
machine, measured in a second or two. Linear algebra beside them is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from d2c_mlx.cluster.search import MOST_FAILED, STRENGTHS
from d2c_mlx.evaluate.answers import max_answer_tokens
from d2c_mlx.merge.library import Library
from d2c_mlx.models.tasks import AT_ONCE
from d2c_mlx.pipeline import STAGES
from d2c_mlx.refine.refine import TrainOptions
from d2c_mlx.run.config import ANSWERED_ROWS, RANDOM_PARTITIONS, RunConfig
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.run.run import Run

__all__ = ["Forecast", "StageForecast", "forecast"]

# Passes over the calibration rows. For a plan teacher targets take three, the gains of modules too,
# and four forms are rounded and measured about twice; a layer-wise merge runs the members and
# itself and then solves; the paper's loop measures about five partitions.
_PLAN, _LAYERWISE, _PAPER = 14, 4, 20
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
        nbytes: most bytes of the pack.
        adapters: adapters of the pack, None where a plan chooses.
        tokens_per_second: measured on the base model, on this machine.
    """

    stages: Sequence[StageForecast]
    nbytes: int
    adapters: int | None
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        """About how long the stages that are not done take."""
        return sum(stage.seconds for stage in self.stages)


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
    library, capacity = run.inputs.library, run.inputs.capacity
    rate, tokens = _rate(library), _tokens(run.inputs) if library.tasks else {}
    stages = []
    for name in run.stages(until):
        library = STAGES[name](run, library)
        n_tokens = round(tokens.get(name, 0)) if name in run.left else 0
        seconds = n_tokens / rate if n_tokens else 0.0
        stages.append(StageForecast(name, name not in run.left, n_tokens, seconds))
    slots = None if run.planned else capacity.n_clusters
    # Merges of a higher rank than the adapters' may take more than all of them.
    largest = max(capacity.nbytes_of_rank(capacity.merge_rank), *capacity.sizes)
    nbytes = capacity.max_bytes or (slots or 0) * largest
    if capacity.max_bytes or slots == len(library.names):
        nbytes = min(nbytes, capacity.total)
    return Forecast(stages, nbytes, slots, rate)


def _rate(library: Library) -> float:
    """Tokens per second of the base model on the first sets, for at least a second."""
    sets = [part for rows in library.calibration for part in rows.parts]
    if not sets:
        return 0.0
    engine = library.scorer.engine
    list(engine.run([(None, sets[0])]))  # the first pass prepares kernels
    done, started = 0, time.perf_counter()
    for i in range(0, len(sets), 4):
        list(engine.run([(None, part) for part in sets[i : i + 4]]))
        done += sum(part.n_tokens for part in sets[i : i + 4])
        if time.perf_counter() - started > 1:
            break
    return done / (time.perf_counter() - started)


def _tokens(inputs: Inputs) -> dict[str, float]:
    """Stage -> tokens that pass through the model."""
    c, library = inputs.config, inputs.library
    n = len(library.names)
    k = n if c.budget.in_bytes else inputs.capacity.n_clusters
    probe = sum(rows.n_tokens for rows in library.calibration)
    tests = sum(rows.n_tokens for rows in library.held_out)
    # Clusters are not known yet; in some of about equal size so many tasks are merged.
    learnt = sum(task.calibration_and_extra.n_tokens for task in library.tasks)
    merging = _LAYERWISE * learnt * min(n, 2 * (n - k)) / n
    # Each step of refining runs some rows of a task, and as many answers to prompts.
    step = 0.0
    for task in library.tasks:
        for rows in filter(None, (task.calibration, task.extra)):
            step += min(TrainOptions.rows, len(rows.examples)) * rows.n_tokens / len(rows.examples)
    baselines = () if c.budget.in_bytes else c.baselines
    n_partitions = sum(RANDOM_PARTITIONS if name == "random" else 1 for name in baselines)
    # A batch of answers takes as many steps as its longest, under each adapter. The base model,
    # which knows no end, is cut; adapters end where the rows do.
    asked = [rows.examples[:ANSWERED_ROWS] for rows in library.held_out]
    longest = sum(max((row.n_targets for row in rows), default=0) for rows in asked)
    cut = max((max_answer_tokens(row) for rows in asked for row in rows), default=0)
    prompts = [part for rows in inputs.prompts.values() for part in rows.asked.values()]
    n_batches = sum(-(-len(part) // AT_ONCE) for part in prompts)
    searching = (_PAPER if c.search == "paper" else 2 + MOST_FAILED) * probe
    return {
        "answer": _STEP_TOKENS * _OWN_STEPS * n_batches,
        "probe": (2 + len(STRENGTHS)) * probe,
        "plan": _PLAN * probe,
        "cluster": searching if k < n else 0,
        "merge": merging,
        "refine": _STEP * TrainOptions.steps * step if c.refine else 0,
        # Base, adapters and pack beside the baselines.
        "bench": (3 + c.refine + n_partitions) * tests
        + n_partitions * merging
        + _STEP_TOKENS * (2 * longest + cut),
    }
