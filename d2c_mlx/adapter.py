"""One LoRA adapter in memory and in the directory layout of mlx-lm and mlx-swift."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import mlx.core as mx
import numpy as np

from d2c_mlx.errors import AdapterError
from d2c_mlx.strict import parse_json, positive

__all__ = [
    "Adapter",
    "LoRA",
    "base_of",
    "check_adapter",
    "load_adapter",
    "read_config",
    "read_tensors",
]

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class LoRA:
    """The update of one linear module: `y += scale * (x @ a) @ b`.

    Attributes:
        a: `(in, r)`.
        b: `(r, out)`.
        scale: kept apart from `b`, so that a conversion changes no bit of a stored factor.
    """

    a: mx.array
    b: mx.array
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of columns of `a`."""
        return int(self.a.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """`(in, out)` of the linear module this belongs to."""
        return int(self.a.shape[0]), int(self.b.shape[1])

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """`(a, b)` in float32 with the scale folded into b, so that dW^T = a @ b."""
        a, b = (np.array(x.astype(mx.float32)) for x in (self.a, self.b))
        return a, b * np.float32(self.scale)

    def delta(self) -> np.ndarray:
        """Dense dW in PyTorch's orientation, `(out, in)`, float32. For tests and tiny models."""
        a, b = self.factors()
        return (a @ b).T


def _bits(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint16) if x.dtype.size == 2 else x)


@dataclass(frozen=True)
class Adapter:
    """A named set of LoRA updates. A merged adapter is one with several `sources`.

    Attributes:
        name: directory name, and the task it serves.
        modules: module path (`model.layers.0.self_attn.q_proj`) -> LoRA.
        base: the base model's name, as its config states it.
        sources: names of the adapters it was merged from; empty for an original.
    """

    name: str
    modules: Mapping[str, LoRA]
    base: str | None = None
    sources: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(lora.rank for lora in self.modules.values())

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of paths, shapes, dtypes, scales and values. The name does not count."""
        sha = hashlib.sha256()
        for path in sorted(self.modules):
            lora = self.modules[path]
            sha.update(f"{path}|{lora.scale!r}".encode())
            for x in (lora.a, lora.b):
                sha.update(f"{x.dtype}{tuple(x.shape)}".encode())
                sha.update(_bits(x).tobytes())
        return sha.hexdigest()

    def uniform(self, dtype: mx.Dtype | None = None) -> Adapter:
        """The same update with one rank and one scale, as mlx-lm's layout requires.

        Where ranks or scales differ, smaller ranks are padded with zeros and scales folded into
        b. Factors are cast to `dtype`; None keeps them exact (float32 once a scale was folded).
        """
        modules = dict(self.modules)
        if len({(lora.rank, lora.scale) for lora in modules.values()}) > 1:
            modules = {path: _padded(lora, self.rank) for path, lora in modules.items()}
        if dtype is not None:
            modules = {
                path: LoRA(lora.a.astype(dtype), lora.b.astype(dtype), lora.scale)
                for path, lora in modules.items()
            }
        return replace(self, modules=modules)

    def config(self, n_layers: int) -> dict[str, object]:
        """The `adapter_config.json` that mlx-lm and mlx-swift read. Needs a `uniform` adapter."""
        lora = next(iter(self.modules.values()))
        keys = sorted({".".join(path.split(".layers.")[1].split(".")[1:]) for path in self.modules})
        return {
            "base_model_name_or_path": self.base,
            "fine_tune_type": "lora",
            "num_layers": n_layers,
            "lora_parameters": {
                "rank": lora.rank,
                "scale": lora.scale,
                "dropout": 0.0,
                "keys": keys,
            },
        }

    def files(self, n_layers: int) -> dict[str, bytes]:
        """File name -> content, as `save` writes them."""
        same = self.uniform()
        tensors = {}
        for path in sorted(same.modules):
            tensors[f"{path}.lora_a"] = same.modules[path].a
            tensors[f"{path}.lora_b"] = same.modules[path].b
        buffer = io.BytesIO()
        mx.save_safetensors(buffer, tensors, metadata={"format": "mlx"})
        config = json.dumps(same.config(n_layers), indent=2) + "\n"
        return {WEIGHTS: buffer.getvalue(), CONFIG: config.encode()}

    def nbytes(self, n_layers: int) -> int:
        """Exact size in bytes of the files that `save` writes, headers and config included."""
        return sum(len(content) for content in self.files(n_layers).values())

    def save(self, directory: Path, n_layers: int) -> None:
        """Write the two files of mlx-lm's layout into an existing or new `directory`.

        Args:
            directory: made if absent; the caller makes it atomic (`files.write_dir`).
            n_layers: number of transformer blocks of the base model.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files(n_layers).items():
            (directory / name).write_bytes(content)


def _padded(lora: LoRA, rank: int) -> LoRA:
    width = rank - lora.rank
    a, b = lora.a, lora.b
    if lora.scale != 1.0:
        b = b.astype(mx.float32) * lora.scale
    return LoRA(mx.pad(a, [(0, 0), (0, width)]), mx.pad(b, [(0, width), (0, 0)]), 1.0)


def read_config(directory: Path) -> dict[str, object]:
    """Read `adapter_config.json`; raises AdapterError when it is missing or no JSON object."""
    path = directory / CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path}: missing; an adapter needs its adapter_config.json") from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def read_tensors(path: Path) -> dict[str, mx.array]:
    """Read a safetensors file. Raises AdapterError when truncated, corrupt or not finite."""
    from safetensors import SafetensorError, safe_open

    try:
        # safe_open checks that the header's offsets lie within the file; mx.load alone is lazy.
        with safe_open(str(path), framework="numpy") as file:
            n_tensors = len(list(file.keys()))
        tensors: Any = mx.load(str(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterError(
            f"{path}: truncated or not a safetensors file ({reason}); copy it again"
        ) from None
    if not n_tensors:
        raise AdapterError(f"{path}: holds no tensors")
    whole = [name for name, x in tensors.items() if not mx.issubdtype(x.dtype, mx.floating)]
    if whole:
        raise AdapterError(
            f"{path}: {len(whole)} tensors hold no floating point numbers (first: {min(whole)},"
            f" {tensors[min(whole)].dtype}); save the adapter in float16, bfloat16 or float32"
        )
    bad = [name for name, x in tensors.items() if not mx.isfinite(x).all().item()]
    if bad:
        raise AdapterError(
            f"{path}: {len(bad)} tensors hold NaN or infinity (first: {min(bad)}); train it again"
        )
    return tensors


def load_adapter(directory: Path) -> Adapter:
    """Load mlx-lm's layout (`adapters.safetensors` + `adapter_config.json`).

    Raises:
        AdapterError: listing every problem of the directory.
    """
    config = read_config(directory)
    where = directory / CONFIG
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError(
            f"{where}: fine_tune_type is {kind!r}, expected 'lora'; only a plain LoRA is a"
            " low-rank delta on the stock base model"
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or not positive(parameters.get("scale")):
        raise AdapterError(f"{where}: lora_parameters.scale is missing or no number above 0")
    weights = read_tensors(directory / WEIGHTS)
    pairs: dict[str, dict[str, mx.array]] = {}
    problems = []
    for name, x in weights.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in ("lora_a", "lora_b") or x.ndim != 2:
            problems.append(
                f"{directory / WEIGHTS}: {name} has shape {tuple(x.shape)}; expected only"
                " 2-dimensional <module>.lora_a and .lora_b (no DoRA, MoE or full weights)"
            )
        else:
            pairs.setdefault(path, {})[leaf] = x
    problems += pair_problems(directory / WEIGHTS, pairs, ("lora_a", "lora_b"))
    if problems:
        raise AdapterError(problems)
    scale = float(parameters["scale"])
    modules = {path: LoRA(p["lora_a"], p["lora_b"], scale) for path, p in sorted(pairs.items())}
    rank = parameters.get("rank")
    wrong = [path for path, lora in modules.items() if lora.rank != rank]
    if wrong:
        raise AdapterError(
            f"{where}: lora_parameters.rank is {rank}, but {wrong[0]} has rank"
            f" {modules[wrong[0]].rank}; mlx-lm could not load this adapter either"
        )
    return Adapter(directory.name, modules, base_of(config))


def base_of(config: Mapping[str, object]) -> str | None:
    """The base model's name as a config states it; of an absolute path the last part.

    The rest tells who trained the adapter, and a pack would carry it on.
    """
    name = str(config.get("base_model_name_or_path") or config.get("model") or "")
    for kind in (PurePosixPath(name), PureWindowsPath(name)):
        if kind.is_absolute() or name.startswith("~"):
            name = kind.name
    return name or None


def pair_problems(
    path: Path, pairs: Mapping[str, Mapping[str, mx.array]], leaves: tuple[str, str]
) -> list[str]:
    """Problems of a set of factor pairs given as `a (in, r)` and `b (r, out)`, one line each."""
    problems = []
    for module, pair in sorted(pairs.items()):
        missing = [leaf for leaf in leaves if leaf not in pair]
        if missing:
            problems.append(f"{path}: {module} has no {missing[0]}; both factors are needed")
            continue
        a, b = (pair[leaf] for leaf in leaves)
        if 0 in (*a.shape, *b.shape):
            problems.append(f"{path}: {module} is empty: shapes {a.shape}, {b.shape}")
        elif a.shape[1] != b.shape[0]:
            problems.append(
                f"{path}: {module}: {leaves[0]} has rank {a.shape[1]}, {leaves[1]} {b.shape[0]}"
            )
    return problems


def check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], path: Path) -> None:
    """Check every module against the base model.

    Args:
        adapter: what was read from `path`.
        shapes: module path -> (in, out) of the base model's linear modules.
        path: the file to name in messages.

    Raises:
        AdapterError: unknown modules, or shapes of another base: tensor, found, expected.
    """
    problems = []
    unknown = [module for module in adapter.modules if module not in shapes]
    if unknown:
        problems.append(
            f"{path}: {len(unknown)} modules are no linear layer of a transformer block of the"
            f" base model (first: {unknown[0]}); embeddings, lm_head and experts cannot carry a"
            " LoRA that every runtime loads"
        )
    wrong = [m for m, lora in adapter.modules.items() if m in shapes and lora.shape != shapes[m]]
    if wrong:
        first = wrong[0]
        problems.append(
            f"{path}: {len(wrong)} modules have the shape of another base model; first: {first}:"
            f" found in, out = {adapter.modules[first].shape}, expected {shapes[first]}"
            f" (the adapter names base {adapter.base!r})"
        )
    if problems:
        raise AdapterError(problems)
