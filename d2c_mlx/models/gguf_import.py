"""Importing base models from GGUF: weights, config.json and tokenizer of an mlx-lm directory.

Blocks of 32 values at even distances stay packed as MLX's affine quantization; other quantized
types become float32, so that no value changes. The module of a tensor is the one whose name the
`gguf` package maps to it. What llama.cpp's `convert_hf_to_gguf.py` does to rows and norms is
undone, and where a file leaves out what a model needs, it is a constant of llama.cpp's loader:
https://github.com/ggml-org/llama.cpp.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGUFReader, ReaderTensor
from mlx.utils import tree_flatten

from d2c_mlx.adapters.gguf_format import ARCHITECTURES, gguf_names
from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.gguf_file import (
    GGUF_ERRORS,
    UnknownTypeError,
    float_rows,
    open_gguf,
    packed_rows,
)

# general.architecture -> mlx-lm's model_type of its first model.
_BASES = {name: kind for kind, (name, _) in reversed(ARCHITECTURES.items()) if kind != "stablelm"}
# Architectures for which mlx-lm has no scaled RoPE.
_UNSCALED = ("gemma2", "lfm2")
_TOKENIZER, _TEMPLATE = ("tokenizer.json", "tokenizer_config.json"), "chat_template.jinja"
# Pre-tokenizers that split digits from each other before GPT-2's rule; and GPT-2's rule alone.
_DIGITS = {"smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"}
_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat"}
# Llama 3's scaling of RoPE, of which a file has only the result.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
# Most characters of a token, and of all splits of all tokens: SmolLM2's vocabulary has 2.8 million.
_LONGEST, _MOST_SPLITS = 512, 1 << 26
# Most blocks, llama.cpp's LLAMA_MAX_LAYERS, and least tensors of one: Phi-3 has as many.
_MOST_BLOCKS, _LEAST_TENSORS = 512, 6
# Bytes of a file of weights, after which the next one begins.
_FILE_BYTES = 2 << 30
Get = Callable[..., Any]


def convert_gguf(path: Path, directory: Path) -> None:
    """Write config, weights and tokenizer of a model in GGUF as an mlx-lm directory.

    Args:
        path: the `.gguf` file. A tokenizer.json and tokenizer_config.json beside it are used
            instead of tokenizer and chat template inside it; a chat_template.jinja in any case.
        directory: existing, empty.

    Raises:
        ModelError: not a GGUF, of a family that has no map, or with a type or feature that is not
            understood.
        OSError: the directory cannot be written, as on a full disk.
    """
    what = "truncated, or not readable as GGUF; download it again"
    try:
        reader = open_gguf(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        what = ""
        _write_model(reader, metadata, path, directory)
    except UnknownTypeError as error:
        raise ModelError(
            f"{path}: {error}, which the installed gguf package does not read; update it, or give"
            " the model in another type (llama-quantize --allow-requantize)"
        ) from None
    except Exception as error:
        # The tokenizers package raises plain ones. By now an OSError is of a file that is written.
        ours = isinstance(error, (*GGUF_ERRORS, AttributeError)) or type(error) is Exception
        if not ours or (isinstance(error, OSError) and not what):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        what = what or "its metadata or tensors are not those of a model of its architecture"
        raise ModelError(f"{path}: {what} ({reason})") from None


def _write_model(reader: GGUFReader, metadata: dict[str, Any], path: Path, directory: Path) -> None:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    # Gemma's activations are larger than float16 can hold.
    wide = "BF16" in types or str(metadata.get("general.architecture")).startswith("gemma")
    dtype = mx.float32 if types == {"F32"} else mx.bfloat16 if wide else mx.float16
    factors = tensors.pop("rope_freqs.weight", None)
    _check_tokens(metadata["tokenizer.ggml.tokens"], path)
    config = config_of(
        metadata,
        "output.weight" not in tensors,
        str(dtype).removeprefix("mlx.core."),
        None if factors is None else float_rows(factors, factors.data),
        path,
    )
    parameters = _parameters(config, tensors, path)
    # The tokenizer may be missing, and weights take long, so they come after it.
    beside = tokenizer_beside(path)
    if len(beside) < len(_TOKENIZER):
        _write_tokenizer(metadata, directory, path)
    for file in beside:
        shutil.copyfile(file, directory / file.name)
    bits = _write_weights(parameters, tensors, config, dtype, directory)
    if bits:
        # The commonest bits, and modules that differ.
        common = max(set(bits.values()), key=list(bits.values()).count)
        other = {m: {"group_size": 32, "bits": b} for m, b in bits.items() if b != common}
        config["quantization"] = {"group_size": 32, "bits": common, **other}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check_tokens(tokens: list[str], path: Path) -> None:
    """Refuse tokens from which a tokenizer would take minutes: their splits grow as the square."""
    longest = max(map(len, tokens), default=0)
    splits = sum(len(token) ** 2 for token in tokens)
    if longest > _LONGEST or splits > _MOST_SPLITS:
        raise ModelError(
            f"{path}: {len(tokens):,} tokens of up to {longest:,} characters, {splits:,} in their"
            f" splits, expected at most {_LONGEST} and {_MOST_SPLITS:,}; give the mlx-lm directory"
        )


def tokenizer_beside(path: Path) -> list[Path]:
    """The tokenizer files beside a GGUF, used instead of the one inside; or a template alone."""
    files = [path.parent / name for name in (*_TOKENIZER, _TEMPLATE)]
    there = [file for file in files if file.exists()]
    return there if set(files[:2]) <= set(there) else [x for x in there if x.name == _TEMPLATE]


def config_of(
    metadata: Mapping[str, Any], tied: bool, dtype: str, factors: np.ndarray | None, path: Path
) -> dict[str, Any]:
    """config.json of the model in a GGUF file, whose head may be `tied`.

    `factors` is the tensor rope_freqs, `(head_dim / 2,)`, of Llama 3; `dtype` that of activations.

    Raises:
        ModelError: the architecture or its RoPE is not read, or a key is missing.
    """
    # A finished run is read without it.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = metadata.get("general.architecture")
    if architecture not in _BASES:
        raise ModelError(
            f"{path}: general.architecture is {architecture!r}, expected one of"
            f" {', '.join(sorted(_BASES))}; give the model's mlx-lm directory or hub id instead"
        )

    def get(key: str, default: object = None) -> Any:  # noqa: ANN401  of a stranger
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ModelError(f"{path}: metadata {architecture}.{key} is missing")
        return value

    model_type = _BASES[architecture]
    hidden, heads = get("embedding_length"), get("attention.head_count")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    stops = list(dict.fromkeys(end for end in ends if end is not None))
    config = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
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
    kind = get("rope.scaling.type", "none")
    if kind == "linear" and architecture not in _UNSCALED:
        config["rope_scaling"] = {"type": "linear", "factor": float(get("rope.scaling.factor"))}
    elif kind != "none":
        usual = "'none'" if architecture in _UNSCALED else "'none' or 'linear'"
        raise ModelError(
            f"{path}: rope.scaling.type is {kind!r}, expected {usual}; give the mlx-lm directory"
        )
    elif factors is not None and (factors != 1).any():
        config["rope_scaling"] = _llama3_scaling(factors, config, path)
    return config


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


def _llama3_scaling(factors: np.ndarray, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    width = config["head_dim"]
    waves = 2 * np.pi * config["rope_theta"] ** (np.arange(0, width, 2) / width)
    low, high = _LLAMA3.values()
    smooth = np.clip((_LLAMA3_CONTEXT / waves - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if expected.shape != factors.shape or np.abs(expected / factors - 1).max() > 1e-3:
        raise ModelError(
            f"{path}: rope_freqs.weight is not Llama 3's scaled RoPE; give the mlx-lm directory"
        )
    return {**scaling, "original_max_position_embeddings": _LLAMA3_CONTEXT}


def _write_tokenizer(metadata: Mapping[str, Any], directory: Path, path: Path) -> None:
    """Write the tokenizer that the metadata describes, as transformers' GGUF reader builds it."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    refused = (
        f"{path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not read from GGUF; put the"
        f" model's {' and '.join(_TOKENIZER)} beside the file"
    )
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer, gguf_tokenizer_mapping
    except ImportError:
        raise ModelError(f"{refused}, or update transformers") from None
    splits = _DIGITS | _GPT2 | set(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS)
    if kind not in ("gpt2", "llama") or (kind == "gpt2" and pre not in splits):
        raise ModelError(refused)
    names = gguf_tokenizer_mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    values = {theirs: metadata.get(f"tokenizer.{key}") for key, theirs in names.items()}
    stated = {name: value for name, value in values.items() if value is not None}
    tokenizer, _ = convert_gguf_tokenizer(metadata["general.architecture"], stated)
    if pre in _DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        number = stated.get(f"{name}_id")
        special[name] = None if number is None else stated["tokens"][int(number)]
    # llama.cpp begins a text of SentencePiece with BOS unless told otherwise.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token")),
        clean_up_tokenization_spaces=False,
        **special,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    try:
        fast.save_pretrained(directory)
    except Exception as error:
        # It is written in Rust, and gives the system's number in words only.
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None or isinstance(error, OSError):
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(directory)) from None


def _parameters(
    config: Mapping[str, Any], tensors: Mapping[str, ReaderTensor], path: Path
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of a tensor in the file -> name and shape of mlx-lm's parameter."""
    n, table = config["num_hidden_layers"], tensors["token_embd.weight"].shape
    most = min(_MOST_BLOCKS, len(tensors) // _LEAST_TENSORS)
    if not 0 < n <= most or f"blk.{n - 1}.ffn_down.weight" not in tensors:
        raise ValueError(f"{n} blocks in {len(tensors)} tensors")
    if [*map(int, table)] != [config["hidden_size"], config["vocab_size"]]:
        raise ValueError(f"token_embd.weight is {[*map(int, table)]}")
    # Now it has the size of its file, and may be built.
    architecture = import_module(f"mlx_lm.models.{config['model_type']}")
    # Parameters are never evaluated, only their names and shapes are read.
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    shapes = {
        name: x.shape
        for name, x in tree_flatten(model.parameters())
        if not (name.startswith("lm_head.") and config["tie_word_embeddings"])
    }
    names = gguf_names(config, sorted({name.rpartition(".")[0] for name in shapes}), path)
    # Newer files of LFM2 call its last norm as others do.
    also = {"model.embedding_norm": "output_norm"}
    places, missing = {}, []
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        inside = [f"{part}.{leaf}" for part in (names[module], also.get(module)) if part]
        there = next((place for place in inside if place in tensors), None)
        if there:
            places[there] = (name, shape)
        else:
            missing.append(inside[0] if inside else name)
    unknown = tensors.keys() - places.keys()
    if unknown or missing:
        raise ModelError(
            f"{path}: {len(unknown)} tensors are not understood, {len(missing)} are missing (first:"
            f" {min([*unknown, *missing])}): give the mlx-lm directory instead"
        )
    return places


def _write_weights(
    parameters: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Mapping[str, ReaderTensor],
    config: Mapping[str, Any],
    dtype: mx.Dtype,
    directory: Path,
) -> dict[str, int]:
    """Write files of weights, one at a time in memory; module -> bits of those that are packed."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    bits: dict[str, int] = {}
    pending: dict[str, mx.array] = {}
    n_files, last = 0, list(parameters)[-1]
    for name, (parameter, shape) in parameters.items():
        tensor, rows = tensors[name], tensors[name].data
        expected = tuple(int(k) for k in reversed(tensor.shape))
        if int(np.prod(shape)) != int(np.prod(expected)) or shape[0] != expected[0]:
            raise ValueError(f"{name} is {expected}, expected {tuple(shape)}")
        module = parameter.removesuffix(".weight")
        n = heads.get(module.rpartition(".")[2])
        if n and ARCHITECTURES[config["model_type"]][1]:
            # GGUF interleaves the two RoPE halves of a head; only rows move, so packed bytes too.
            width = rows.shape[1:]
            rows = rows.reshape(n, -1, 2, *width).swapaxes(1, 2).reshape(-1, *width)
        packed = packed_rows(tensor, rows) if len(shape) == 2 else None
        if packed:
            words, scales, biases = map(mx.array, packed)
            pending[parameter] = words
            pending[f"{module}.scales"], pending[f"{module}.biases"] = scales, biases
            bits[module] = words.shape[-1] // scales.shape[-1]
        else:
            x = mx.array(float_rows(tensor, rows)).reshape(shape)
            if "gemma" in config["model_type"] and x.ndim == 1:
                x = x - 1
            # Norms and the like are stored wider than they were trained.
            plain = tensor.tensor_type.name in ("F32", "BF16")
            pending[parameter] = x.astype(dtype) if plain else x
        if name == last or sum(x.nbytes for x in pending.values()) > _FILE_BYTES:
            file = directory / f"model{f'-{n_files}' if n_files else ''}.safetensors"
            # MLX gives no reason when it opens the file itself; here a full disk is an OSError.
            with open(file, "wb") as opened:
                mx.save_safetensors(opened, pending, metadata={"format": "mlx"})
            pending, n_files = {}, n_files + 1
    return bits
