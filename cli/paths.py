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
