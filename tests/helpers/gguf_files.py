"""GGUF files of the tiny model and its adapters, written and read by llama.cpp's rules."""

import json

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, Keys
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten

from d2c_mlx.models.model import Model
from helpers.tiny import HEADS, HIDDEN, KV_HEADS, LAYERS

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(w, heads):
    """llama.cpp's `LlamaModel.permute`, which its converter applies to q and k."""
    split = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return split.swapaxes(1, 2).reshape(w.shape)


def write_gguf(source, path, dtype, **changes):
    """A tiny mlx-lm model directory as llama.cpp would convert it; tokenizer files go beside."""
    model, config = Model(str(source)).model, json.loads((source / "config.json").read_text())
    tensors = {}
    for name, x in tree_flatten(model.parameters()):
        x = np.array(x)
        if name.startswith("model.layers."):
            module = name.removesuffix(".weight")
            x, name = in_llama_rows(module, x), gguf_name(module)
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight",
                    "model.norm.weight": "output_norm.weight"}[name]  # fmt: skip
        tensors[name] = mx.array(x).astype(mx.float32 if x.ndim == 1 else dtype)
    tokens = [str(i) for i in range(config["vocab_size"])]
    metadata = {
        "general.architecture": "llama",
        "llama.embedding_length": mx.array(HIDDEN, mx.uint32),
        "llama.block_count": mx.array(LAYERS, mx.uint32),
        "llama.feed_forward_length": mx.array(config["intermediate_size"], mx.uint32),
        "llama.attention.head_count": mx.array(HEADS, mx.uint32),
        "llama.attention.head_count_kv": mx.array(KV_HEADS, mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(config["rms_norm_eps"], mx.float32),
        "llama.rope.freq_base": mx.array(config.get("rope_theta", 10000.0), mx.float32),
        "llama.context_length": mx.array(128, mx.uint32),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "other",
        **changes,
    }
    extra = metadata.pop("tensors", {})
    mx.save_gguf(str(path), {**tensors, **extra}, metadata)
    return path


def read_gguf(path):
    """Metadata, and per module of the base dW in llama.cpp's row order, by its own formula."""
    reader = GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
               for tensor in reader.tensors}  # fmt: skip
    deltas = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        # llama.cpp's `get_scale`: alpha / rank, the rank of each tensor; 1 without alpha.
        alpha = metadata.get("adapter.lora.alpha")
        deltas[name] = (alpha / b.shape[1] if alpha else 1.0) * (b @ a)
    assert not tensors
    return metadata, deltas


def gguf_name(path):
    _, _, block, module = path.split(".", 3)
    return f"blk.{block}.{NAMES[module]}.weight"


def in_llama_rows(path, delta):
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(path.rpartition(".")[2])
    return permuted(delta, heads) if heads else delta


def write_lora(path, adapter, **changes):
    """As llama.cpp's `convert_lora_to_gguf.py` does, by its rules and not by our writer."""
    options = {
        "type": GGUFType.ADAPTER, "kind": "lora", "alpha": 6.0, "arch": "llama",
        "dtype": np.float32, "quant": None, "extra": {}, "tokens": None, **changes,
    }  # fmt: skip
    writer = GGUFWriter(path, options["arch"])
    writer.add_type(options["type"])
    writer.add_name("A name that is not the file's")
    writer.add_string(Keys.Adapter.TYPE, options["kind"])
    if options["alpha"] is not None:
        writer.add_float32(Keys.Adapter.LORA_ALPHA, options["alpha"])
    if options["tokens"]:
        writer.add_array(Keys.Adapter.ALORA_INVOCATION_TOKENS, options["tokens"])
    for module, lora in adapter.modules.items():
        a, b = (np.array(x.astype(mx.float32)).T for x in (lora.a, lora.b))
        for leaf, x in (("lora_a", a), ("lora_b", in_llama_rows(module, b))):
            x, raw = np.ascontiguousarray(x).astype(options["dtype"]), options["quant"]
            # Quantization works in blocks of 32: only of a.
            if leaf == "lora_b" and raw != GGMLQuantizationType.BF16:
                raw = None
            x = quantize(x, raw) if raw else x
            writer.add_tensor(f"{gguf_name(module)}.{leaf}", x, raw_dtype=raw)
    for name, x in options["extra"].items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
