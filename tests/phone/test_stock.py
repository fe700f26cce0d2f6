"""The stand-in for a device computes what stock mlx-lm computes, on the same quantized files."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.losses import stock_loss
from helpers.tiny import library, tiny_model
from mlx_lm import load as stock_load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

from d2c_mlx.adapters.adapter import LoRA
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.quantize import compress
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.examples import encode
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.export import export
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import write_compact_pack, write_pack
from d2c_mlx.phone.stock_model import StockModel, quantized_model
from d2c_mlx.utils.errors import ModelError

ABOUT = {"model": "m", "config_hash": "", "n_layers": 2, "budget": "-", "max_bytes": None}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return library(tmp_path_factory.mktemp("stock"), ["a", "b"])


@pytest.fixture(scope="module", params=[4, 8])
def stock(paths, request):
    return StockModel(quantized_model(str(paths.model), request.param)[2])


def adapters(paths, shapes):
    return [read_adapter(paths.adapters / name, shapes) for name in "ab"]


def examples_of(paths, stock, name):
    return encode(stock.tokenizer, name, load_task(paths.tasks / name).test)


@pytest.mark.parametrize("storage", ["plain", "compact"])
def test_losses_are_those_of_stock_mlx_lm_with_the_unpacked_adapter(
    paths, stock, storage, tmp_path
):
    found = adapters(paths, stock.module_shapes)
    if storage == "plain":
        merged = [replace(one.uniform(mx.float16), sources=(one.name,)) for one in found]
        pack = write_pack(tmp_path / "pack", merged, Manifest(**ABOUT))
    else:
        small = [compress(one, dict.fromkeys(one.modules, [(4, 4)])) for one in found]
        pack = write_compact_pack(tmp_path / "pack", small, {"a": 0, "b": 1}, Manifest(**ABOUT))
    directories = export(load_pack(pack.path), "mlx", tmp_path / "plain")
    losses = {}
    for name in "ab":
        examples = examples_of(paths, stock, name)
        ((_, rows),) = stock.run([(pack.load(name), examples)])
        total = rows.sum()
        losses[name] = total / examples.n_targets
        other, _ = stock_load(str(stock.path), adapter_path=str(tmp_path / "plain" /
                                                                directories[name]))  # fmt: skip
        other.set_dtype(mx.float32)  # As ours on this device.
        assert losses[name] == pytest.approx(stock_loss(other, examples), abs=1e-4)
    ((_, rows),) = stock.run([(None, examples)])
    bare = rows.sum()
    assert abs(bare / examples.n_targets - losses["b"]) > 1e-3
    other, _ = stock_load(str(stock.path))
    other.set_dtype(mx.float32)
    assert bare / examples.n_targets == pytest.approx(stock_loss(other, examples), abs=1e-4)


def test_an_engine_in_the_process_does_not_change_the_stand_in(paths, stock):
    """It replaces functions of mlx-lm's architecture; the stand-in is to run mlx-lm's own."""
    from mlx_lm.models import activations, llama

    Engine(Model(str(paths.model)))
    assert llama.swiglu is not activations.swiglu
    StockModel(stock.path)
    assert llama.swiglu is activations.swiglu


def test_attach_swaps_keeps_quantized_weights_and_leaves_nothing_behind(paths, stock):
    x = mx.array([[5, 6, 7, 8]])
    bare = np.array(stock.model(x))
    first, second = adapters(paths, stock.module_shapes)
    # The second has another rank and fewer modules than the first.
    path = min(second.modules)
    lora = second.modules[path]
    second = type(second)("b", {path: LoRA(lora.a[:, :2], lora.b[:2], lora.scale)})
    stock.attach(first)
    layers = [m for m in stock.model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == len(first.modules)
    assert all(isinstance(layer.linear, nn.QuantizedLinear) for layer in layers)
    stock.attach(second)
    swapped = np.array(stock.model(x))
    fresh = StockModel(stock.path)
    fresh.attach(second)
    assert (np.array(fresh.model(x)) == swapped).all()
    assert (swapped != bare).any()
    stock.attach(None)
    assert (np.array(stock.model(x)) == bare).all()


@pytest.mark.parametrize("n_tokens", [1, 255, 256, 257, 400])
def test_kv_bytes_are_those_of_the_real_cache(stock, n_tokens):
    cache = make_prompt_cache(stock.model)
    prefix = max(1, n_tokens - 2)
    stock.model(mx.zeros((1, prefix), mx.int32), cache=cache)
    for _ in range(n_tokens - prefix):
        stock.model(mx.zeros((1, 1), mx.int32), cache=cache)
    held = sum(one.nbytes for one in cache)
    assert stock.kv_nbytes(n_tokens, stock.compute_dtype) == held > 0
    # On a device, which computes in the model's own dtype.
    cache = make_prompt_cache(stock.model)
    model, _ = stock_load(str(stock.path))
    model(mx.zeros((1, n_tokens), mx.int32), cache=cache)
    assert stock.kv_nbytes(n_tokens, stock.dtype) == sum(one.nbytes for one in cache) == held // 2


def test_kv_bytes_of_another_cache_are_not_guessed(stock, monkeypatch):
    monkeypatch.setattr(type(stock.model), "make_cache", lambda self: [object()], raising=False)
    assert stock.kv_nbytes(10, mx.float16) is None


def test_weights_stay_as_they_are_quantized(stock):
    """Only scales are cast, on a CPU; the bytes that count are those of the files' tensors."""
    tensors = mx.load(str(stock.path / "model.safetensors"))
    assert stock.weights_nbytes == sum(x.nbytes for x in tensors.values())
    name = "model.layers.0.self_attn.q_proj"
    layer = dict(stock.model.named_modules())[name]
    assert mx.array_equal(layer.weight, tensors[f"{name}.weight"])
    assert (stock.dtype, stock.compute_dtype) == (mx.float16, mx.float32)


def test_quantizing_is_done_once_by_mlx_lm(paths):
    name, source, directory = quantized_model(str(paths.model), 4)
    assert source == paths.model
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert quantized_model(str(paths.model), 4) == (name, source, directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    config = json.loads((directory / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (4, 32)
    whole = mx.load(str(paths.model / "model.safetensors"))["model.layers.0.mlp.up_proj.weight"]
    stored = mx.load(str(directory / "model.safetensors"))
    parts = [
        stored[f"model.layers.0.mlp.up_proj.{leaf}"] for leaf in ("weight", "scales", "biases")
    ]
    for found, expected in zip(parts, mx.quantize(whole, 32, 4)):
        assert mx.array_equal(found, expected)
    # As it is: nothing is quantized, and what is quantized already is left as it is.
    assert quantized_model(str(paths.model), None)[1:] == (paths.model, paths.model)
    assert quantized_model(str(directory), 4)[1:] == (directory, directory)


@pytest.mark.parametrize("content", ['{"a":', "[]", '{"quantization": 4}'])
def test_a_config_that_is_none_is_named(tmp_path, content):
    source = tiny_model(tmp_path / "model")
    (source / "config.json").write_text(content)
    with pytest.raises(ModelError, match=re.escape(f"{source / 'config.json'}: expected")):
        quantized_model(str(source), 4)


@pytest.mark.parametrize(
    "name", ["config.json", "chat_template.jinja", "tokenizer.json", "merges.txt", "a.model", ""]
)
def test_what_decides_besides_the_weights_is_a_copy_of_its_own(tmp_path, monkeypatch, name):
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path / "cache"))
    source = tiny_model(tmp_path / "model")
    *_, before = quantized_model(str(source), 4)
    assert quantized_model(str(source), 4)[2] == before
    file = source / name
    if not name:
        monkeypatch.setattr(
            "d2c_mlx.phone.stock_model.version", lambda package: f"another {package}"
        )
    elif name == "config.json":
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"rope_theta": 500000.0}))
    elif name == "chat_template.jinja":
        file.write_text("another")
    else:
        file.write_text((file.read_text() if file.exists() else "") + "\n")
    *_, after = quantized_model(str(source), 4)
    assert after != before
    model, tokenizer = stock_load(str(after))
    assert (model.args.rope_theta == 500000.0) == (name == "config.json")
    assert (tokenizer.chat_template == "another") == (name == "chat_template.jinja")


TOGETHER = """
import sys, time
from pathlib import Path
import d2c_mlx, d2c_mlx.phone.stock_model as s
model, root, me = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
def meet(name, seconds):
    (root / f"{name}-{me}").touch()
    end = time.monotonic() + seconds
    while len(list(root.glob(f"{name}-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
save = s.save
s.save = lambda *given: (meet("saving", 1), save(*given), time.sleep(0.1))
meet("ready", 60)
print(s.quantized_model(model, 4)[2])
"""


@pytest.mark.slow
def test_two_processes_that_quantize_one_model_do_it_once(paths, tmp_path):
    """Both write into the same temporary directory."""
    environment = {**os.environ, "D2C_MLX_CACHE": str(tmp_path / "cache")}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(paths.model), str(tmp_path), name],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ) for name in "ab"
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(list(tmp_path.glob("saving-*"))) == 1
    first, second = (Path(out.splitlines()[-1]) for out, _ in said)
    assert first == second and StockModel(first).bits == 4


def test_quantized_models_are_not_quantized_again(paths):
    *_, directory = quantized_model(str(paths.model), 4)
    with pytest.raises(ModelError, match="have 4 bits already, expected .* for --bits 8; leave"):
        quantized_model(str(directory), 8)


def test_widths_that_no_group_divides(paths, monkeypatch, tmp_path):
    monkeypatch.setattr("d2c_mlx.phone.stock_model.linear_shapes", lambda model: {"q": (48, 32)})
    monkeypatch.setenv("D2C_MLX_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"no group size divides all of its widths \(48\)"):
        quantized_model(str(paths.model), 4)
    assert not list(tmp_path.rglob("*.safetensors"))
