"""Reading an adapter directory of mlx-lm; `Adapter.save` writes one."""

from __future__ import annotations

import io
import shutil
import weakref
from itertools import count
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter, LoRA
from d2c_mlx.adapters.adapter_config import base_name, read_config
from d2c_mlx.adapters.checks import DORA, pair_problems
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS
from d2c_mlx.adapters.tensor_file import FileModules, Layout, in_file, read_tensors
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.parsing import is_positive

__all__ = ["MLX_LAYOUT", "Spool", "load_adapter"]

MLX_LAYOUT = Layout("{}.lora_a", "{}.lora_b", transposed=False)


def load_adapter(directory: str | Path) -> Adapter:
    """Load mlx-lm's layout (`adapters.safetensors` + `adapter_config.json`).

    `read_adapter` recognises a layout by itself and checks the adapter against its base.

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
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        why = DORA if kind == "dora" else "only a plain LoRA is a low-rank delta on the stock base"
        raise AdapterError(f"{where}: fine_tune_type is {kind!r}, expected 'lora'; {why}")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or not is_positive(parameters.get("scale")):
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
    return Adapter(directory.name, modules, base_name(config))


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
