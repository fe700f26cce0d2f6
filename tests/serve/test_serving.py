"""`d2c_mlx.load` and `Pack.switch`, against stock mlx-lm loading what `unpack` writes."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.adapters import ABOUT, ADAPTERS, UP, Q, V
from helpers.tiny import LAYERS, quantized, tiny_model
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import generate
from mlx_lm import load as stock_load
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

import d2c_mlx
from d2c_mlx import Adapter, export, load_pack
from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.stock import switch
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.errors import AdapterError, ModelError, PackError

TOKENS = mx.arange(1, 25)[None] * 7 % 250


# What two packs and two models share is tested once.
PAIRS = pytest.mark.parametrize(
    ("model", "pack"), [("float16", "compact"), ("4 bit", "plain")], indirect=True
)


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    path = tiny_model(tmp_path_factory.mktemp("serving") / "model")
    return str(quantized(path, path.with_name("4bit")) if request.param == "4 bit" else path)


@pytest.fixture
def pack(request, tmp_path):
    if request.param == "plain":
        return write_pack(tmp_path / "pack", ADAPTERS, Manifest(**ABOUT))
    small = [compress(adapter, dict.fromkeys(adapter.modules, [(2, 8)])) for adapter in ADAPTERS]
    serves = {"wide": 0, "late": 1, "other": 2, "none": None}
    return write_pack(tmp_path / "pack", small, Manifest(**ABOUT), serves)


@pytest.fixture
def expected(pack, model, tmp_path):
    """Task -> logits of stock mlx-lm; None is the base model."""
    plain = tmp_path / "plain"
    paths = {task: name and str(plain / name) for task, name in export(pack, "mlx", plain).items()}
    paths = {**paths, None: None}
    return {task: stock_load(model, adapter_path=p)[0](TOKENS) for task, p in paths.items()}


def assert_serves(model, task, expected):
    """The task's logits, to 1e-5, and no other's."""
    logits = model(TOKENS)
    assert logits.dtype == expected[task].dtype
    assert mx.abs(logits - expected[task]).max().item() < 1e-5
    for other, values in expected.items():
        if other != task and {task, other} != {"none", None}:
            assert mx.abs(logits - values).max().item() > 1e-2


@PAIRS
def test_switching_there_and_back_leaves_nothing_behind(pack, model, expected):
    """Every task as stock mlx-lm serves it, loaded alone and after others."""
    alone, _ = d2c_mlx.load(str(pack.path), "wide", model)
    assert_serves(alone, "wide", expected)
    loaded, tokenizer = d2c_mlx.load(pack, model=model)
    weights = dict(tree_flatten(loaded.parameters()))
    for task in ["late", "wide", None, *pack.tasks, None]:
        pack.switch(loaded, task)
        assert_serves(loaded, task, expected)
        assert not any(module.training for module in loaded.modules())
    after = dict(tree_flatten(loaded.parameters()))
    assert after.keys() == weights.keys()
    assert all(after[name] is weights[name] for name in weights)
    pack.switch(loaded, "wide")
    text = generate(loaded, tokenizer, prompt=[1, 2, 3], max_tokens=4)
    assert text == generate(alone, tokenizer, prompt=[1, 2, 3], max_tokens=4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_of_every_kind_that_mlx_lm_has_are_dropped(tmp_path, use_dora):
    """With the dropout of their training; quantized embeddings have no LoRA in mlx-lm."""
    path = str(tiny_model(tmp_path / "model", mx.float32))
    settings = {"rank": 4, "scale": 2.0, "dropout": 0.5, "keys": [Q, V, "model.embed_tokens"]}
    for adapter in (None, ADAPTERS[2]):
        (model, _), (expected, _) = stock_load(path), stock_load(path)
        kinds = {name: type(module) for name, module in model.named_modules()}
        linear_to_lora_layers(model, LAYERS, settings, use_dora=use_dora)
        model.update(tree_map_with_path(
            lambda name, x: x + 0.2 if "lora_" in name else x, model.parameters()))  # fmt: skip
        model.train()
        assert mx.abs(model(TOKENS) - expected(TOKENS)).max().item() > 1e-2
        for either in (model, expected):
            switch(either, adapter, tmp_path)
        assert mx.abs(model(TOKENS) - expected(TOKENS)).max().item() < 1e-5
        assert adapter or kinds == {name: type(m) for name, m in model.named_modules()}
    experts, inner = nn.Module(), SwitchLinear(8, 4, 3)
    experts.layer = LoRASwitchLinear.from_base(inner, r=2)
    switch(experts, None, tmp_path)
    assert experts.layer is inner


@PAIRS
def test_what_does_not_fit_leaves_the_model_as_it_was(pack, model, expected, tmp_path):
    loaded, _ = d2c_mlx.load(pack, "other", model)
    modules = {"model.layers.7.self_attn.q_proj": ADAPTERS[1].modules[f"model.layers.1.{UP}"]}
    foreign = Adapter("x", modules, "m", ("x",))
    foreign = write_pack(tmp_path / "foreign", [foreign], Manifest(**{**ABOUT, "n_layers": 8}))
    for error, match, call in (
        (PackError, "no task 'z'", lambda: pack.switch(loaded, "z")),
        (AdapterError, "no linear layer .*layers.7", lambda: foreign.switch(loaded, "x")),
        (PackError, "missing; is this a pack", lambda: d2c_mlx.load(tmp_path / "no", model=model)),
        (PackError, "no task 'z'", lambda: d2c_mlx.load(pack, "z", model)),
        (ModelError, "the pack is for 'm'", lambda: d2c_mlx.load(pack, "wide")),
    ):
        pytest.raises(error, call).match(match)
    assert_serves(loaded, "other", expected)
    assert load_pack(pack.path) == pack
