"""A path on the command line."""

from __future__ import annotations

import os
from typing import Any

import click


class UserPath(click.Path):
    """`click.Path` with `~`, which a shell leaves as it is in `--output=~/x` and in scripts."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:  # noqa: ANN401  as click has it
        """Expand `~` in a path, then check it as click does."""
        return super().convert(os.path.expanduser(value), param, ctx)


class PackPath(UserPath):
    """The directory of a pack, or of the run that made it."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:  # noqa: ANN401  as click has it
        """Put the pack in a run's place, then check it as click does."""
        # Not above: help must not import the library.
        from d2c_mlx.packs.pack import pack_directory

        return super().convert(pack_directory(os.fspath(value)), param, ctx)
