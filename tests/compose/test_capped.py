"""A base model that caps its logits: nothing can be trained on it, the rest is compared."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from helpers.tiny import peft_adapter, task, tiny_model

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compose.compose import compose_adapter
from d2c_mlx.compose.methods import METHODS, NewTask, find_method
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.plugins import COMPOSE_METHODS, names
from d2c_mlx.refine.refine import TrainOptions
from d2c_mlx.utils.errors import D2CError, InputWarning, ModelError

WORDS = "scales or caps its logits"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("capped")
    tiny_model(root / "model", model_type="gemma2", head_dim=8, num_key_value_heads=2,
               final_logit_softcapping=2.0)  # fmt: skip
    for seed, name in enumerate("ab"):
        peft_adapter(root / "adapters", name, alpha=40, seed=seed)
    task(root / "tasks", "new", n_probe=5)
    return root


@pytest.fixture
def argv(root, tmp_path):
    """`argv(method)`: of a compose of the two adapters."""
    return lambda method: [
        "compose", "--from", root / "adapters", "--task", root / "tasks" / "new", "--model",
        root / "model", "--output", tmp_path / "new", "--method", method, "--json", "--anyway",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "left_out", "compared"),
    [
        ("auto", "fresh, fresh-scaled, fresh-library, best-trained", {"uniform", "top"}),
        ("continual", "", {"continual"}),
    ],
)
def test_methods_that_train_are_left_out(command, argv, method, left_out, compared):
    told = pytest.warns(InputWarning, match=f"^method: .* {WORDS}, .*; left out: {left_out}$")
    with told if left_out else nullcontext():
        code, out, err = command(*argv(method))
    assert code == 0, err
    about = json.loads(out)
    assert about["candidates"].keys() == {"base", "best", *compared}
    assert set(about["as_good"]) <= {"base", "best"}


def test_one_that_is_named_is_refused_before_anything_is_evaluated(
    command, argv, monkeypatch, tmp_path
):
    def evaluated(*args):
        raise AssertionError("found out too late")

    monkeypatch.setattr(Scorer, "losses", evaluated)
    code, out, err = command(*argv("fresh-scaled"))
    assert (code, out) == (2, "") and not (tmp_path / "new").exists()
    (line,) = err.splitlines()
    assert line.startswith("error: model: training needs") and WORDS in line


@pytest.fixture(scope="module")
def new_task(root):
    base = Model(str(root / "model"))
    library = [read_adapter(root / "adapters" / name, base.module_shapes) for name in "ab"]
    scorer = Scorer(Engine(base), LossCache())
    return NewTask("new", base, scorer, library, np.ones(2), TrainOptions(1, 0.0))


@pytest.mark.parametrize("name", [*METHODS, *names(COMPOSE_METHODS)])
def test_what_is_refused_is_what_trains(root, new_task, name, monkeypatch):
    rows = new_task.base.encode("new", load_task(root / "tasks" / "new", tests=False).probe)
    method, trains = find_method(name), False
    try:
        method(new_task, rows, (method.choices or [0])[0])
    except D2CError as error:
        trains = WORDS in str(error)
    monkeypatch.setattr("d2c_mlx.compose.compose.cross_validate", lambda *args: {}["stop"])
    with pytest.raises(ModelError if trains else KeyError):
        compose_adapter(new_task, rows, name)
