"""Adapters that arrive from directories, with a model and probes: judged, on the command line."""

import json
from dataclasses import replace
from operator import itemgetter

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from d2c_mlx_cli.main import cli
from helpers.tiny import LAYERS, library
from safetensors.numpy import load_file, save_file

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
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import write_pack
from d2c_mlx.serve.router import route_prompts
from d2c_mlx.utils.errors import InputError, InputWarning, ModelError, PackError
from d2c_mlx.utils.files import hash_tree
from d2c_mlx.utils.line_search import COARSE_SCALES, line_search

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def whole(tmp_path):
    """A model, adapters, tasks, and a plain pack of two of the adapters."""
    paths = library(tmp_path, list(NAMES))
    base = Model(str(paths.model))
    found = {n: read_adapter(paths.adapters / n, base.module_shapes) for n in NAMES}
    made = [replace(found[n], sources=(n,)) for n in "ab"]
    pack = write_pack(
        tmp_path / "run" / "pack",
        made,
        Manifest(model="m", config_hash=base.config_hash, n_layers=LAYERS, budget="2"),
    )
    return paths, base, found, pack


def test_probes_decide_where_an_arrival_suffers_least(whole):
    """Every slot at every scale, tried here by brute force, and the walk over scales."""
    paths, base, found, pack = whole
    scorer = Scorer(Engine(base))
    probes = {n: base.encode(n, load_task(paths.tasks / n).probe) for n in NAMES}

    def losses(adapter, names):
        return scorer.losses([(adapter, [probes[n] for n in names])])[0]

    costs = {}
    for k, member in enumerate("ab"):
        names = [member, "c"]
        own = np.concatenate([losses(found[n].uniform(mx.float16), [n]) for n in names])
        gain = np.maximum(losses(None, names) - own, 0.05)
        merge = merge_adapters([found[member], found["c"]])
        for scale in COARSE_SCALES:
            regrets = (losses(scaled(merge, scale), names) - own) / gain
            costs[k, scale] = np.maximum(regrets, -1).sum()
    result = add_from_path(
        pack.path, str(paths.adapters / "c"), tasks=paths.tasks, model=str(paths.model)
    )
    walks = [(k, line_search(lambda scale, k=k: costs[k, scale], COARSE_SCALES)[0]) for k in (0, 1)]
    k, scale = min(walks, key=costs.get)
    assert result.adapter == f"cluster-{k}"
    merge = merge_adapters([found["ab"[k]], found["c"]])
    expected = scaled(merge, scale).modules
    arrived = result.pack.load("c").modules
    assert arrived.keys() == expected.keys()
    for path, lora in expected.items():
        np.testing.assert_allclose(arrived[path].delta(), lora.delta(), atol=1e-3)


def test_probes_choose_modules_and_scale_in_a_compact_pack(whole, tmp_path):
    """What weights take for most of an adapter does harm, and the probes see it."""
    paths, base, found, _ = whole
    probe = base.encode("b", load_task(paths.tasks / "b").probe)
    # Nothing else is asked for.
    for file in paths.tasks.rglob("test.jsonl"):
        file.unlink()
    harm = min(module_gains(base, found["b"], probe).items(), key=itemgetter(1))[0]
    weights = paths.adapters / "b" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.{harm}.lora_B.weight"] *= np.float16(3)
    save_file(tensors, weights, metadata={"format": "pt"})
    about = {"model": "m", "config_hash": base.config_hash, "n_layers": LAYERS, "budget": "9MB"}
    levels = dict(zip(found["a"].modules, ([(1, 2)], [(1, 2)], (), ())))
    losses, held = {}, {}
    for tasks in (None, paths.tasks):
        small = [compress(found["a"], levels)]
        pack = write_pack(tmp_path / "small", small, Manifest(**about), {"a": 0})
        result = add_from_path(
            pack.path, str(paths.adapters / "b"), tasks=tasks, model=str(paths.model)
        )
        arrived = result.pack.load("b")
        held[tasks] = harm in arrived.modules
        losses[tasks] = Scorer(Engine(base)).losses([(arrived, [probe])])[0][0]
    assert held == {None: True, paths.tasks: False}
    assert losses[paths.tasks] < losses[None] - 0.3


def test_on_the_command_line(whole, command):
    paths, _, _, pack = whole
    adapter, model = paths.adapters / "c", ["--model", paths.model]
    for argv, words in (
        (
            ["add", pack.path, adapter, *model, "--budget", "3"],
            "c: an adapter of its own",
        ),
        (["add", pack.path, f"other={adapter}", *model], "other: merged into cluster-2 with c\n"),
        (["remove", pack.path, "c"], "3 tasks, 3 adapters"),
        (["list", pack.path], "other (and 1 removed)"),
    ):
        code, out, err = command(*argv)
        assert code == 0 and words in out, err
    rows = json.loads(command("list", pack.path, "--json")[1])
    assert [row["tasks"] for row in rows] == [["a"], ["b"], ["other"]]
    assert sum(row["nbytes"] for row in rows) == load_pack(pack.path).nbytes


def test_what_cannot_arrive(whole, tmp_path):
    paths, _, _, pack = whole
    before = hash_tree(pack.path)
    with pytest.raises(ModelError, match="the pack is for 'm'"):
        add_from_path(pack.path, str(paths.adapters / "c"))
    other, model = f"other={paths.adapters / 'c'}", str(paths.model)
    with pytest.raises(InputError, match="tasks/other: missing"):
        add_from_path(pack.path, other, tasks=paths.tasks, model=model)
    with pytest.raises(InputError, match="nope: no such directory .* ADAPTER is an adapter"):
        add_from_path(pack.path, "nope", model=str(paths.model))
    config = paths.model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 20000.0}))
    with pytest.raises(ModelError, match="is not the config of 'm'"):
        add_from_path(pack.path, str(paths.adapters / "c"), model=str(paths.model))
    assert hash_tree(pack.path) == before


def test_another_base_model_is_a_warning(whole, tmp_path):
    """A name in another precision is no other, nor a path to a copy."""
    paths, _, _, pack = whole
    model = str(paths.model)

    def add(task, base):
        path = paths.adapters / "c" / "adapter_config.json"
        config = {**json.loads(path.read_text()), "base_model_name_or_path": base}
        path.write_text(json.dumps(config))
        return add_from_path(pack.path, f"{task}={paths.adapters / 'c'}", model=model)

    for i, name in enumerate(("unsloth/Llama-bnb-4bit", "org/M", None, str(tmp_path / "llama"))):
        add(f"same-{i}", name)
    with pytest.warns(InputWarning) as said:
        assert "other" in add("other", "tiny/llama-chat").pack.tasks
    assert [str(one.message) for one in said] == [
        "adapters: found base models 'tiny/llama-chat' (other), expected 'm' or 'tiny/llama';"
        " unless all are the same model, leave out what was trained on another"
    ]


@pytest.mark.parametrize("command", ["remove", "add", "route"])
def test_nothing_is_made_where_there_is_no_pack(tmp_path, command):
    """Nor a lock where its directory is: it would be all that is there."""
    (tmp_path / "beside").mkdir()
    for pack in (tmp_path / "typo" / "deep" / "pack", tmp_path / "beside" / "pack"):
        result = CliRunner().invoke(cli, [command, str(pack), "t"])
        assert isinstance(result.exception, PackError)
        assert f"{pack / 'manifest.json'}: missing; is this a pack?" in str(result.exception)
    assert list(tmp_path.rglob("*")) == [tmp_path / "beside"]


def test_probe_rows_that_cannot_be_tokenized_are_named_by_line(whole):
    """Of all tasks at once, whether an adapter arrives or a router is fitted."""
    paths, _, _, pack = whole
    files = [paths.tasks / name / "probe.jsonl" for name in "ab"]
    for file in files:
        file.write_text('\n{"text": "A question."}\n{"text": "<|im_end|>"}\n')
    before, options = hash_tree(pack.path), {"tasks": paths.tasks, "model": str(paths.model)}
    for call, argument in ((add_from_path, str(paths.adapters / "c")), (route_prompts, [])):
        with pytest.raises(InputError) as caught:
            call(pack.path, argument, **options)
        lines = [line.split(" has ")[0] for line in caught.value.problems]
        assert lines == [f"{file}:3" for file in files]
    assert hash_tree(pack.path) == before
