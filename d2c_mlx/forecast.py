"""What a run will do and about how long it takes, before it does it: `d2c-mlx run --dry-run`.

Work is counted in tokens that pass through the model, and time is that of as many tokens on this
machine, measured in a second or two. Linear algebra beside them is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from d2c_mlx.cluster.completion import others_needed
from d2c_mlx.cluster.estimated_search import MOST_FAILED
from d2c_mlx.cluster.merge_estimates import STRENGTHS
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.pipeline import STAGES
from d2c_mlx.run.config import RunConfig, stages_of
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.run.records import Record
from d2c_mlx.run.session import Session

__all__ = ["Forecast", "StageForecast", "forecast"]

# Passes over the calibration rows, beside those that are counted one by one. Teacher targets take
# three and the gains of modules six; the layer-wise merge runs members once and each of two merges
# in parts; a form is measured twice; moves try about five partitions.
_TEACHER, _GAINS, _LAYERWISE, _FORMS, _MOVES = 3, 6, 7, 5, 20
# A step of refining runs forwards and backwards.
_STEP = 3


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
    """What a run will do.

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


class _Looking(Session):
    """A session that looks whether a stage is done, and runs none."""

    done = False

    def stage(
        self,
        name: str,
        options: object,
        reads: Sequence[str],
        writes: Sequence[str],
        body: Callable[[], None],
    ) -> None:
        """Compare the stage's record with its inputs and outputs."""
        self.done = Record(self.output, name, options, reads).holds(writes)


def forecast(config: RunConfig, until: str = "report") -> Forecast:
    """Load and check all inputs, and estimate the run; nothing is written.

    Args:
        config: options of the run.
        until: name of the last stage.

    Raises:
        InputError: bad input, all problems at once.
    """
    session = _Looking(config, quiet=True)
    inputs = session.inputs
    rate, done = _rate(inputs), True
    stages, evaluations = [], 0.0
    tokens = sum(one.n_tokens for one in inputs.probes)
    for name in stages_of(config, until):
        if done:  # Every stage after one that is not done is to do.
            STAGES[name](session)
            done = session.done
        work = 0 if done else round(_WORK.get(name, _nothing)(inputs))
        evaluations += work * len(inputs.names) / tokens
        stages.append(StageForecast(name, done, work, work / rate))
    slots = None if config.planned else inputs.capacity.n_clusters
    nbytes = inputs.capacity.max_bytes
    if nbytes is None:
        largest = max(inputs.capacity.nbytes_of_rank(inputs.capacity.merge_rank),
                      *inputs.capacity.sizes)  # fmt: skip
        nbytes = (slots or 0) * largest
    return Forecast(stages, round(evaluations), min(nbytes, inputs.capacity.total), slots, rate)


def _rate(inputs: Inputs) -> float:
    """Tokens per second of the base model on the first sets, for at least a second."""
    sets: list[ExampleSet] = [part for one in inputs.probes for part in one.parts]
    list(inputs.engine.run([(None, sets[0])]))  # the first pass prepares kernels
    done, started = 0, time.perf_counter()
    for i in range(0, len(sets), 4):
        list(inputs.engine.run([(None, one) for one in sets[i : i + 4]]))
        done += sum(one.n_tokens for one in sets[i : i + 4])
        if time.perf_counter() - started > 1:
            break
    return done / (time.perf_counter() - started)


def _probe_tokens(inputs: Inputs) -> int:
    return sum(one.n_tokens for one in inputs.probes)


def _nothing(inputs: Inputs) -> float:
    return 0.0


def _probe(inputs: Inputs) -> float:
    c, n = inputs.config, len(inputs.names)
    if c.planned or c.search == "estimates":
        return (2 + len(STRENGTHS)) * _probe_tokens(inputs)
    others = others_needed(n, c.neighbours, inputs.capacity.n_clusters)
    return (2 + others) * _probe_tokens(inputs)


def _plan(inputs: Inputs) -> float:
    forms = 18 if inputs.config.thorough else _FORMS
    return (_TEACHER + _GAINS + forms) * _probe_tokens(inputs)


def _cluster(inputs: Inputs) -> float:
    passes = _MOVES if inputs.config.search != "estimates" else 2 + MOST_FAILED
    return passes * _probe_tokens(inputs) if inputs.capacity.n_clusters < len(inputs.names) else 0.0


def _merge(inputs: Inputs) -> float:
    return _LAYERWISE * _probe_tokens(inputs) * _merged_share(inputs)


def _merged_share(inputs: Inputs) -> float:
    """Share of the tasks that are merged with others, if clusters are about equal."""
    n, k = len(inputs.names), inputs.capacity.n_clusters
    return min(1.0, (n - k) / k)


def _refine(inputs: Inputs) -> float:
    c = inputs.config
    return _STEP * c.refine_steps * _probe_tokens(inputs) / 4 if c.refine else 0.0


def _bench(inputs: Inputs) -> float:
    c, tests = inputs.config, sum(one.n_tokens for one in inputs.tests)
    merged = 0 if c.planned else len(c.baselines) + ("random" in c.baselines) * (c.random_seeds - 1)
    methods = 3 + merged + (0 if c.planned else 1 if c.refine else 0)
    answers = 3 * sum(one.n_tokens for one in inputs.tests) * c.answers / max(c.test_examples, 1)
    return methods * tests + merged * _merge(inputs) + answers


_WORK: Mapping[str, Callable[[Inputs], float]] = {
    "probe": _probe, "plan": _plan, "cluster": _cluster, "merge": _merge, "refine": _refine,
    "bench": _bench,
}  # fmt: skip
