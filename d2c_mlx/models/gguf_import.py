"""Importing base models from GGUF.

Blocks of 32 values at even distances stay packed as MLX's affine quantization; other quantized
types become float32, so that no value changes. The module of a tensor is the one whose name the
`gguf` package maps to it. What llama.cpp's `convert_hf_to_gguf.py` does to rows and norms is
undone, https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGUFReader, ReaderTensor
from mlx.utils import tree_flatten

from d2c_mlx.adapters.gguf_format import ARCHITECTURES, gguf_names
from d2c_mlx.models.gguf_config import TOKENIZER_FILES, config_of, write_tokenizer
from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.gguf_file import (
    GGUF_ERRORS,
    UnknownTypeError,
    float_rows,
    open_gguf,
    packed_rows,
)

__all__ = ["convert_gguf", "tokenizer_beside"]

# The chat template's file in transformers 5; before, it was a key of tokenizer_config.json.
_TEMPLATE = "chat_template.jinja"
# Bytes of a file of weights, after which the next one begins.
_FILE_BYTES = 2 << 30


def convert_gguf(path: Path, directory: Path) -> None:
    """Write config, weights and tokenizer of a model in GGUF as an mlx-lm directory.

    Args:
        path: the `.gguf` file. A tokenizer.json and tokenizer_config.json beside it are used
            instead of the tokenizer inside it; a chat_template.jinja in any case. Its own chat
            template is used only where these files have none.
        directory: existing, empty.

    Raises:
        ModelError: not a GGUF, of a family that has no map, or with a type or feature that is not
            understood.
        OSError: the directory cannot be written, as on a full disk.
    """
    opened = False
    try:
        reader = open_gguf(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        opened = True
        _write_model(reader, metadata, path, directory)
    except UnknownTypeError as error:
        raise ModelError(
            f"{path}: {error}, which the installed gguf package does not read; update it, or give"
            " the model in another type (llama-quantize --allow-requantize)"
        ) from None
    except (*GGUF_ERRORS, AttributeError) as error:
        if isinstance(error, OSError) and opened:
            # The file is mapped by now, so this is a file that is copied or written.
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        what = (
            "its metadata or tensors are not those of a model of its architecture"
            if opened
            else "truncated, or not readable as GGUF; download it again"
        )
        raise ModelError(f"{path}: {what} ({reason})") from None


def _write_model(reader: GGUFReader, metadata: dict[str, Any], path: Path, directory: Path) -> None:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    if types == {"F32"}:
        dtype = mx.float32
    else:
        # Gemma's activations are larger than float16 can hold.
        wide = "BF16" in types or str(metadata.get("general.architecture")).startswith("gemma")
        dtype = mx.bfloat16 if wide else mx.float16
    factors = tensors.pop("rope_freqs.weight", None)
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
    if len(beside) < len(TOKENIZER_FILES):
        try:
            write_tokenizer(metadata, directory, path)
        except Exception as error:
            # The `tokenizers` package writes in Rust, and gives the system's number in words only.
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None or isinstance(error, OSError):
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(directory)) from None
    for file in beside:
        shutil.copyfile(file, directory / file.name)
    template = metadata.get("tokenizer.chat_template")
    if len(beside) > 1 and isinstance(template, str) and not _has_template(beside):
        (directory / _TEMPLATE).write_text(template, encoding="utf-8")
    bits = _write_weights(_weights(parameters, tensors, config, dtype), directory)
    if bits:
        # The commonest bits, and modules that differ.
        common = max(set(bits.values()), key=list(bits.values()).count)
        other = {m: {"group_size": 32, "bits": b} for m, b in bits.items() if b != common}
        config["quantization"] = {"group_size": 32, "bits": common, **other}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokenizer_beside(path: Path) -> list[Path]:
    """The tokenizer files beside a GGUF, used instead of the one inside; or a template alone."""
    files = [path.parent / name for name in (*TOKENIZER_FILES, _TEMPLATE)]
    there = [file for file in files if file.exists()]
    return there if set(files[:2]) <= set(there) else [x for x in there if x.name == _TEMPLATE]


def _has_template(files: Sequence[Path]) -> bool:
    """True if tokenizer files have a chat template, in their config or in a file of its own."""
    (path,) = (file for file in files if file.name == TOKENIZER_FILES[1])
    try:
        # Not by `parse_json`: transformers writes 10 ** 30 for no limit of tokens.
        config = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return bool(config.get("chat_template")) or any(file.name == _TEMPLATE for file in files)


def _parameters(
    config: Mapping[str, Any], tensors: Mapping[str, ReaderTensor], path: Path
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name of a tensor in the file -> name and shape of mlx-lm's parameter."""
    if not 0 < config["num_hidden_layers"] <= len(tensors):
        raise ValueError(f"{config['num_hidden_layers']} blocks in {len(tensors)} tensors")
    architecture = import_module(f"mlx_lm.models.{config['model_type']}")
    # Parameters are never evaluated, only their names and shapes are read.
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    shapes = {
        name: x.shape
        for name, x in tree_flatten(model.parameters())
        if not (name.startswith("lm_head.") and config["tie_word_embeddings"])
    }
    modules = sorted({name.rpartition(".")[0] for name in shapes})
    names = gguf_names(config, modules)
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
    unknown = sorted(tensors.keys() - places.keys())
    problems = [
        f"{path}: {len(group)} tensors are {words} (first: {min(group)}); {remedy}: give the"
        " mlx-lm directory instead"
        for group, words, remedy in (
            (unknown, "not understood", "scaled RoPE, biases and experts are not read from GGUF"),
            (missing, "missing", "the model has them"),
        )
        if group
    ]
    if problems:
        raise ModelError(problems)
    return places


def _weights(
    parameters: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Mapping[str, ReaderTensor],
    config: Mapping[str, Any],
    dtype: mx.Dtype,
) -> Iterator[tuple[str, list[mx.array]]]:
    """Yield the name of every parameter and its values: an array, or words, scales and biases."""
    n = config["num_attention_heads"]
    heads = {"q_proj": n, "k_proj": config["num_key_value_heads"]}
    for name, (parameter, shape) in parameters.items():
        tensor, rows = tensors[name], tensors[name].data
        expected = tuple(int(k) for k in reversed(tensor.shape))
        if int(np.prod(shape)) != int(np.prod(expected)) or shape[0] != expected[0]:
            raise ValueError(f"{name} is {expected}, expected {tuple(shape)}")
        last = parameter.split(".")[-2]
        if ARCHITECTURES[config["model_type"]][1] and last in heads:
            # GGUF interleaves the two RoPE halves of a head; only rows move, so packed bytes too.
            width = rows.shape[1:]
            rows = rows.reshape(heads[last], -1, 2, *width).swapaxes(1, 2).reshape(-1, *width)
        packed = packed_rows(tensor, rows) if len(shape) == 2 else None
        if packed:
            yield parameter, [mx.array(x) for x in packed]
            continue
        x = mx.array(float_rows(tensor, rows)).reshape(shape)
        if "gemma" in config["model_type"] and x.ndim == 1:
            x = x - 1
        # Norms and the like are stored wider than they were trained.
        plain = tensor.tensor_type.name in ("F32", "BF16")
        yield parameter, [x.astype(dtype) if plain else x]


def _write_weights(
    weights: Iterator[tuple[str, list[mx.array]]], directory: Path
) -> dict[str, int]:
    """Write files of weights, one at a time in memory; module -> bits of those that are packed."""
    bits: dict[str, int] = {}
    pending: dict[str, mx.array] = {}
    n_files = 0

    def write() -> None:
        name = f"model-{n_files}" if n_files else "model"
        # MLX gives no reason when it opens the file itself; here a full disk is an OSError.
        with open(directory / f"{name}.safetensors", "wb") as file:
            mx.save_safetensors(file, pending, metadata={"format": "mlx"})
        pending.clear()

    for parameter, arrays in weights:
        pending[parameter] = arrays[0]
        if len(arrays) > 1:
            module = parameter.removesuffix(".weight")
            pending[f"{module}.scales"], pending[f"{module}.biases"] = arrays[1:]
            bits[module] = arrays[0].shape[-1] // arrays[1].shape[-1]
        if sum(x.nbytes for x in pending.values()) > _FILE_BYTES:
            write()
            n_files += 1
    if pending:
        write()
    return bits
