"""What a quantized base leaves of a pack: held-out losses and answers, beside a float base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2c_mlx.evaluate.answers import answer_metrics, answer_rows
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.evaluator import Evaluator, Runner
from d2c_mlx.evaluate.heldout import Method, bench_methods
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.tasks import Row
from d2c_mlx.phone.stock_model import StockModel
from d2c_mlx.utils.progress import Bar

__all__ = ["HeldOut", "measure_quality"]


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows of one task.

    Attributes:
        examples: whose loss is measured.
        rows: the first of them as read, which are answered.
    """

    examples: ExampleSet
    rows: Sequence[Row]


def measure_quality(
    model: str | None,
    stock: StockModel,
    methods: Mapping[str, Method],
    tests: Sequence[HeldOut],
    bar: Bar,
) -> dict[str, Any]:
    """The `quality` part of a result.

    Args:
        model: the base model as the user named it, for a float base of the same weights.
        stock: the base as on the device.
        methods: must have "base" and "pack".
        tests: of every task.
        bar: told of the tokens done.
    """
    device = _under(stock, stock, methods, tests, bar)
    base = BaseModel(model, dequantize=True)
    floating = _under(base, Engine(base), methods, tests, bar)
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


def _under(
    model: BaseModel | StockModel,
    runner: Runner,
    methods: Mapping[str, Method],
    tests: Sequence[HeldOut],
    bar: Bar,
) -> dict[str, Any]:
    """Losses, and where rows are answered the metrics, of every method under one base."""
    evaluator = Evaluator(runner)
    evaluator.meter = bar
    found = bench_methods(evaluator, methods, [test.examples for test in tests])
    answers = {}
    for test in tests:
        answered = test.examples.examples[: len(test.rows)]
        tokens = len(methods) * sum(len(one.tokens) for one in answered)
        bar.expect(tokens)
        answers[test.examples.task] = answer_rows(model, methods, test.rows, test.examples)
        bar.advance(tokens)
    for name, metrics in answer_metrics(answers, list(methods)).items():
        found[name]["metrics"] = metrics
    return found
