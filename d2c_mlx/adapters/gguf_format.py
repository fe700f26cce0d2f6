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
from d2c_mlx.adapters.gguf_factors import QUANTIZED, Factor, GgufAdapter, factors_of
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.gguf_file import GGUF_ERRORS, open_gguf

__all__ = [
    "ARCHITECTURES",
    "export_names",
    "gguf_names",
    "gguf_nbytes",
    "is_gguf_lora",
    "read_gguf",
    "read_gguf_lora",
    "save_gguf",
    "save_gguf_lora",
]

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
# Bytes that a tensor's place is a multiple of, the least that the format allows; its usual 32 take
# two bytes in a hundred of a small file. llama.cpp copies each tensor to where it needs it.
_ALIGNMENT = 8
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

    `read_adapter` calls it for a `.gguf`. Quantized factors become float32.

    Args:
        path: the file; the adapter gets its name.
        shapes: module path -> (in, out) of the base model's linear modules.
        config: the base model's config.json.

    Raises:
        AdapterError: the file is no GGUF or no LoRA, of types that are not known here, or of
            another base model.
    """
    adapter = read_gguf(path, shapes, config)
    check_adapter(adapter, shapes, path)
    return adapter


def read_gguf(path: Path, modules: Iterable[str], config: Mapping[str, Any] | None) -> Adapter:
    """Read one adapter of which only the base's module paths are known, not their shapes.

    Use it for files that we wrote; `read_gguf_lora` checks those of others.

    Args:
        path: as for `read_gguf_lora`.
        modules: paths of the base model's linear modules.
        config: as for `read_gguf_lora`.

    Raises:
        AdapterError: as `read_gguf_lora`, but for shapes.
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
    names = gguf_names(expected, int(config["num_hidden_layers"]), modules)
    paths = {name: module for module, name in names.items() if name is not None}
    adapter = _adapter(path, tensors, paths, metadata.get(Keys.Adapter.LORA_ALPHA))
    heads = _heads(config)
    placed = {}
    for module, lora in adapter.modules.items():
        n = heads.get(module.rpartition(".")[2])
        if n and lora.shape[1] % (2 * n):
            raise AdapterError(
                f"{path}: {module} has {lora.shape[1]} rows, expected a multiple of {2 * n}: the"
                " adapter is of another base model"
            )
        # The inverse of what `save_gguf` does, on columns.
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
        unknown = [t for t in reader.tensors if t.tensor_type not in (*_TYPES, *QUANTIZED)]
        if unknown:
            types = ", ".join(kind.name for kind in (*_TYPES, *QUANTIZED))
            problems.append(
                f"{path}: {len(unknown)} tensors are of a type that is not read here (first:"
                f" {unknown[0].name}, {unknown[0].tensor_type.name}), expected {types}: convert"
                " the adapter again with --outtype f16"
            )
        if Keys.Adapter.ALORA_INVOCATION_TOKENS in metadata:
            problems.append(f"{path}: an aLoRA, which acts only after its invocation tokens")
        for tensor in [] if problems else reader.tensors:
            x = mx.array(Factor(tensor.tensor_type, np.array(tensor.data)).values())
            exact = tensor.tensor_type == GGMLQuantizationType.BF16
            tensors[tensor.name] = x.view(mx.bfloat16) if exact else x
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
    """Write one adapter for llama.cpp, each module with its own rank, see `factors_of`.

    Args and errors are those of `save_gguf`.
    """
    save_gguf(factors_of(adapter), path, config)


def save_gguf(adapter: GgufAdapter, path: Path, config: Mapping[str, Any]) -> None:
    """Write factors for llama.cpp, whose base is what llama.cpp converts the model to.

    Args:
        adapter: an adapter of the model that `config` describes.
        path: the file to write.
        config: the base model's config.json, its model_type one of `ARCHITECTURES`.

    Raises:
        AdapterError: modules that have no name in GGUF; nothing is written.
    """
    names = export_names(adapter.modules, config, adapter.name)
    heads = _heads(config)
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]][0])
    writer.add_custom_alignment(_ALIGNMENT)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    if adapter.alpha is not None:
        writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.alpha)
    writer.add_name(adapter.name)
    for module, (a, b) in sorted(adapter.modules.items()):
        n, rows = heads.get(module.rpartition(".")[2]), b.data
        if n:
            # The inverse of what `gguf_import.py` does to the rows of the base.
            rows = rows.reshape(n, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        for leaf, kind, data in (("lora_a", a.kind, a.data), ("lora_b", b.kind, rows)):
            writer.add_tensor(f"{names[module]}.weight.{leaf}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_names(modules: Iterable[str], config: Mapping[str, Any], who: str) -> dict[str, str]:
    """Module path -> its name in a GGUF.

    Args:
        modules: paths of linear modules of the base model.
        config: as for `save_gguf`.
        who: what a message is about.

    Raises:
        AdapterError: modules that have none.
    """
    architecture, _ = ARCHITECTURES[config["model_type"]]
    names = gguf_names(architecture, int(config["num_hidden_layers"]), modules)
    unknown = [module for module, name in names.items() if name is None]
    if unknown:
        raise AdapterError(
            f"{who}: {len(unknown)} modules have no name in a GGUF of {architecture!r}"
            f" (first: {min(unknown)}); llama.cpp could not place them"
        )
    return {module: str(name) for module, name in names.items()}


def gguf_nbytes(
    name: str, tensors: Iterable[tuple[str, int, int]], config: Mapping[str, Any]
) -> int:
    """Exact size in bytes of the file that `save_gguf` writes of an adapter without alpha.

    Args:
        name: the adapter's.
        tensors: name in the GGUF, bytes of `lora_a` and of `lora_b`, of every module.
        config: as for `save_gguf`.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    texts = {
        Keys.General.ARCHITECTURE: ARCHITECTURES[config["model_type"]][0],
        Keys.General.TYPE: GGUFType.ADAPTER,
        Keys.Adapter.TYPE: "lora",
        Keys.General.NAME: name,
    }
    # Lengths are 8 bytes, types and the alignment 4; a tensor has two dimensions and an offset.
    head = 24 + 16 + len(Keys.General.ALIGNMENT)
    head += sum(20 + len(key) + len(text.encode()) for key, text in texts.items())
    data = 0
    for place, *sizes in tensors:
        head += 2 * (8 + len(f"{place}.weight.lora_a") + 4 + 2 * 8 + 4 + 8)
        data += sum(map(_aligned, sizes))
    return _aligned(head) + data


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % _ALIGNMENT
