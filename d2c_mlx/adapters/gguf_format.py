"""Reading and writing LoRA adapters of llama.cpp, in GGUF.

Tensors are `<name>.weight.lora_a (r, in)` and `.lora_b (out, r)`, the scale of each is alpha / r.
Names and rows are those of the base as llama.cpp converts it: some architectures have the rows of q
and k interleaved. Source: `convert_lora_to_gguf.py` and `llama-adapter.cpp`,
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    Keys,
    get_tensor_name_map,
)

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.checks import check_adapter, check_finite, pair_problems
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.gguf_file import GGUF_ERRORS, open_gguf

__all__ = ["ARCHITECTURES", "gguf_names", "is_gguf_lora", "read_gguf_lora", "save_gguf_lora"]

# mlx-lm's model_type -> general.architecture in GGUF, and True if its q and k rows are interleaved
# there.
ARCHITECTURES = {
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "granite": ("granite", True),
    "lfm2": ("lfm2", False),
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "olmo2": ("olmo2", False),
    "phi3": ("phi3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "smollm3": ("smollm3", True),
    "stablelm": ("stablelm", False),
}
_TENSOR = re.compile(r"(?P<name>.+)\.weight\.(?P<leaf>lora_[ab])")
_TYPES = {
    GGMLQuantizationType.F32: mx.float32,
    GGMLQuantizationType.F16: mx.float16,
    GGMLQuantizationType.BF16: mx.bfloat16,
}


def is_gguf_lora(head: bytes) -> bool:
    """True if a file with this head is a GGUF whose general.type says that it is an adapter.

    Args:
        head: some 64 KB from the file's start; converters write that key among the first.
    """
    text = (len(b"adapter")).to_bytes(8, "little") + b"adapter"
    string = (8).to_bytes(4, "little")  # GGUFValueType.STRING
    return head[:4] == b"GGUF" and Keys.General.TYPE.encode() + string + text in head


def gguf_names(architecture: str, n_layers: int, modules: Iterable[str]) -> dict[str, str | None]:
    """Module path -> its name in a GGUF, None where it has none."""
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(kind, n_layers)
    return {module: known.get_name(module) for module in modules}


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Last part of a module path -> number of heads, for modules whose rows are interleaved."""
    if not ARCHITECTURES[config["model_type"]][1]:
        return {}
    n = int(config["num_attention_heads"])
    return {"q_proj": n, "k_proj": int(config.get("num_key_value_heads") or n)}


def read_gguf_lora(
    path: Path, shapes: Mapping[str, tuple[int, int]], config: Mapping[str, Any] | None
) -> Adapter:
    """Read one adapter, with names and rows as mlx-lm has them in the base model.

    `read_adapter` calls it for a `.gguf`.

    Args:
        path: the file; the adapter gets its name.
        shapes: module path -> (in, out) of the base model's linear modules.
        config: the base model's config.json.

    Raises:
        AdapterError: the file is no GGUF or no LoRA, quantized, or of another base model.
    """
    metadata, tensors = _read(path)
    architecture = metadata.get(Keys.General.ARCHITECTURE)
    model_type = (config or {}).get("model_type")
    expected = ARCHITECTURES.get(str(model_type), (None, False))[0]
    if config is None or expected is None:
        raise AdapterError(
            f"{path}: the base model's model_type is {model_type!r}, whose names and rows in GGUF"
            f" are not known here; expected one of {', '.join(ARCHITECTURES)}: give the adapter as"
            " PEFT or MLX"
        )
    if architecture != expected:
        raise AdapterError(
            f"{path}: general.architecture is {architecture!r}, expected {expected!r}: the adapter"
            " is of another base model"
        )
    names = gguf_names(expected, int(config["num_hidden_layers"]), shapes)
    modules = {name: module for module, name in names.items() if name is not None}
    adapter = _adapter(path, tensors, modules, metadata.get(Keys.Adapter.LORA_ALPHA))
    check_adapter(adapter, shapes, path)
    heads = _heads(config)
    placed = {}
    for module, lora in adapter.modules.items():
        n = heads.get(module.rpartition(".")[2])
        # The inverse of what `save_gguf_lora` does, on columns.
        b = lora.b.reshape(lora.rank, n, -1, 2).swapaxes(2, 3) if n else lora.b
        placed[module] = LoRA(lora.a, mx.contiguous(b.reshape(lora.b.shape)), lora.scale)
    return Adapter(path.stem, placed)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Metadata and tensors of a LoRA, in memory."""
    keys = (Keys.General.TYPE, Keys.General.ARCHITECTURE, Keys.Adapter.TYPE,
            Keys.Adapter.LORA_ALPHA, Keys.Adapter.ALORA_INVOCATION_TOKENS)  # fmt: skip
    try:
        reader = open_gguf(path)
        metadata = {key: field.contents() for key in keys if (field := reader.get_field(key))}
        tensors, problems = {}, []
        for key, value in ((Keys.General.TYPE, GGUFType.ADAPTER), (Keys.Adapter.TYPE, "lora")):
            if metadata.get(key) != value:
                problems.append(f"{path}: {key} is {metadata.get(key)!r}, expected {value!r}")
        quantized = [t for t in reader.tensors if t.tensor_type not in _TYPES]
        if quantized:
            problems.append(
                f"{path}: {len(quantized)} tensors are quantized or no floats (first:"
                f" {quantized[0].name}, {quantized[0].tensor_type.name}), expected F32, F16 or"
                " BF16: convert the adapter again with --outtype f16"
            )
        if Keys.Adapter.ALORA_INVOCATION_TOKENS in metadata:
            problems.append(f"{path}: an aLoRA, which acts only after its invocation tokens")
        for tensor in [] if problems else reader.tensors:
            x = mx.array(np.array(tensor.data))
            kind = _TYPES[tensor.tensor_type]
            tensors[tensor.name] = x.view(kind) if kind == mx.bfloat16 else x
    except GGUF_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise AdapterError(
            f"{path}: truncated, or not readable as GGUF ({reason}); copy it again"
        ) from None
    if problems:
        raise AdapterError(problems)
    return metadata, tensors


def _adapter(
    path: Path, tensors: Mapping[str, mx.array], modules: Mapping[str, str], alpha: object
) -> Adapter:
    """The adapter with module paths of mlx-lm, its rows still as they are in the file."""
    check_finite(tensors, path)
    if not isinstance(alpha, float | int | None) or not 0 <= (alpha or 0) < float("inf"):
        raise AdapterError(f"{path}: {Keys.Adapter.LORA_ALPHA} is {alpha!r}, expected a number")
    pairs: dict[str, dict[str, mx.array]] = {}
    unknown = []
    for name, x in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        module = modules.get(match["name"]) if match else None
        if match is None or module is None or x.ndim != 2:
            unknown.append(name)
        else:
            pairs.setdefault(module, {})[match["leaf"]] = x.T
    problems = pair_problems(path, pairs, ("lora_a", "lora_b"))
    if unknown or not tensors:
        problems.append(
            f"{path}: {len(unknown)} of {len(tensors)} tensors are no factor of a linear module of"
            f" the base model's blocks (first: {unknown[0] if unknown else None}); embeddings and"
            " output cannot carry a LoRA that every runtime loads"
        )
    if problems:
        raise AdapterError(problems)
    found = {}
    for module, pair in sorted(pairs.items()):
        a, b = (mx.contiguous(pair[leaf]) for leaf in ("lora_a", "lora_b"))
        # As llama.cpp's get_scale: no alpha is a scale of 1.
        found[module] = LoRA(a, b, alpha / a.shape[1] if alpha else 1.0)
    return Adapter(path.stem, found)


def save_gguf_lora(adapter: Adapter, path: Path, config: Mapping[str, Any]) -> None:
    """Write one adapter for llama.cpp, whose base is what llama.cpp converts the model to.

    Factors are `lora_a (r, in)` and `lora_b (out, r)` with one rank, padded if need be, and alpha =
    scale * rank. float16 and float32 stay, bfloat16 becomes float32: not every backend has it.

    Args:
        adapter: an adapter of the model that `config` describes.
        path: the file to write.
        config: the base model's config.json, its model_type one of `ARCHITECTURES`.

    Raises:
        AdapterError: modules that have no name in GGUF; nothing is written.
    """
    architecture, _ = ARCHITECTURES[config["model_type"]]
    names = gguf_names(architecture, int(config["num_hidden_layers"]), adapter.modules)
    unknown = [module for module, name in names.items() if name is None]
    if unknown:
        raise AdapterError(
            f"{adapter.name}: {len(unknown)} modules have no name in a GGUF of {architecture!r}"
            f" (first: {min(unknown)}); llama.cpp could not place them"
        )
    heads = _heads(config)
    modules = adapter.uniform().modules
    first = next(iter(modules.values()))
    writer = GGUFWriter(path, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, first.scale * first.rank)
    writer.add_name(adapter.name)
    for module, lora in sorted(modules.items()):
        a, b = (np.array(_exact(x).T, order="C") for x in (lora.a, lora.b))
        n = heads.get(module.rpartition(".")[2])
        if n:
            # The inverse of what `gguf_import.py` does to the rows of the base.
            b = b.reshape(n, 2, -1, lora.rank).swapaxes(1, 2).reshape(b.shape)
        writer.add_tensor(f"{names[module]}.weight.lora_a", a)
        writer.add_tensor(f"{names[module]}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _exact(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if x.dtype == mx.bfloat16 else x
