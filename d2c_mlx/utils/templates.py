"""Jinja templates of this package, and the filters that write numbers and names in them."""

from __future__ import annotations

import html
from functools import cache
from typing import Any

__all__ = ["cell", "percent", "size", "templates_of"]


@cache  # with its compiled templates
def templates_of(package: str) -> Any:  # noqa: ANN401  jinja2 is imported late
    """Make a jinja2 environment for the templates of a package; undefined names are errors."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader(package, "."),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"percent": percent, "size": size, "cell": cell}
    return found


def percent(value: float | None) -> str:
    """Format a share as a percentage with one decimal; None gives `-`."""
    return "-" if value is None else f"{100 * value:.1f}%"


def size(nbytes: int) -> str:
    """Format bytes with three digits and a unit, for prose; tables have the exact number."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} bytes"


def cell(text: object) -> str:
    """Escape a name for a cell of a Markdown table, so that it begins no column and no HTML."""
    return html.escape(str(text), quote=False).replace("|", "\\|")
