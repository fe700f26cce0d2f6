"""A pack in a program that uses mlx-lm: one line to load, one to change the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2c_mlx.models.attach import switch
from d2c_mlx.models.base_model import load_stock
from d2c_mlx.models.resolve import resolve_base
from d2c_mlx.packs.pack import Pack, load_pack

__all__ = ["load"]


def load(
    pack: str | Path | Pack, task: str | None = None, model: str | None = None
) -> tuple[Any, Any]:
    """An mlx-lm model and tokenizer, as `mlx_lm.load` gives them, with a task's adapter attached.

    Args:
        pack: its directory, which is verified, or what `load_pack` gave.
        task: one of `pack.tasks`; None is the base model.
        model: the pack's base model: an mlx-lm directory, a `.gguf` file, or a Hugging Face id (the
            only case that may use the network). None is enough where it is the embedded default.

    Raises:
        InputError: no such pack, task or model, or adapters of another base model.
    """
    if not isinstance(pack, Pack):
        pack = load_pack(Path(pack))
    adapter = None if task is None else pack.load(task)
    _, directory = resolve_base(pack.manifest["base"]["model"], model)
    found, tokenizer = load_stock(directory)
    switch(found, adapter, pack.path)
    return found, tokenizer
