"""Reading an adapter directory of mlx-lm; `Adapter.save` writes one."""

from __future__ import annotations

import io
import shutil
import weakref
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter, LoRA
from d2c_mlx.adapters.adapter_config import base_name, read_config
from d2c_mlx.adapters.as_lora import BaseWeights
from d2c_mlx.adapters.checks import DORA, magnitude_problems, pair_problems
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS
from d2c_mlx.adapters.tensor_file import FileModules, Layout, in_file, read_tensors
from d2c_mlx.utils.errors import AdapterError, warn
from d2c_mlx.utils.parsing import is_positive

__all__ = ["MLX_LAYOUT", "Spool", "load_adapter"]

MLX_LAYOUT = Layout("{}.lora_a", "{}.lora_b", transposed=False)


def load_adapter(directory: str | Path, base: BaseWeights | None = None) -> Adapter:
    """Load mlx-lm's layout (`adapters.safetensors` + `adapter_config.json`).

    `read_adapter` recognises a layout by itself and checks the adapter against its base.

    Args:
        directory: of the adapter.
        base: the base model's weights; with a `dora_rank` DoRAs become LoRAs, else they are
            refused.

    Raises:
        AdapterError: listing every problem of the directory.
    """
    directory = Path(directory)
    if (directory / PEFT_WEIGHTS).exists() and not (directory / WEIGHTS).exists():
        raise AdapterError(
            f"{directory}: PEFT's layout, expected mlx-lm's; use d2c_mlx.read_adapter, or convert"
            f" it with d2c-mlx convert --adapters {directory} --output DIR"
        )
    config = read_config(directory)
    where = directory / CONFIG
    parameters = config.get("lora_parameters")
    kind = _kind(config, parameters)
    as_dora = kind == "dora" and base is not None and base.dora_rank is not None
    if kind != "lora" and not as_dora:
        why = DORA if kind == "dora" else "only a plain LoRA is a low-rank delta on the stock base"
        raise AdapterError(f"{where}: fine_tune_type is {kind!r}, expected 'lora'; {why}")
    if not isinstance(parameters, dict) or not is_positive(parameters.get("scale")):
        raise AdapterError(f"{where}: lora_parameters.scale is missing or no number above 0")
    weights = read_tensors(directory / WEIGHTS)
    pairs: dict[str, dict[str, mx.array]] = {}
    magnitudes, problems = {}, []
    for name, x in sorted(weights.items()):
        path, _, leaf = name.rpartition(".")
        if as_dora and leaf == "m" and x.ndim == 1:
            magnitudes[path] = x
        elif leaf not in ("lora_a", "lora_b") or x.ndim != 2:
            problems.append(
                f"{directory / WEIGHTS}: {name} has shape {tuple(x.shape)}; expected only"
                " 2-dimensional <module>.lora_a and .lora_b (no DoRA, MoE or full weights)"
            )
        else:
            pairs.setdefault(path, {})[leaf] = x
    problems += pair_problems(directory / WEIGHTS, pairs, ("lora_a", "lora_b"))
    if as_dora:
        problems += magnitude_problems(directory / WEIGHTS, pairs, magnitudes, "lora_b")
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
    _warn_of_alpha(config, parameters, where)
    adapter = Adapter(directory.name, modules, base_name(config))
    return base.to_lora(adapter, magnitudes) if base is not None and as_dora else adapter


def _kind(config: Mapping[str, object], parameters: object) -> object:
    """`lora`, `dora` or `full`; mlx-lm before 0.19 and mlx-lm-lora tell it elsewhere."""
    inner = parameters if isinstance(parameters, dict) else {}
    old = "dora" if config.get("use_dora") or inner.get("use_dora") else "lora"
    return config.get("fine_tune_type") or old


def _warn_of_alpha(
    config: Mapping[str, object], parameters: Mapping[str, Any], where: Path
) -> None:
    """Warn of a scale that means something else in mlx-lm's first versions, whose files look alike.

    Source: `LoRALinear.__init__` in mlx-lm 0.14.1 and 0.14.2, https://github.com/ml-explore/mlx-lm.
    """
    alpha, rank, scale = (parameters.get(name, 0) for name in ("alpha", "rank", "scale"))
    if "lora_layers" in config and is_positive(alpha) and alpha != rank:
        warn(
            f"{where}: scale is {scale:g}, as mlx-lm has had it since 0.14.2; if an older one"
            f" trained this, write {scale * alpha / rank:g}, its scale * alpha / rank"
        )


class Spool:
    """Adapters that wait in files of a temporary directory, which ends with the last of them."""

    def __init__(self) -> None:
        """Make the directory, where the system has its temporary files."""
        self._directory = Path(mkdtemp(prefix="d2c-mlx-"))
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._numbers = count()

    def put(self, adapter: Adapter) -> Adapter:
        """Write an adapter, unless it is in a file; returns the same with its numbers there."""
        if isinstance(adapter.modules, FileModules):
            return adapter
        file = self._directory / f"{next(self._numbers)}.safetensors"
        a, b = MLX_LAYOUT[:2]
        tensors = {a.format(path): lora.a for path, lora in adapter.modules.items()}
        tensors |= {b.format(path): lora.b for path, lora in adapter.modules.items()}
        content = io.BytesIO()
        mx.save_safetensors(content, tensors)
        file.write_bytes(content.getvalue())  # A full disk is an OSError, as everywhere.
        return in_file(adapter, file, MLX_LAYOUT, owner=self)
