"""A tiny library, and rows whose answers are those of one of its adapters."""

import pytest
from helpers.tiny import refinable

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compose.methods import NewTask
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.refine.refine import TrainOptions

NAMES = ("a", "b", "c")


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    return refinable(tmp_path_factory.mktemp("compose"), NAMES)


@pytest.fixture(scope="session")
def tiny_base(paths):
    return Model(str(paths.model))


@pytest.fixture(scope="session")
def adapters(paths, tiny_base):
    return [read_adapter(paths.adapters / name, tiny_base.module_shapes) for name in NAMES]


@pytest.fixture(scope="session")
def new_task(tiny_base, adapters):
    """Its training, a step of length 0, teaches nothing."""
    scorer = Scorer(Engine(tiny_base), LossCache())
    return NewTask("new", tiny_base, scorer, adapters, training=TrainOptions(1, 0.0))


@pytest.fixture(scope="session")
def answered(tiny_base):
    """`answered(adapter)`: ten rows with its own greedy answers; None is the base model."""

    def rows(adapter):
        prompts = [tuple(range(10 + i, 16 + i)) for i in range(10)]
        answers = tiny_base.answers(prompts, [6] * len(prompts), [adapter] * len(prompts))
        return ExampleSet("new", tuple(Example(p + tuple(a), 6) for p, a in zip(prompts, answers)))

    return rows
