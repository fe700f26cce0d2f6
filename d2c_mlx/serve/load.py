"""A pack in a program that uses mlx-lm: one line to load it, one to change the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2c_mlx.models.attach import switch
from d2c_mlx.models.resolve import resolve_base
from d2c_mlx.models.stock import load_stock
from d2c_mlx.packs.pack import Pack, load_pack

__all__ = ["load"]


def load(
    pack: str | Path | Pack, task: str | None = None, model: str | None = None
) -> tuple[Any, Any]:
    """Load a pack's base model as `mlx_lm.load` does, with the adapter of a task attached.

    To change the task later, call `Pack.switch`.

    Args:
        pack: its directory or its run's, which is verified first, or a `Pack` from `load_pack`.
        task: one of `pack.tasks`; None attaches no adapter.
        model: the pack's base model: an mlx-lm directory, a `.gguf` file, or a Hugging Face id (the
            only one that may use the network). None works if the base is the embedded default.

    Returns:
        The mlx-lm model and its tokenizer.

    Raises:
        InputError: no such pack, task or model, or adapters of another base model.
    """
    if not isinstance(pack, Pack):
        pack = load_pack(pack)
    adapter = None if task is None else pack.load(task)
    _, directory = resolve_base(pack.manifest.base.model, model)
    pack.check_weights(directory)
    loaded, tokenizer = load_stock(directory)
    switch(loaded, adapter, pack.path)
    return loaded, tokenizer
