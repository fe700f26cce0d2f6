"""Held-out losses of every method, at the bytes it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.grouping import indices_by_key

__all__ = ["BenchMethod", "bench_methods", "method_losses"]


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


def method_losses(
    evaluator: Evaluator, method: BenchMethod, tests: Sequence[ExampleSet]
) -> np.ndarray:
    """Mean NLL per target token of one method on every task, `(n_tasks,)` in nats.

    `bench_methods` compares several methods.

    Args:
        evaluator: on the base model.
        method: what serves the tasks; the mean over its variants is taken.
        tests: held-out examples of every task.
    """
    columns = []
    for variant in method.variants:
        # One job per adapter: its tasks are then evaluated side by side.
        adapters = [variant[test.task] for test in tests]
        groups = list(indices_by_key(one.digest if one else "base" for one in adapters).values())
        jobs = [(adapters[group[0]], [tests[i] for i in group]) for group in groups]
        losses = np.empty(len(tests))
        for group, values in zip(groups, evaluator.losses_in_parts(jobs)):
            losses[group] = values
        columns.append(losses)
    return np.mean(columns, axis=0)


def bench_methods(
    evaluator: Evaluator, methods: Mapping[str, BenchMethod], tests: Sequence[ExampleSet]
) -> dict[str, Any]:
    """Compare methods on held-out rows: the `methods` part of `bench.json`.

    For each task there are two measures against its individual adapter. excess = loss - individual,
    in nats per target token, is the strict one. retention = (base - loss) / (base - individual) is
    null where the individual adapter does not beat the base. A method's numbers are means over
    tasks.

    Args:
        evaluator: on the base model.
        methods: must have "base"; without "individual" there is no excess and no retention.
        tests: held-out examples of every task.

    Returns:
        Method -> `nbytes`, `loss`, `excess`, `retention`, and `tasks` with the last three by task.
    """
    n_tokens = sum(test.n_tokens for test in tests)
    to_come = sum(len(method.variants) for method in methods.values())
    losses = {}
    for name, method in methods.items():
        evaluator.meter.foresee(to_come * n_tokens)
        losses[name] = method_losses(evaluator, method, tests)
        to_come -= len(method.variants)
    evaluator.meter.foresee(0)
    base = losses["base"]
    # NaN here is null in the file: without an individual adapter nothing is known.
    individual = losses.get("individual", np.full(len(tests), np.nan))
    gain = base - individual
    helped = gain > 1e-6
    result = {}
    for name, loss in losses.items():
        excess = loss - individual
        retention = np.where(helped, (base - loss) / np.where(helped, gain, 1.0), np.nan)
        result[name] = {
            "nbytes": methods[name].nbytes,
            "loss": float(loss.mean()),
            "excess": _number(excess.mean()),
            "retention": _number(retention[helped].mean()) if helped.any() else None,
            "tasks": {
                test.task: {
                    "loss": float(loss[i]),
                    "excess": _number(excess[i]),
                    "retention": _number(retention[i]),
                }
                for i, test in enumerate(tests)
            },
        }
    return result


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
