"""Verify a pack: its files are complete, and another program can load its adapters.

`READERS` says of each program what it takes and what `verify` refuses for it. What a reader would
ignore silently is resolved before: every export has one scale, folded in where scales differ, one
rank but in GGUF, and neither rsLoRA nor patterns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.packs.export import export, n_layers
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.utils.errors import ConfigError, PackError, gather

__all__ = ["READERS", "Reader", "verify"]

# The ranks that vLLM reserves end there.
_MOST_RANK = 512


@dataclass(frozen=True)
class Reader:
    """A program that loads adapters.

    Attributes:
        to: the export that it reads; None if it reads no adapters.
        ranks: True if ranks of modules may differ.
        silent: what it passes over without a word.
        source: the file of its source that says so.
        refused: what `verify` refuses, in words.
        rules: give a problem of an adapter of so many blocks, or None.
    """

    to: str | None
    ranks: bool
    silent: str
    source: str
    refused: str
    rules: tuple[Callable[[Adapter, int], str | None], ...] = ()


def _in_every_block(adapter: Adapter, blocks: int) -> str | None:
    """Modules that some block lacks; such a reader takes names of modules, for all blocks."""
    keys: dict[str, int] = {}
    for path in adapter.modules:
        key = path.rpartition(".")[2]
        keys[key] = keys.get(key, 0) + 1
    lacking = {key: n for key, n in sorted(keys.items()) if n != blocks}
    if not lacking:
        return None
    key, n = next(iter(lacking.items()))
    return (
        f"{len(lacking)} modules are in some blocks only (first: {key}, in {n} of {blocks}); plan"
        " with run --same-shape"
    )


def _small_rank(adapter: Adapter, _: int) -> str | None:
    if adapter.rank <= _MOST_RANK:
        return None
    return f"rank {adapter.rank}, at most {_MOST_RANK} is taken; give run --merge-rank"


_MLX = "layouts that break [these rules](#what-mlx-swift-loads)"
_PATTERNS = "`rank_pattern`, `alpha_pattern`"
_EVERY = "modules that are not in every block"
READERS = {
    "mlx-swift": Reader(
        "mlx", True, "missing tensors",
        "`LoRAContainer.load`, [run](../../benchmarks/notes/2026-11-29-mlx-swift.md)", _MLX,
    ),
    "mlx-lm": Reader(
        "mlx", False, "missing tensors",
        "`load_adapters` of 0.32.2, `test_families.py`; main (d78bf58) reads alike", _MLX,
    ),
    "PEFT": Reader(
        "peft", True, "missing tensors (a warning)", "0.21, run by `test_export.py`",
        "a base whose weights mlx-lm rescales",
    ),
    "llama.cpp": Reader(
        "gguf", True, "norms; rsLoRA and `alpha_pattern` in its converter",
        "`llama-adapter.cpp` 165-368, `set_gguf_parameters` of its converter,"
        " [run](../../benchmarks/pages/formats.md)",
        "families without [GGUF names](families.md), modules that have none",
    ),
    "vllm-metal": Reader(
        "peft", True, f"{_PATTERNS}, unknown tensors",
        "`load_peft_adapter` of `v1/lora/peft_loader.py`; vLLM's `MaxLoRARanks`",
        f"ranks above {_MOST_RANK}", (_small_rank,),
    ),
    "ExecuTorch": Reader(
        "peft", False, f"rsLoRA, {_PATTERNS}", "`examples/models/llama/model.py` 70-256, August",
        _EVERY, (_in_every_block,),
    ),
    "MNN": Reader(
        "peft", True, f"rsLoRA, {_PATTERNS}, unknown tensors",
        "`load`, `get_lora` of `export/utils/lora.py`", _EVERY, (_in_every_block,),
    ),
    "oMLX": Reader(
        None, False, "every adapter", "`discover_models` of `model_discovery.py`", "every pack"
    ),
}  # fmt: skip


def verify(directory: str | Path, runtime: str | None = None, model: str | None = None) -> Pack:
    """Check a pack's files, every adapter's values and, for a runtime, whether it can load them.

    Use it where a pack arrives from elsewhere; `load_pack` alone does not read adapters' values.

    Args:
        directory: of the pack.
        runtime: a key of `READERS`. The pack is exported to a temporary directory for it; the
            layout of a plain pack is always checked.
        model: as for `export`, which asks for it for llama.cpp; checked for every runtime.

    Returns:
        The pack.

    Raises:
        InputError: every problem found, one line each.
    """
    if runtime not in (None, *READERS):
        raise ConfigError(f"for: {runtime!r}, expected one of {', '.join(READERS)}")
    pack = load_pack(directory)
    adapters = gather(partial(pack.load, served[0]) for served in pack.adapters.values())
    if runtime is None:
        if model is not None:
            pack.base_directory(model)
        return pack
    reader = READERS[runtime]
    if reader.to is None:
        raise PackError(
            f"{pack.path}: {runtime} loads no adapters and passes over their folders; serve the"
            " pack with d2c-mlx serve"
        )
    blocks = n_layers(pack)
    problems = [
        f"{pack.path}/cluster-{k}: {problem}".replace("cluster-cluster", "cluster")
        for k, adapter in zip(pack.adapters, adapters)
        for rule in reader.rules
        if adapter and (problem := rule(adapter, blocks))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary) / "written"
        names = sorted({name for name in export(pack, reader.to, written, model).values() if name})
        if reader.to == "mlx":
            problems += [
                line for name in names for line in layout_problems(written / name, pack.path / name)
            ]
    if problems:
        raise PackError(problems)
    return pack
