"""A base model that caps its logits: nothing can be trained on it, the rest is compared."""

import json

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


def test_methods_that_train_are_left_out(command, root, tmp_path):
    left_out = "fresh, fresh-scaled, fresh-library, best-trained"
    with pytest.warns(InputWarning, match=f"^method: .* {WORDS}, .*; left out: {left_out}$"):
        code, out, err = command(
            "compose", "--from", root / "adapters", "--task", root / "tasks" / "new", "--model",
            root / "model", "--output", tmp_path / "new", "--json", "--anyway",
        )  # fmt: skip
    assert code == 0, err
    about = json.loads(out)
    assert about["candidates"].keys() == {"base", "best", "uniform", "top"}
    assert set(about["as_good"]) <= {"base", "best"}


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
    # It is refused before anything is evaluated.
    monkeypatch.setattr("d2c_mlx.compose.compose.cross_validate", lambda *args: {}["stop"])
    with pytest.raises(ModelError if trains else KeyError):
        compose_adapter(new_task, rows, name)
