"""Whether a pack is whole, and whether another program can load what it holds."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from d2c_mlx.adapters.layout_check import layout_problems
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.packs.unpack import unpack
from d2c_mlx.utils.errors import ConfigError, PackError, gather

__all__ = ["RUNTIMES", "verify"]

RUNTIMES = ("mlx-swift",)


def verify(directory: Path, runtime: str | None = None) -> Pack:
    """Check a pack's files, every adapter's values and, for a runtime, their layout.

    Args:
        directory: of the pack.
        runtime: one of `RUNTIMES`. A compact pack is unpacked into a temporary directory for it;
            a plain one is always checked.

    Raises:
        InputError: every problem found.
    """
    if runtime not in (None, *RUNTIMES):
        raise ConfigError(f"for: {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    pack = load_pack(directory)
    gather(partial(pack.load, served[0]) for served in pack.adapters.values())
    if runtime and pack.storage == "compact":
        with tempfile.TemporaryDirectory() as temporary:
            plain = Path(temporary) / "plain"
            names = sorted({name for name in unpack(pack, plain).values() if name})
            problems = [
                line for name in names for line in layout_problems(plain / name, directory / name)
            ]
        if problems:
            raise PackError(problems)
    return pack
