"""Choosing on one form of a base model, and shipping for another."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import lora_of
from helpers.losses import losses_of
from helpers.tiny import library, tiny_model
from mlx_lm.utils import load, quantize_model, save

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.evaluate.heldout import paired_bootstrap, row_losses
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.directory import RunDirectory
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.utils.errors import ConfigError, InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe-model")
    lib = library(root, ["a", "b"])
    loaded, tokenizer, about = load(str(lib.model), return_config=True)
    loaded, about = quantize_model(loaded, about, group_size=32, bits=4)
    save(root / "small", str(lib.model), loaded, tokenizer, about)
    base, rng = BaseModel(str(lib.model)), np.random.default_rng(0)
    for name in "ab":
        loras = {path: lora_of(rng, shape, 2, size=0.1)
                 for path, shape in base.module_shapes.items()}  # fmt: skip
        shutil.rmtree(lib.adapters / name)
        Adapter(name, loras).save(lib.adapters / name, base.n_layers)
    return RunConfig(
        model=str(lib.model), probe_model=str(root / "small"), adapters=str(lib.adapters),
        tasks=str(lib.tasks), output=str(root / "run"), budget="1", baselines=(),
        probe_examples=2, test_examples=2, answers=1,
    )  # fmt: skip


def test_choices_are_of_one_model_and_the_pack_of_the_other(config, command):
    session = run(config, quiet=True)
    pack, bench = load_pack(session.path("pack")), session.read("bench.json")
    means = {}
    for name in (config.model, config.probe_model):
        base = BaseModel(name)
        engine, inputs = Engine(base), session.inputs
        own = losses_of(engine, list(zip(session.adapters, inputs.probes)))
        held = {
            "base": losses_of(engine, [(None, one) for one in inputs.tests]),
            "individual": losses_of(engine, list(zip(session.adapters, inputs.tests))),
            "pack": losses_of(engine, [(pack.load(one.task), one) for one in inputs.tests]),
        }
        targets = [np.array([one.n_targets for one in sets])
                   for sets in (inputs.probes, inputs.tests)]  # fmt: skip
        means[name] = (own / targets[0], {key: np.mean(x / targets[1]) for key, x in held.items()})
    chosen, shipped = means[config.probe_model], means[config.model]
    assert session.read("losses.json")["individual"] == pytest.approx(chosen[0], rel=1e-5)
    assert np.abs(chosen[0] - shipped[0]).min() > 1e-4
    there = bench["chosen_on"]["methods"]
    for name, loss in shipped[1].items():
        assert bench["methods"][name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert there[name]["loss"] == pytest.approx(chosen[1][name], rel=1e-5)
    serves = [{one.task: pack.load(one.task) for one in inputs.tests},
              dict(zip(inputs.names, session.adapters))]  # fmt: skip
    ships = Evaluator(Engine(BaseModel(config.model)))
    between = paired_bootstrap(*(row_losses(ships, one, inputs.tests) for one in serves))
    expected = {key: between[key] for key in ("low", "high")}
    assert bench["interval"] == pytest.approx(expected, abs=1e-5)
    assert bench["chosen_on"]["model"] == BaseModel(config.probe_model).name
    assert bench["provenance"]["base"]["model"] == BaseModel(config.model).name
    ships = BaseModel(config.model)
    assert pack.manifest.base.config_sha256 == ships.config_hash
    assert pack.manifest.base.weights_sha256 == ships.weights_hash
    change = bench["methods"]["pack"]["excess"] - there["pack"]["excess"]
    for file in ("report.md", "report.html"):
        text = session.path(file).read_text()
        assert "chosen on small" in text and f"changes by {change:+.4f} nats" in text
    assert RunDirectory(session.output).is_finished(config, ["pack", "bench", "report"])
    # Nothing that was chosen or measured on the one is taken for the other's.
    code, out, err = command("bench", session.path("config.yaml"), "--probe-model", config.model,
                             "--output", config.output)  # fmt: skip
    assert code == 0, err
    again = json.loads(session.path("losses.json").read_text())
    assert again["individual"] == pytest.approx(shipped[0], rel=1e-5)


def test_a_comparison_judges_on_the_shipped_model(config, command, tmp_path):
    words = ["compare", "--merge-methods", "linear,ties", "--budgets", "1", "--scale", "1"]
    for name in ("model", "probe_model", "adapters", "tasks", "probe_examples", "test_examples"):
        words += [f"--{name.replace('_', '-')}", getattr(config, name)]
    code, _, err = command(*words, "--output", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    first, second = found["runs"]
    (pair,) = found["pairs"]
    assert abs(pair["difference"]) > 1e-4
    assert pair["difference"] == pytest.approx(second["loss"] - first["loss"], abs=1e-5)


def test_merges_for_another_dtype_are_made_anew(config, tmp_path):
    """The probe model's weights are the same; the pack's dtype is not."""
    config = config.replace(output=str(tmp_path / "run"))
    run(config, until="merge", quiet=True)
    half = tmp_path / "model"
    loaded, tokenizer, about = load(config.model, return_config=True)
    loaded.set_dtype(mx.bfloat16)
    save(half, config.model, loaded, tokenizer, about)
    session = run(config.replace(model=str(half)), until="merge", quiet=True)
    (merged,) = session.path("merged").glob("*/adapters.safetensors")
    assert {one.dtype for one in mx.load(str(merged)).values()} == {mx.bfloat16}


def test_another_model_is_refused(config, tmp_path):
    path = tiny_model(tmp_path / "wide")
    about = json.loads((path / "config.json").read_text())
    with pytest.raises(InputError) as caught:
        (tmp_path / "other").mkdir()
        for file in path.iterdir():
            shutil.copyfile(file, tmp_path / "other" / file.name)
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        # Two letters change places.
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
        Inputs(config.replace(probe_model=str(tmp_path / "other")))
    (line,) = caught.value.problems
    assert line.startswith("probe_model: the tokenizers of other and model differ (first: the")
    assert about["vocab_size"] == len(tokenizer["model"]["vocab"])


def fits(engine, rows):
    try:
        return all(engine.batches(part) for one in rows for part in (one, *one.parts))
    except ConfigError:
        return False


def test_the_memory_limit_holds_for_both_models(config):
    """A row that does not fit beside the shipped model is refused before the model is loaded."""
    inputs = Inputs(config.replace(memory_limit="16GB"))
    assert inputs.judge.memory_limit == inputs.engine.memory_limit
    rows, base = [*inputs.probes, *inputs.tests], inputs.base
    shipped = BaseModel(config.model, lazy=True)
    before = mx.get_active_memory()
    limits = range(before, before + 2_000_000, 20_000)
    alone = next(one for one in limits if fits(Engine(base, one), rows))
    both = next(one for one in limits if fits(Engine(base, one).beside(shipped), rows))
    assert mx.get_active_memory() == before
    # With its weights in memory it is refused at the same limits, but for what a pass leaves.
    mx.eval(shipped.model.parameters())
    assert not fits(Engine(shipped, alone), rows) and not fits(Engine(shipped, both - 20_000), rows)
    assert fits(Engine(shipped, both + 40_000), rows)

    inputs.shipped = BaseModel(config.model, lazy=True)
    inputs.engine = Engine(base, mx.get_active_memory() + alone - before)
    with pytest.raises(ConfigError, match="memory_limit: .* MB, but the longest row of [ab] "):
        inputs.take_answers()
