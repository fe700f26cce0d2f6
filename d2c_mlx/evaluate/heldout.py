"""Held-out quality of every method, at the bytes it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.grouping import alike

__all__ = ["Method", "bench_methods", "measure"]


@dataclass(frozen=True)
class Method:
    """What serves each task under one method: `variants` are averaged (random partitions).

    Attributes:
        nbytes: bytes of all adapter files.
        variants: each maps task -> the adapter that serves it, or None for the bare base model.
    """

    nbytes: int
    variants: Sequence[Mapping[str, Adapter | None]]


def measure(evaluator: Evaluator, method: Method, tests: Sequence[ExampleSet]) -> np.ndarray:
    """`(n_tasks,)` mean NLL per target token, in nats, mean over the method's variants."""
    columns = []
    for variant in method.variants:
        # One job per adapter: its tasks are then evaluated side by side.
        adapters = [variant[test.task] for test in tests]
        groups = list(alike(one.digest if one else "base" for one in adapters).values())
        jobs = [(adapters[group[0]], [tests[i] for i in group]) for group in groups]
        losses = np.empty(len(tests))
        for group, values in zip(groups, evaluator.losses_in_parts(jobs)):
            losses[group] = values
        columns.append(losses)
    return np.mean(columns, axis=0)


def bench_methods(
    evaluator: Evaluator, methods: Mapping[str, Method], tests: Sequence[ExampleSet]
) -> dict[str, Any]:
    """The `methods` part of `bench.json`.

    Of a task: excess = loss - individual (nats per target token; the strict one), retention =
    (base - loss) / (base - individual), null where the individual adapter does not beat the
    base. Of a method: means over tasks.

    Args:
        evaluator: on the base model.
        methods: must have "base"; without "individual" there is no excess and no retention.
        tests: held-out examples of every task.
    """
    losses = {name: measure(evaluator, method, tests) for name, method in methods.items()}
    base = losses["base"]
    # Without an individual adapter nothing is known of it: NaN here, null in the file.
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
