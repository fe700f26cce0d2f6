"""Verify a pack: its files are complete, and another program can load its adapters."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from d2c_mlx.adapters.layout_check import layout_problems
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.utils.errors import ConfigError, PackError, gather

__all__ = ["RUNTIMES", "verify"]

RUNTIMES = ("mlx-swift",)


def verify(directory: str | Path, runtime: str | None = None) -> Pack:
    """Check a pack's files, every adapter's values and, for a runtime, their layout.

    Use it where a pack arrives from elsewhere; `load_pack` alone does not read adapters' values.

    Args:
        directory: of the pack.
        runtime: one of `RUNTIMES`. A compact pack is exported to a temporary directory for it; the
            layout of a plain pack is always checked.

    Returns:
        The pack.

    Raises:
        InputError: every problem found, one line each.
    """
    if runtime not in (None, *RUNTIMES):
        raise ConfigError(f"for: {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    pack = load_pack(directory)
    gather(partial(pack.load, served[0]) for served in pack.adapters.values())
    if runtime and pack.storage == "compact":
        with tempfile.TemporaryDirectory() as temporary:
            plain = Path(temporary) / "plain"
            names = sorted({name for name in export(pack, "mlx", plain).values() if name})
            problems = [
                line for name in names for line in layout_problems(plain / name, pack.path / name)
            ]
        if problems:
            raise PackError(problems)
    return pack
