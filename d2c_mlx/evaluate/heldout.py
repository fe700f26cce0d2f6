"""Held-out losses of every method, at the bytes it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.examples import ExampleSet

__all__ = ["BenchMethod", "bench_methods", "method_losses", "paired_bootstrap", "row_losses"]


@dataclass(frozen=True)
class BenchMethod:
    """One row of a comparison: which adapter serves each task, and at how many bytes.

    Attributes:
        nbytes: bytes of all adapter files.
        variants: each maps task -> the adapter that serves it, or None for the bare base model.
            Losses are means over variants: `random` has several partitions, all others one.
    """

    nbytes: int
    variants: Sequence[Mapping[str, Adapter | None]]


def method_losses(scorer: Scorer, method: BenchMethod, tests: Sequence[ExampleSet]) -> np.ndarray:
    """Mean NLL per target token of one method on every task, `(n_tasks,)` in nats.

    `bench_methods` compares several methods, on the held-out rows `tests` of every task.
    """
    columns = []
    for variant in method.variants:
        jobs = [(variant[test.task], [test]) for test in tests]
        columns.append(np.concatenate(scorer.losses(jobs, in_parts=True)))
    return np.mean(columns, axis=0)


def bench_methods(
    scorer: Scorer, methods: Mapping[str, BenchMethod], tests: Sequence[ExampleSet]
) -> dict[str, Any]:
    """Compare methods on held-out rows: the `methods` part of `bench.json`.

    For each task there are two measures against its individual adapter. excess = loss - individual,
    in nats per target token, is the strict one. retention = (base - loss) / (base - individual) is
    null where the individual adapter does not beat the base. A method's numbers are means over
    tasks.

    Args:
        scorer: on the base model.
        methods: must have "base"; without "individual" there is no excess and no retention.
        tests: held-out examples of every task.

    Returns:
        Method -> `nbytes`, `loss`, `excess`, `retention`, and `tasks` with the last three by task.
    """
    losses = {name: method_losses(scorer, method, tests) for name, method in methods.items()}
    base = losses["base"]
    # NaN here is null in the file: without an individual adapter nothing is known.
    individual = losses.get("individual", np.full(len(tests), np.nan))
    gain = np.where(base - individual > 1e-6, base - individual, np.nan)

    def number(values: np.ndarray) -> float | None:
        """The mean of the values that are known."""
        numbers = values[~np.isnan(values)]
        return float(numbers.mean()) if len(numbers) else None

    def measures(loss: np.ndarray, excess: np.ndarray, retention: np.ndarray) -> dict[str, Any]:
        return {
            "loss": float(loss.mean()),
            "excess": number(excess),
            "retention": number(retention),
        }

    result = {}
    for name, loss in losses.items():
        columns = loss, loss - individual, (base - loss) / gain
        tasks = {
            test.task: measures(*(column[[i]] for column in columns))
            for i, test in enumerate(tests)
        }
        result[name] = {"nbytes": methods[name].nbytes, **measures(*columns), "tasks": tasks}
    return result


def row_losses(
    engine: Engine, serves: Mapping[str, Adapter | None], tests: Sequence[ExampleSet]
) -> dict[str, np.ndarray]:
    """Losses of single held-out rows, for `paired_bootstrap`.

    What `method_losses` has just measured is not measured again.

    Args:
        engine: the one that measured, so far as this process did.
        serves: task -> the adapter that serves it, None for the base model.
        tests: held-out examples of every task.

    Returns:
        Task -> `(n_rows, 2)`: the NLL of the row's targets in nats, and their number.
    """
    pieces = [(serves[test.task], part) for test in tests for part in test.parts]
    sums, losses = iter(engine.row_sums(pieces)), {}
    for test in tests:
        nll = np.concatenate([next(sums) for _ in test.parts])
        losses[test.task] = np.stack([nll, [row.n_targets for row in test.examples]], axis=1)
    return losses


def paired_bootstrap(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], n: int = 2000, seed: int = 0
) -> dict[str, float | None]:
    """The difference of two packs' losses on the same held-out rows, by resampling the rows.

    Rows are drawn within every task, the same for both; tasks are not drawn, so nothing is said of
    other tasks. Source: https://aclanthology.org/W04-3250.

    Args:
        ours: task -> `(n_rows, 2)`, see `row_losses`.
        theirs: the same tasks and rows.
        n: number of resamples.
        seed: seed of the draws.

    Returns:
        `difference`: our loss less theirs, in nats per target token, the mean over tasks; below 0
        ours is better. `low`, `high`: its 2.5 and 97.5 % quantiles over resamples. `p`: the share
        of resamples in which ours is not better. These three are None where a task has fewer than
        two rows, which would be the same in every resample.
    """
    rng = np.random.default_rng(seed)
    difference, drawn = 0.0, np.zeros(n)
    for task in sorted(ours):
        a, b = ours[task], theirs[task]
        counts = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=n)
        for sign, rows in ((1, a), (-1, b)):
            difference += sign * float(rows[:, 0].sum()) / float(rows[:, 1].sum()) / len(ours)
            sums = counts @ rows
            drawn += sign * sums[:, 0] / sums[:, 1] / len(ours)
    if min(map(len, ours.values())) < 2:
        return {"difference": difference, "low": None, "high": None, "p": None}
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {
        "difference": difference,
        "low": float(low),
        "high": float(high),
        "p": float((drawn >= 0).mean()),
    }
