"""Pass sizes: measured on this machine, kept for a base model, used by runs."""

import json
import re

import pytest
from helpers.losses import losses_of, plain_loss
from helpers.tiny import library

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.batches import PassSize
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.tasks import load_task
from d2c_mlx.run import session
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.doctor import Tuning, fastest, tune, tuned_passes
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.run.session import Session
from d2c_mlx.utils.environment import cache_directory

FEW, MANY = PassSize(), PassSize(256, 8192)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("doctor"), ["a", "b"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))


def config_of(paths, tmp_path):
    return RunConfig(model=str(paths.model), adapters=str(paths.adapters), tasks=str(paths.tasks),
                     output=str(tmp_path / "run"), budget="1")  # fmt: skip


def test_another_size_must_be_clearly_faster():
    assert fastest({FEW: 1.0, MANY: 0.95}) == FEW
    assert fastest({FEW: 1.0, MANY: 0.8}) == MANY
    assert fastest({FEW: 20.0}) == FEW


def test_what_was_measured_is_kept_and_used(paths, tmp_path, command):
    code, out, _ = command("doctor", "--tune", "--model", paths.model, "--json")
    lines = [one["value"] for one in json.loads(out) if one["name"] == "passes"]
    assert re.search(r": [\d,]+ tokens/s; a pass counts as \d+ tokens, \d\.\d\d times", *lines)
    base = BaseModel(str(paths.model))
    found = tuned_passes(base)
    assert found and Inputs(config_of(paths, tmp_path)).engine.passes == found
    # Another size, as another machine would find it.
    path = cache_directory() / "tunings.json"
    path.write_text(path.read_text().replace(f'"overhead": {found.overhead}', '"overhead": 512'))
    assert Inputs(config_of(paths, tmp_path)).engine.passes.overhead == 512
    # Of another model nothing is known.
    assert tuned_passes(BaseModel()) is None


def test_losses_differ_by_rounding_only(paths):
    base = BaseModel(str(paths.model))
    adapter = read_adapter(paths.adapters / "a", base.module_shapes)
    rows = base.encode("a", load_task(paths.tasks / "a").test)
    expected = plain_loss(base, adapter, rows)
    for size in (PassSize(0), FEW, MANY):
        engine = Engine(base)
        engine.passes = size
        assert losses_of(engine, [(adapter, rows)])[0] == pytest.approx(expected, rel=1e-5)


def test_tuning_leaves_the_engine_as_it_was_asked_for(paths):
    engine = Engine(BaseModel(str(paths.model)))
    asked = engine.optimizations
    found = tune(engine)
    assert isinstance(found, Tuning) and engine.passes == found.passes
    assert engine.optimizations == asked and found.stacked is not None


def test_a_long_run_tunes_by_itself_and_a_short_one_does_not(paths, tmp_path, monkeypatch, capsys):
    short = Session(config_of(paths, tmp_path))
    short.load()
    assert tuned_passes(short.inputs.base) is None
    monkeypatch.setattr(session, "_LONG_RUN", 10)
    long = Session(config_of(paths, tmp_path))
    long.load()
    assert tuned_passes(long.inputs.base) == long.inputs.engine.passes
    assert "first long run with this model here" in capsys.readouterr().err
    Session(config_of(paths, tmp_path)).load()
    assert not capsys.readouterr().err


def test_a_model_is_for_tuning(command):
    code, _, err = command("doctor", "--model", "m")
    assert code == 2 and err.startswith("error: --model: is for --tune")
