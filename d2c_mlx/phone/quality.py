"""Quality of a pack on a quantized base: held-out losses and answers, beside a float base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2c_mlx.evaluate.answers import answer_rows
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.evaluate.metrics import answer_metrics
from d2c_mlx.evaluate.scorer import Runner, Scorer
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.rows import Row
from d2c_mlx.phone.stock_model import StockModel
from d2c_mlx.utils.progress import Progress

__all__ = ["HeldOutRows", "measure_quality"]


@dataclass(frozen=True)
class HeldOutRows:
    """Held-out rows of one task.

    Attributes:
        examples: all of them tokenized, to measure the loss.
        rows: the first of them as read, to be answered.
    """

    examples: ExampleSet
    rows: Sequence[Row]


def measure_quality(
    model: str | None,
    stock: StockModel,
    methods: Mapping[str, BenchMethod],
    tests: Sequence[HeldOutRows],
    bar: Progress,
) -> dict[str, Any]:
    """Measure the `quality` part of a result: what quantizing the base leaves of a pack's gain.

    Args:
        model: the base model as the user named it, for a float base of the same weights.
        stock: the base as on the device.
        methods: name -> what serves the tasks; "base" and "pack" must be there.
        tests: held-out rows of every task.
        bar: told of the tokens done.

    Returns:
        A JSON object: losses, answers' scores and gains under both bases. Losses are means in nats
        per target token.
    """
    device = _measure_under(stock, stock, methods, tests, bar)
    base = BaseModel(model, dequantize=True)
    floating = _measure_under(base, Engine(base), methods, tests, bar)
    gains = [found["base"]["loss"] - found["pack"]["loss"] for found in (device, floating)]
    return {
        "device": device,
        "float": floating,
        "float_weights": "dequantized" if stock.bits and base.path == stock.path else "original",
        "float_dtype": str(base.compute_dtype).split(".")[-1],
        "gain": {"device": gains[0], "float": gains[1]},
        "kept_gain": gains[0] / gains[1] if gains[1] > 1e-6 else None,
        "n_rows": [len(test.examples.examples) for test in tests],
        "n_answers": [len(test.rows) for test in tests],
    }


def _measure_under(
    model: BaseModel | StockModel,
    runner: Runner,
    methods: Mapping[str, BenchMethod],
    tests: Sequence[HeldOutRows],
    bar: Progress,
) -> dict[str, Any]:
    """Losses of every method under one base, and scores of the answers if rows are answered."""
    scorer = Scorer(runner, progress=bar)
    found = bench_methods(scorer, methods, [test.examples for test in tests])
    answers = answer_rows(model, methods, [(test.rows, test.examples) for test in tests], bar)
    for name, metrics in answer_metrics(answers, list(methods)).items():
        found[name]["metrics"] = metrics
    return found
