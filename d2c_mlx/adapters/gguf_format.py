"""Reading and writing LoRA adapters of llama.cpp, in GGUF.

Tensors are `<name>.weight.lora_a (r, in)` and `.lora_b (out, r)`. llama.cpp keeps the type of every
factor, and scales each pair by alpha / its own rank, or by 1 where the file has no alpha; so ranks
and types may differ per module. A row must divide into blocks of its type: the row of `lora_a` is
as wide as the module's input, that of `lora_b` as the rank. Names and rows are those of the base as
llama.cpp converts it: some architectures have the rows of q and k interleaved.

Source: `convert_lora_to_gguf.py`, `llama-adapter.cpp` and `gguf.cpp`,
https://github.com/ggml-org/llama.cpp.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFType, GGUFWriter, Keys, dequantize
from gguf import GGMLQuantizationType as Kind

from d2c_mlx.adapters.adapter import Adapter, LoRA, balance_factors
from d2c_mlx.adapters.checks import pair_problems
from d2c_mlx.adapters.tensor_file import check_finite
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.gguf_file import GGUF_ERRORS, open_gguf

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
# Numbers in a block of the types that we write.
BLOCK = 32
# Quantized types that are read and written -> float16 numbers that begin a block, before its codes.
QUANTIZED = {Kind.Q4_0: 1, Kind.Q4_1: 2, Kind.Q8_0: 1}
_FLOATS = {np.dtype("f2"): Kind.F16, np.dtype("f4"): Kind.F32}
_TYPES = (*_FLOATS.values(), Kind.BF16, *QUANTIZED)
# Bytes that a tensor's place is a multiple of, the least that the format allows; its usual 32 take
# two bytes in a hundred of a small file. llama.cpp copies each tensor to where it needs it.
_ALIGNMENT = 8
_TENSOR = re.compile(r"(?P<name>.+)\.weight\.(?P<leaf>lora_[ab])")


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of a module.

    Attributes:
        kind: the type of its numbers.
        data: `(rows, width)` float16 or float32, or the bytes of its blocks, uint8
            `(rows, row_nbytes)`.
    """

    kind: Kind
    data: np.ndarray

    def values(self) -> np.ndarray:
        """The numbers that a reader gets, `(rows, width)`: float32 if they are quantized."""
        return dequantize(self.data, self.kind) if self.kind in QUANTIZED else self.data

    def scaled(self, factor: float) -> Self:
        """The numbers times a factor; of quantized ones the codes stay."""
        if self.kind not in QUANTIZED:
            return replace(self, data=(self.data * np.float32(factor)).astype(self.data.dtype))
        blocks = self.data.reshape(-1, GGML_QUANT_SIZES[self.kind][1]).copy()
        end = 2 * QUANTIZED[self.kind]
        scales = blocks[:, :end].copy().view(np.float16) * np.float32(factor)
        blocks[:, :end] = scales.astype(np.float16).view(np.uint8)
        return replace(self, data=blocks.reshape(self.data.shape))


@dataclass(frozen=True)
class GgufAdapter:
    """An adapter whose factors are as a GGUF holds them, but for the order of rows.

    Attributes:
        name: the adapter's name.
        modules: module path -> `lora_a (r, in)` and `lora_b (out, r)`, rows as the model in mlx-lm
            has them.
        alpha: every dW is times alpha / its own rank; None is times 1.
        base: the base model's name.
    """

    name: str
    modules: Mapping[str, tuple[Factor, Factor]]
    alpha: float | None = None
    base: str | None = None

    def scaled(self, factor: float) -> Self:
        """The adapter with every dW times a factor, in `lora_b`; the bytes are as many."""
        if factor == 1:
            return self
        modules = {path: (a, b.scaled(factor)) for path, (a, b) in self.modules.items()}
        return replace(self, modules=modules)

    def adapter(self, dtype: mx.Dtype | None = None) -> Adapter | None:
        """The plain adapter with the numbers that a reader gets; None if no module is left.

        With a `dtype` it is `Adapter.uniform`; else ranks stay and quantized factors are float32.
        """
        modules = {}
        for path, pair in sorted(self.modules.items()):
            a, b = (mx.array(np.ascontiguousarray(x.values().T)) for x in pair)
            modules[path] = LoRA(a, b, self.alpha / a.shape[1] if self.alpha else 1.0)
        if not modules:
            return None
        plain = Adapter(self.name, modules, self.base)
        return plain if dtype is None else plain.uniform(dtype)


def row_nbytes(kind: Kind, width: int) -> int:
    """Bytes of a row of so many numbers, which must divide into blocks."""
    n, nbytes = GGML_QUANT_SIZES[kind]
    return width // n * nbytes


def factors_of(adapter: Adapter) -> GgufAdapter:
    """The factors of an adapter in 16 or 32 bits, each module with its own rank.

    Components that are zero, such as padding, are left out. Where ranks and scales are all the same
    no bit changes and alpha = scale * rank. Else scales are folded into b, rounded to its type; to
    float32 where they are too large for it.

    float16 and float32 stay. bfloat16 becomes float16, which holds its numbers exactly down to
    8e-6; where one is too large for it, float32: not every backend has bfloat16.
    """
    loras = {}
    for path, lora in adapter.modules.items():
        kept = (lora.a != 0).any(axis=0) & (lora.b != 0).any(axis=1)
        at = mx.array(np.flatnonzero(np.array(kept)).astype(np.int32))
        if at.size:
            loras[path] = LoRA(lora.a[:, at], lora.b[at], lora.scale)
    # A file needs a module, even if all of them are zero.
    loras = loras or dict(adapter.modules)
    same = len({(lora.rank, lora.scale) for lora in loras.values()}) == 1
    modules = {}
    for path, lora in loras.items():
        factors = lora.a, lora.b
        if mx.bfloat16 in (lora.a.dtype, lora.b.dtype):
            factors = balance_factors(lora.a, lora.b)
            half = [x.astype(mx.float16) for x in factors]
            if all(mx.isfinite(x).all().item() for x in half):
                factors = half[0], half[1]
        a, b = map(np.array, factors)
        if not same and lora.scale != 1:
            folded = b * np.float32(lora.scale)
            b = folded.astype(b.dtype) if np.abs(folded).max() <= np.finfo(b.dtype).max else folded
        modules[path] = (
            Factor(_FLOATS[a.dtype], np.ascontiguousarray(a.T)),
            Factor(_FLOATS[b.dtype], np.ascontiguousarray(b.T)),
        )
    first = next(iter(loras.values()))
    alpha = first.scale * first.rank if same and first.scale != 1 else None
    return GgufAdapter(adapter.name, modules, alpha, adapter.base)


def gguf_names(
    config: Mapping[str, Any], modules: Iterable[str], who: object
) -> dict[str, str | None]:
    """Module path of the model that a config describes -> its name in a GGUF, None without one.

    Raises:
        AdapterError: names `who`, for a model_type that is not known here.
    """
    if config.get("model_type") not in ARCHITECTURES:
        raise AdapterError(
            f"{who}: the base model's model_type is {config.get('model_type')!r}, whose names and"
            f" rows in GGUF are not known here; expected one of {', '.join(ARCHITECTURES)}"
        )
    architecture, _ = ARCHITECTURES[config["model_type"]]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"]))
    return {module: names.get_name(module) for module in modules}


def _heads(config: Mapping[str, Any], module: str) -> int:
    """Number of heads of a module whose rows are interleaved; 0 of others."""
    leaf = module.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj") or not ARCHITECTURES[config["model_type"]][1]:
        return 0
    n = config["num_attention_heads"]
    return int(n if leaf == "q_proj" else config.get("num_key_value_heads") or n)


def read_gguf(path: Path, modules: Iterable[str], config: Mapping[str, Any] | None) -> Adapter:
    """Read one adapter, with names and rows as mlx-lm has them in the base model.

    See `read_adapter`. Quantized factors become float32; `modules` are the base's linear ones.

    Raises:
        AdapterError: the file is no GGUF or no LoRA, of types that are not known here, or of
            another base model.
    """
    config = config or {}
    paths = {name: module for module, name in gguf_names(config, modules, path).items() if name}
    alpha, tensors = _read_tensors(path, ARCHITECTURES[config["model_type"]][0])
    pairs: dict[str, dict[str, mx.array]] = {}
    unknown = []
    for name, x in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        if match and match["name"] in paths and x.ndim == 2:
            pairs.setdefault(paths[match["name"]], {})[match["leaf"]] = x.T
        else:
            unknown.append(name)
    problems = pair_problems(path, pairs, ("lora_a", "lora_b"))
    if unknown or not tensors:
        problems.append(
            f"{path}: {len(unknown)} of {len(tensors)} tensors are no factor of a linear module of"
            f" the base model's blocks (first: {unknown[0] if unknown else None}); not every"
            " runtime loads a LoRA of embeddings or output"
        )
    loras = {}
    for module, pair in sorted(pairs.items()) if not problems else ():
        a, b = mx.contiguous(pair["lora_a"]), pair["lora_b"]
        n = _heads(config, module)
        if n and b.shape[1] % (2 * n):
            problems.append(
                f"{path}: {module} has {b.shape[1]} rows, expected a multiple of {2 * n}; give the"
                " adapter's own base model"
            )
        elif n:  # The inverse of what `save_gguf` does, on columns.
            b = b.reshape(len(b), n, -1, 2).swapaxes(2, 3).reshape(b.shape)
        # As llama.cpp's get_scale: no alpha is a scale of 1.
        loras[module] = LoRA(a, mx.contiguous(b), alpha / len(b) if alpha else 1.0)
    if problems:
        raise AdapterError(problems)
    return Adapter(path.stem, loras)


def _read_tensors(path: Path, architecture: str) -> tuple[Any, dict[str, mx.array]]:
    """Alpha and tensors of a LoRA, in memory."""
    expected = {
        Keys.General.TYPE: GGUFType.ADAPTER,
        Keys.Adapter.TYPE: "lora",
        Keys.General.ARCHITECTURE: architecture,
        # An aLoRA acts only after its invocation tokens.
        Keys.Adapter.ALORA_INVOCATION_TOKENS: None,
    }
    tensors = {}
    try:
        reader = open_gguf(path)
        stated = {key: reader.fields[key].contents() for key in (*expected, Keys.Adapter.LORA_ALPHA)
                  if key in reader.fields}  # fmt: skip
        problems = [f"{path}: {key} is {stated.get(key)!r}, expected {value!r}, as of a LoRA of the"
                    " base model" for key, value in expected.items()
                    if stated.get(key) != value]  # fmt: skip
        alpha: Any = stated.get(Keys.Adapter.LORA_ALPHA)
        if not (isinstance(alpha, float | int | None) and 0 <= (alpha or 0) < float("inf")):
            problems.append(f"{path}: {Keys.Adapter.LORA_ALPHA} is {alpha!r}, expected a number")
        if other := [tensor for tensor in reader.tensors if tensor.tensor_type not in _TYPES]:
            problems.append(
                f"{path}: {len(other)} tensors have other types than"
                f" {', '.join(kind.name for kind in _TYPES)} (first: {other[0].name} of type"
                f" {other[0].tensor_type.name}): convert the adapter again with --outtype f16"
            )
        for tensor in [] if problems else reader.tensors:
            x = mx.array(Factor(tensor.tensor_type, np.array(tensor.data)).values())
            tensors[tensor.name] = x.view(mx.bfloat16) if tensor.tensor_type == Kind.BF16 else x
    except GGUF_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise AdapterError(
            f"{path}: truncated, or not readable as GGUF ({reason}); copy it again"
        ) from None
    if problems:
        raise AdapterError(problems)
    check_finite(tensors, path)
    return alpha, tensors


def save_gguf(adapter: Adapter | GgufAdapter, path: Path, config: Mapping[str, Any]) -> None:
    """Write an adapter for llama.cpp, whose base is what llama.cpp converts the model to.

    Args:
        adapter: a plain one is written by `factors_of`, each module with its own rank.
        path: the file to write.
        config: the base model's config.json, its model_type one of `ARCHITECTURES`.

    Raises:
        AdapterError: modules that have no name in GGUF; nothing is written.
    """
    adapter = factors_of(adapter) if isinstance(adapter, Adapter) else adapter
    names = export_names(adapter.modules, config, adapter.name)
    writer = GGUFWriter(path, ARCHITECTURES[config["model_type"]][0])
    writer.add_custom_alignment(_ALIGNMENT)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    if adapter.alpha is not None:
        writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.alpha)
    writer.add_name(adapter.name)
    for module, (a, b) in sorted(adapter.modules.items()):
        n, rows = _heads(config, module), b.data
        if n:  # The inverse of what `gguf_import.py` does to the rows of the base.
            rows = rows.reshape(n, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        for leaf, kind, data in (("lora_a", a.kind, a.data), ("lora_b", b.kind, rows)):
            writer.add_tensor(f"{names[module]}.weight.{leaf}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export_names(modules: Iterable[str], config: Mapping[str, Any], who: str) -> dict[str, str]:
    """As `gguf_names`, of modules that all must have one; AdapterError of those without."""
    names = gguf_names(config, modules, who)
    if unknown := [module for module, name in names.items() if name is None]:
        raise AdapterError(
            f"{who}: {len(unknown)} modules have no name in a GGUF of {config['model_type']!r}"
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
        config: the base model's config.json.
    """
    head = 24 + 16 + len(Keys.General.ALIGNMENT)
    for key, text in (
        (Keys.General.ARCHITECTURE, ARCHITECTURES[config["model_type"]][0]),
        (Keys.General.TYPE, GGUFType.ADAPTER),
        (Keys.Adapter.TYPE, "lora"),
        (Keys.General.NAME, name),
    ):
        # Lengths are 8 bytes, types and the alignment 4; a tensor has two dimensions and an offset,
        # as in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
        head += 20 + len(key) + len(text.encode())
    data = 0
    for place, *sizes in tensors:
        head += 2 * (8 + len(f"{place}.weight.lora_a") + 4 + 2 * 8 + 4 + 8)
        data += sum(size + -size % _ALIGNMENT for size in sizes)
    return head + -head % _ALIGNMENT + data
