"""Importing llama-type base models from GGUF.

Q4_0, Q4_1 and Q8_0 stay packed: `mx.load` reads them as MLX affine quantization with groups of
32. Tensor names and the RoPE row permutation follow llama.cpp's `convert_hf_to_gguf.py`,
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.gguf_file import GGUF_ERRORS, open_gguf

__all__ = ["convert_gguf", "tokenizer_beside"]

_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|scales|biases)")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# GGMLQuantizationType that MLX reads. Tensors of the newest ones it leaves out without a word.
_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "I8", "I16", "I32")
# The chat template's file in transformers 5; before, it was a key of tokenizer_config.json.
_TEMPLATE = "chat_template.jinja"


def convert_gguf(path: Path, directory: Path) -> None:
    """Write config, weights and tokenizer of a llama-type GGUF as an mlx-lm directory.

    Args:
        path: the `.gguf` file. A tokenizer.json and tokenizer_config.json beside it are used
            instead of the tokenizer inside it, with a chat_template.jinja if there is one; its own
            chat template only where these files have none.
        directory: existing, empty.

    Raises:
        ModelError: not a GGUF, not a llama-type model, or a feature that is not understood.
    """
    try:
        # MLX's own reader trusts every length and offset, to the point of a segmentation fault.
        types = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(path).tensors}
        unread = sorted(name for name, kind in types.items() if kind not in _TYPES)
        if unread:
            raise ModelError(
                f"{path}: {len(unread)} tensors are of a type that MLX does not read (first:"
                f" {unread[0]}, {types[unread[0]]}), expected {', '.join(_TYPES)}; give the model"
                " in one of these"
            )
        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
    except GGUF_ERRORS as error:
        raise ModelError(
            f"{path}: truncated, or not readable as GGUF ({error}); download it again"
        ) from None
    try:
        _write_model(loaded, path, directory)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: its metadata or tensors are not those of a llama-type model"
            f" ({type(error).__name__}: {error})"
        ) from None


def _write_model(loaded: Any, path: Path, directory: Path) -> None:  # noqa: ANN401  of mx.load
    weights, metadata = loaded[0], {key: _plain(value) for key, value in loaded[1].items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(
            f"{path}: general.architecture is {architecture!r}, expected 'llama'; give the"
            " model's mlx-lm directory or hub id instead"
        )
    tensors = _rename(weights, metadata, path)
    config = _config(tensors, metadata, path)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    beside = tokenizer_beside(path)
    if beside:
        for file in beside:
            shutil.copyfile(file, directory / file.name)
        template = metadata.get("tokenizer.chat_template")
        if isinstance(template, str) and not _has_template(beside):
            (directory / _TEMPLATE).write_text(template, encoding="utf-8")
    else:
        _write_tokenizer(metadata, directory, path)


def tokenizer_beside(path: Path) -> list[Path]:
    """The tokenizer files beside a GGUF, used instead of the one inside; none unless complete."""
    files = [path.parent / name for name in (*_TOKENIZER_FILES, _TEMPLATE)]
    there = [file for file in files if file.exists()]
    return there if set(files[:2]) <= set(there) else []


def _has_template(files: Sequence[Path]) -> bool:
    """True if tokenizer files have a chat template, in their config or in a file of its own."""
    (path,) = (file for file in files if file.name == _TOKENIZER_FILES[1])
    try:
        # Not by `parse_json`: transformers writes 10 ** 30 for no limit of tokens.
        config = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return bool(config.get("chat_template")) or any(file.name == _TEMPLATE for file in files)


def _plain(value: Any) -> Any:  # noqa: ANN401  GGUF metadata is any JSON-like value
    if isinstance(value, mx.array):
        return value.tolist()
    return value


def _rename(
    weights: dict[str, mx.array], metadata: dict[str, Any], path: Path
) -> dict[str, mx.array]:
    """GGUF names -> mlx-lm names, q and k rows un-permuted, floats in float16."""
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata.get(
            "llama.attention.head_count_kv", metadata["llama.attention.head_count"]
        ),
    }
    tensors, unknown = {}, []
    for name, x in weights.items():
        match = _TENSOR.fullmatch(name)
        block, part, leaf = match.groups() if match else (None, "", "")
        target = _TOP.get(part) if block is None else _BLOCK.get(part)
        if target is None:
            unknown.append(name)
            continue
        if part in heads:
            # GGUF interleaves the two RoPE halves of a head; only rows move, so packed words too.
            n, width = heads[part], x.shape[-1]
            x = x.reshape(n, -1, 2, width).swapaxes(1, 2).reshape(-1, width)
        if mx.issubdtype(x.dtype, mx.floating):
            x = x.astype(mx.float16)
        prefix = f"model.layers.{block}." if block is not None else ""
        tensors[f"{prefix}{target}.{leaf}"] = x
    if unknown:
        raise ModelError(
            f"{path}: {len(unknown)} tensors are not understood (first: {min(unknown)}); scaled"
            " RoPE, biases and experts are not read from GGUF: give the mlx-lm directory instead"
        )
    return tensors


def _config(
    tensors: dict[str, mx.array], metadata: dict[str, Any], path: Path
) -> dict[str, object]:
    def get(key: str, default: object = None) -> Any:  # noqa: ANN401
        value = metadata.get(f"llama.{key}", default)
        if value is None:
            raise ModelError(f"{path}: metadata llama.{key} is missing")
        return value

    if get("rope.scaling.type", "none") != "none":
        raise ModelError(f"{path}: llama.rope.scaling.type is not 'none'; it is not read from GGUF")
    hidden, n_heads = get("embedding_length"), get("attention.head_count")
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": get("attention.head_count_kv", n_heads),
        "head_dim": get("attention.key_length", hidden // n_heads),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "max_position_embeddings": get("context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
    }
    quantization = _quantization(tensors)
    if quantization:
        config["quantization"] = quantization
    return config


def _quantization(tensors: dict[str, mx.array]) -> dict[str, object]:
    """The `quantization` entry of mlx-lm's config: the commonest bits, and modules that differ."""
    bits = {}
    for name, scales in tensors.items():
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            words = tensors[f"{module}.weight"].shape[-1]
            bits[module] = words * 32 // (scales.shape[-1] * 32)
    if not bits:
        return {}
    common = max(set(bits.values()), key=list(bits.values()).count)
    differing = {m: {"group_size": 32, "bits": b} for m, b in bits.items() if b != common}
    return {"group_size": 32, "bits": common, **differing}


def _write_tokenizer(metadata: dict[str, Any], directory: Path, path: Path) -> None:
    """Build the byte-level BPE tokenizer that the metadata describes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2"):
        raise ModelError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not read from GGUF; put the"
            f" model's {' and '.join(_TOKENIZER_FILES)} beside the file"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([digits, byte_level]) if pre == "smollm" else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
    special = [t for t, k in zip(tokens, metadata["tokenizer.ggml.token_type"]) if k == control]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])

    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[int(index)]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    fast.save_pretrained(directory)
