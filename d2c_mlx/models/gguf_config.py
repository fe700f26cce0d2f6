"""What a GGUF file says of its model: mlx-lm's config.json, and the tokenizer.

Keys are those of llama.cpp's `convert_hf_to_gguf.py`, and where it leaves out what a model needs,
the constants of its loader: https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.utils.errors import ModelError

__all__ = ["FAMILIES", "TOKENIZER_FILES", "config_of", "write_tokenizer"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Pre-tokenizers that split digits from each other before GPT-2's rule.
_DIGITS = {"smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"}
# Those that are GPT-2's rule alone.
_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat"}
# Llama 3's scaling of RoPE, of which a file has only the result.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192

# Keys of yarn that mlx-lm has no field for, and the values that change nothing.
_YARN = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "attn_factor": 1.0,
         "yarn_log_multiplier": 0.0}  # fmt: skip
# general.architecture -> model_type, the class of transformers, and the kinds of scaled RoPE that
# mlx-lm has for it.
FAMILIES = {
    "gemma2": ("gemma2", "Gemma2ForCausalLM", ()),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM", ("linear",)),
    "granite": ("granite", "GraniteForCausalLM", ("linear", "yarn")),
    "lfm2": ("lfm2", "Lfm2ForCausalLM", ()),
    "llama": ("llama", "LlamaForCausalLM", ("linear", "yarn")),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", ("linear", "yarn")),
    "phi3": ("phi3", "Phi3ForCausalLM", ("linear",)),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", ("linear", "yarn")),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", ("linear", "yarn")),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", ("linear", "yarn")),
}
Get = Callable[..., Any]


def _of_family(architecture: str, get: Get, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of a family has beside that of a llama."""
    if architecture.startswith("gemma"):
        # The largest of each generation, by their number of blocks, scale by another width.
        largest = config["num_hidden_layers"] in (46, 62)
        width = config["hidden_size"] // config["num_attention_heads"]
        gemma = {
            "query_pre_attn_scalar": width if largest else config["head_dim"],
            "sliding_window": get("attention.sliding_window"),
        }
        if architecture == "gemma2":
            return gemma | {
                "attn_logit_softcapping": get("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": get("final_logit_softcapping", 30.0),
            }
        pattern = get("attention.sliding_window_pattern", 6)
        return gemma | {
            "rope_local_base_freq": get("rope.freq_base_swa", 10000.0),
            "sliding_window_pattern": pattern if isinstance(pattern, int) else 6,
        }
    if architecture == "granite":
        return {
            "logits_scaling": get("logit_scale"),
            "attention_multiplier": get("attention.scale"),
            "embedding_multiplier": get("embedding_scale"),
            "residual_multiplier": get("residual_scale"),
            "attention_bias": False,
            "mlp_bias": False,
        }
    if architecture == "lfm2":
        # Blocks without key heads are convolutions.
        heads = [int(n) for n in get("attention.head_count_kv")]
        return {
            "num_key_value_heads": max(heads),
            "layer_types": ["full_attention" if n else "conv" for n in heads],
            "norm_eps": get("attention.layer_norm_rms_epsilon"),
            "conv_L_cache": get("shortconv.l_cache"),
            "conv_bias": False,
            "block_dim": config["hidden_size"],
            "block_auto_adjust_ff_dim": False,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
        }
    if architecture == "phi3":
        width = config["head_dim"]
        return {"partial_rotary_factor": get("rope.dimension_count", width) / width}
    return {}


def config_of(
    metadata: Mapping[str, Any], tied: bool, dtype: str, factors: np.ndarray | None, path: Path
) -> dict[str, Any]:
    """config.json of the model in a GGUF file.

    Args:
        metadata: key -> value; lists are whole.
        tied: the file has no head of its own.
        dtype: the dtype of activations.
        factors: the tensor rope_freqs, `(head_dim / 2,)`, of Llama 3.
        path: the file, for messages.

    Raises:
        ModelError: the architecture or its RoPE is not read, or a key is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise ModelError(
            f"{path}: general.architecture is {architecture!r}, expected one of"
            f" {', '.join(FAMILIES)}; give the model's mlx-lm directory or hub id instead"
        )

    def get(key: str, default: object = None) -> Any:  # noqa: ANN401  of a stranger
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ModelError(f"{path}: metadata {architecture}.{key} is missing")
        return value

    model_type, kind, scalings = FAMILIES[architecture]
    hidden, heads = get("embedding_length"), get("attention.head_count")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    stops = list(dict.fromkeys(end for end in ends if end is not None))
    config = {
        "architectures": [kind],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "max_position_embeddings": get("context_length"),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        # llama.cpp stops at either.
        "eos_token_id": stops if len(stops) > 1 else ends[0],
        "torch_dtype": dtype,
    }
    if model_type != "llama":
        # transformers' default is a token of the family's first model.
        config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    config.update(_of_family(architecture, get, config))
    scaling = _rope_scaling(get, scalings, factors, config, path)
    return {**config, "rope_scaling": scaling} if scaling else config


def _rope_scaling(
    get: Get,
    scalings: Sequence[str],
    factors: np.ndarray | None,
    config: Mapping[str, Any],
    path: Path,
) -> dict[str, Any] | None:
    kind, instead = get("rope.scaling.type", "none"), "give the mlx-lm directory instead"
    if kind not in ("none", *scalings):
        kinds = " or ".join(map(repr, ("none", *scalings)))
        raise ModelError(f"{path}: rope.scaling.type is {kind!r}, expected {kinds}: {instead}")
    if kind == "linear":
        return {"type": "linear", "factor": float(get("rope.scaling.factor"))}
    if kind == "yarn":
        for key, usual in _YARN.items():
            if (value := get(f"rope.scaling.{key}", usual)) != usual:
                raise ModelError(
                    f"{path}: rope.scaling.{key} is {value}, expected {usual:g} or none: {instead}"
                )
        return {
            "rope_type": "yarn",
            "factor": float(get("rope.scaling.factor")),
            "original_max_position_embeddings": int(get("rope.scaling.original_context_length")),
            "beta_fast": float(get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(get("rope.scaling.yarn_beta_slow", 1.0)),
        }
    if factors is None or (factors == 1).all():
        return None
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3,
               "original_max_position_embeddings": _LLAMA3_CONTEXT}  # fmt: skip
    width = config["head_dim"]
    waves = 2 * np.pi * config["rope_theta"] ** (np.arange(0, width, 2) / width)
    low, high = _LLAMA3.values()
    smooth = np.clip((_LLAMA3_CONTEXT / waves - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if expected.shape != factors.shape or np.abs(expected / factors - 1).max() > 1e-3:
        raise ModelError(f"{path}: rope_freqs.weight is not the scaled RoPE of Llama 3; {instead}")
    return scaling


def write_tokenizer(metadata: Mapping[str, Any], directory: Path, path: Path) -> None:
    """Write the tokenizer that the metadata describes, as transformers' GGUF reader builds it.

    Args:
        metadata: key -> value; lists are whole.
        directory: where tokenizer.json and its config go.
        path: the file, for messages.

    Raises:
        ModelError: the file has none, or one that is not known.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    refused = (
        f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not read from GGUF; put the"
        f" model's {' and '.join(TOKENIZER_FILES)} beside the file"
    )
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        raise ModelError(f"{refused}, or update transformers") from None
    splits = _DIGITS | _GPT2 | set(GGUF_PRE_TOKENIZER_SPLITS)
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and pre not in splits):
        raise ModelError(refused)

    def ggml(name: str) -> Any:  # noqa: ANN401  of a stranger
        return metadata.get(f"tokenizer.ggml.{name}")

    names = {"tokens": "tokens", "scores": "scores", "token_type": "token_type", "merges": "merges",
             "model": "tokenizer_type", "pre": "pre_tokenizer_type"}  # fmt: skip
    stated = {ours: ggml(name) for name, ours in names.items() if ggml(name) is not None}
    tokenizer, _ = convert_gguf_tokenizer(metadata["general.architecture"], stated)
    if pre in _DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
    ids = {name: ggml(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    special = {n: None if i is None else stated["tokens"][int(i)] for n, i in ids.items()}
    add_bos = ggml("add_bos_token")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        # llama.cpp begins a text of SentencePiece with it unless told otherwise.
        add_bos_token=kind == "llama" if add_bos is None else bool(add_bos),
        add_eos_token=bool(ggml("add_eos_token")),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    fast.save_pretrained(directory)
