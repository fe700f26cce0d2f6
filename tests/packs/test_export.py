"""Exports, each read back by another reader than the one that wrote it."""

import json
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers.exported import adapter_of
from helpers.gguf_files import gguf_name, in_llama_rows, read_gguf
from helpers.tiny import ALL, tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.resolve import config_digest
from d2c_mlx.packs.export import export, verify
from d2c_mlx.packs.overwrite import MARKER
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.errors import InputError, ModelError
from d2c_mlx.utils.files import hash_tree


def test_gguf_holds_the_adapters_of_the_pack(pack, model, tmp_path):
    tasks = export(pack, "gguf", tmp_path / "out", str(model))
    assert tasks == json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert list(tasks) == sorted(pack.tasks)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {MARKER, "tasks.json", "cluster-0.gguf", "cluster-1.gguf"}
    for task, name in tasks.items():
        adapter = pack.load(task)
        if adapter is None:
            assert name is None
            continue
        metadata, deltas = read_gguf(tmp_path / "out" / name)
        keys = ("general.type", "adapter.type", "general.architecture")
        assert [metadata[key] for key in keys] == ["adapter", "lora", "llama"]
        assert deltas.keys() == {gguf_name(path) for path in adapter.modules}
        for path, lora in adapter.modules.items():
            expected = in_llama_rows(path, lora.delta())
            # A compact pack rounds to float16 what a GGUF leaves to the reader.
            np.testing.assert_allclose(deltas[gguf_name(path)], expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("to", ["mlx", "peft", "gguf", None])
def test_a_model_that_is_given_is_the_packs_own(plain, model, tmp_path, to):
    """Also where nothing of it is needed; only gguf asks for it."""
    other, out = tiny_model(tmp_path / "other", rope_theta=20000.0), tmp_path / "out"
    call = partial(export, plain, to, out) if to else partial(verify, plain.path, "vllm-metal")
    cases = {tmp_path / "none": "/none' is no directory", other: "is not the config of 'tiny/"}
    if to == "gguf":
        cases[None] = "the pack is for 'tiny/llama'"
    for spec, words in cases.items():
        with pytest.raises(ModelError, match=words):
            call(model=spec and str(spec))
        assert not out.exists()
    call(model=str(model))


def test_gguf_refuses_what_it_does_not_know(plain, about, model, tmp_path):
    other, out = tiny_model(tmp_path / "other"), tmp_path / "out"
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    changed = {"config_hash": config_digest(other)}
    gemma = replace(plain, manifest=plain.manifest.model_copy(update=changed))
    lora, odd = adapter_of("one").modules[[*ALL][0]], "model.layers.0.self_attn.qkv_proj"
    fused = write_pack(tmp_path / "odd", [Adapter("x", {odd: lora}, sources=("x",))], about)
    for pack, to, base, words in (
        (plain, "onnx", model, "'onnx', expected one of mlx, mlx-swift, peft, gguf"),
        (gemma, "gguf", other, "model_type is 'gemma3'.* expected one of gemma2, "),
        (fused, "gguf", model, f"1 modules have no name in a GGUF of 'llama' .first: {odd}"),
    ):
        with pytest.raises(InputError, match=words):
            export(pack, to, out, str(base))
        assert not out.exists()


def test_mlx_swift_has_own_ranks_and_the_logits_that_mlx_lm_has(pack, model, tmp_path):
    """MLX replaces parameters of any shape, in Swift as in Python; only mlx-lm looks at shapes."""
    from mlx_lm import load as stock_load
    from mlx_lm.tuner.utils import linear_to_lora_layers

    tasks = export(pack, "mlx", tmp_path / "mlx")
    assert export(pack, "mlx-swift", tmp_path / "swift") == tasks
    tokens = mx.arange(1, 25)[None] * 7 % 250
    for name in sorted({name for name in tasks.values() if name}):
        padded, own = tmp_path / "mlx" / name, tmp_path / "swift" / name
        config = json.loads((own / "adapter_config.json").read_text())
        assert config == json.loads((padded / "adapter_config.json").read_text())
        expected, _ = stock_load(str(model), adapter_path=str(padded))
        found, _ = stock_load(str(model))
        linear_to_lora_layers(found, config["num_layers"], config["lora_parameters"])
        weights = mx.load(str(own / "adapters.safetensors"))
        found.load_weights(list(weights.items()), strict=False)
        found.eval()
        assert mx.abs(found(tokens) - expected(tokens)).max().item() < 1e-5
        if name == "cluster-1" and pack.storage == "compact":
            ranks = {x.shape[0]: "v_proj" in key for key, x in weights.items() if key[-1] == "b"}
            assert ranks == {1: False, 2: True}
            assert hash_tree(own) != hash_tree(padded)


def test_peft_is_converted_back_to_the_same_bits(pack, tmp_path):
    tasks = export(pack, "peft", tmp_path / "out")
    assert tasks == json.loads((tmp_path / "out" / "tasks.json").read_text())
    for task, name in tasks.items():
        adapter = pack.load(task)
        assert (name is None) == (adapter is None)
        if adapter:
            assert read_adapter(tmp_path / "out" / name, ALL).digest == adapter.digest


def test_torch_peft_has_the_logits_that_mlx_lm_has(pack, model, tmp_path):
    from mlx_lm import load as stock_load

    export(pack, "mlx", tmp_path / "mlx")
    tasks = export(pack, "peft", tmp_path / "peft")
    tokens = np.arange(1, 25)[None] * 7 % 250
    torch_base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        bare = torch_base(torch.tensor(tokens)).logits.numpy()
        for name in sorted({name for name in tasks.values() if name}):
            peft = PeftModel.from_pretrained(torch_base, tmp_path / "peft" / name).eval()
            theirs = peft(torch.tensor(tokens)).logits.numpy()
            torch_base = peft.unload()
            stock, _ = stock_load(str(model), adapter_path=str(tmp_path / "mlx" / name))
            assert np.abs(np.array(stock(mx.array(tokens))) - theirs).max() < 1e-4
            assert np.abs(bare - theirs).max() > 1e-2
