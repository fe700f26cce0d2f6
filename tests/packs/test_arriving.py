"""Adapters that arrive from directories, with a model and probes: judged, on the command line."""

from dataclasses import replace
from operator import itemgetter

import mlx.core as mx
import numpy as np
import pytest
from helpers.command import edit_config, edit_tensors
from helpers.tiny import LAYERS, library, tiny_model

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.quantize import compress
from d2c_mlx.evaluate.distill import module_gains
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.add import add_from_path
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.errors import InputError, InputWarning
from d2c_mlx.utils.files import hash_tree
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def whole(tmp_path):
    """A model, adapters, tasks, and a plain pack of two of the adapters."""
    paths = library(tmp_path, list(NAMES))
    base = Model(str(paths.model))
    adapters = {n: read_adapter(paths.adapters / n, base.module_shapes) for n in NAMES}
    about = Manifest(model="m", config_hash=base.config_hash, n_layers=LAYERS, budget="2")
    stored = [replace(adapters[n], sources=(n,)) for n in "ab"]
    return paths, base, adapters, write_pack(tmp_path / "run" / "pack", stored, about)


def test_probes_decide_where_an_arrival_suffers_least(whole):
    """Every slot at every scale, tried here by brute force, and the walk over scales."""
    paths, base, adapters, pack = whole
    scorer = Scorer(Engine(base))
    probes = {n: base.encode(n, load_task(paths.tasks / n).probe) for n in NAMES}

    def losses(adapter, names):
        return scorer.losses([(adapter, [probes[n] for n in names])])[0]

    merges = [merge_adapters([adapters[member], adapters["c"]]) for member in "ab"]
    costs = {}
    for k, names in enumerate(("ac", "bc")):
        own = np.concatenate([losses(adapters[n].uniform(mx.float16), n) for n in names])
        gain = np.maximum(losses(None, names) - own, 0.05)
        for scale in COARSE_SCALES:
            regrets = (losses(scaled(merges[k], scale), names) - own) / gain
            costs[k, scale] = np.maximum(regrets, -1).sum()
    walks = [(k, line_search(lambda scale, k=k: costs[k, scale], COARSE_SCALES)[0]) for k in (0, 1)]
    k, scale = min(walks, key=costs.get)
    options = {"tasks": paths.tasks, "model": str(paths.model)}
    result = add_from_path(pack.path, str(paths.adapters / "c"), **options)
    assert result.adapter == f"cluster-{k}"
    expected, arrived = scaled(merges[k], scale).modules, result.pack.load("c").modules
    assert arrived.keys() == expected.keys()
    for path, lora in expected.items():
        np.testing.assert_allclose(arrived[path].delta(), lora.delta(), atol=1e-3)


def test_probes_choose_modules_and_scale_in_a_compact_pack(whole, tmp_path):
    """What weights take for most of an adapter does harm, and the probes see it."""
    paths, base, adapters, _ = whole
    probe = base.encode("b", load_task(paths.tasks / "b").probe)
    # Nothing else is asked for.
    for file in paths.tasks.rglob("test.jsonl"):
        file.unlink()
    harm = min(module_gains(base, adapters["b"], probe).items(), key=itemgetter(1))[0]
    key = f"base_model.model.{harm}.lora_B.weight"
    edit_tensors(paths.adapters / "b", lambda x: x.update({key: x[key] * np.float16(3)}))
    about = Manifest(model="m", config_hash=base.config_hash, n_layers=LAYERS, budget="9MB")
    levels = dict(zip(adapters["a"].modules, ([(1, 2)], [(1, 2)], (), ())))
    losses, held = [], []
    for tasks in (None, paths.tasks):
        pack = write_pack(tmp_path / "small", [compress(adapters["a"], levels)], about, {"a": 0})
        options = {"tasks": tasks, "model": str(paths.model)}
        arrived = add_from_path(pack.path, str(paths.adapters / "b"), **options).pack.load("b")
        held.append(harm in arrived.modules)
        losses.append(Scorer(Engine(base)).losses([(arrived, [probe])])[0][0])
    assert held == [True, False] and losses[1] < losses[0] - 0.3


def test_what_cannot_arrive(whole, tmp_path):
    """Another base model by name is a warning; a name in another precision is no other."""
    paths, _, _, pack = whole
    before, model, arrival = hash_tree(pack.path), str(paths.model), str(paths.adapters / "c")
    other = str(tiny_model(tmp_path / "other", rope_theta=20000.0))
    for adapter, options, words in (
        (arrival, {}, "the pack is for 'm'"),
        (f"x={arrival}", {"tasks": paths.tasks, "model": model}, "tasks/x: missing"),
        ("nope", {"model": model}, "nope: no such directory .* ADAPTER is an adapter"),
        (arrival, {"model": other}, "is not the config of 'm'"),
    ):
        with pytest.raises(InputError, match=words):
            add_from_path(pack.path, adapter, **options)
    assert hash_tree(pack.path) == before
    edit_config(paths.adapters / "c", base_model_name_or_path="unsloth/Llama-bnb-4bit")
    add_from_path(pack.path, f"same={arrival}", model=model)
    edit_config(paths.adapters / "c", base_model_name_or_path="tiny/llama-chat")
    with pytest.warns(InputWarning, match=r"'tiny/llama-chat' \(other\), expected 'm' or 'tiny/"):
        add_from_path(pack.path, f"other={arrival}", model=model)


def test_nothing_is_made_where_there_is_no_pack(tmp_path, command):
    """Nor a lock where its directory is: it would be all that is there."""
    (tmp_path / "beside").mkdir()
    for name in ("remove", "add", "route"):
        for pack in (tmp_path / "typo" / "deep" / "pack", tmp_path / "beside" / "pack"):
            code, _, err = command(name, pack, "t")
            assert code == 2 and f"{pack / 'manifest.json'}: missing; is this a pack?" in err
    assert list(tmp_path.rglob("*")) == [tmp_path / "beside"]
