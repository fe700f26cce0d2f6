"""Jinja templates of this package; what they show is escaped unless it is marked as safe."""

import html
import re
import shlex
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from d2c_mlx.utils.errors import printable

# An underscore within a word is none of Markdown; addresses and $ are of GitHub's and the hub's.
_SPECIAL = re.compile(
    r"""[\\`*\[\]|#~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.|^[-+](?=\s)""", re.IGNORECASE
)


@cache  # with its compiled templates
def templates_of(package: str) -> Any:  # noqa: ANN401  jinja2 is imported late
    """Make a jinja2 environment for the templates of a package; undefined names are errors.

    In `*.html.jinja` values are escaped as HTML, in others as Markdown by `markdown`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, pass_eval_context
    from markupsafe import Markup

    @pass_eval_context
    def escape(context: Any, value: object) -> object:  # noqa: ANN401
        if isinstance(value, Markup | int | float):
            return value
        # HTML is escaped after this.
        return printable(str(value), "\n\t") if context.autoescape else markdown(value)

    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=lambda name: name is not None and ".html" in name,
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent, "size": size, "code": lambda text: Markup(code(text)),
        "sh": shlex.quote,
    }  # fmt: skip
    return environment


def markdown(text: object) -> str:
    """Escape a text so that it is no Markdown, HTML, address or column of a table; one line."""
    line = html.escape(printable(str(text)), quote=False)
    line = _SPECIAL.sub(r"\\\g<0>", line)
    return re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", line)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], n_left: int = 1) -> str:
    """A table of Markdown, its texts escaped; all columns but the first `n_left` are numbers."""
    lines = [head, *([markdown(cell) for cell in row] for row in rows)]
    texts = [f"| {' | '.join(line)} |" for line in lines]
    texts.insert(1, "|" + "---|" * n_left + "--:|" * (len(head) - n_left))
    return "\n".join(texts)


def code(text: str) -> str:
    """A text as a code span of Markdown, also in a table."""
    line = printable(text).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {line} {fence}" if longest else f"`{line}`"


def percent(value: float | None) -> str:
    """Format a share as a percentage with one decimal; None gives `-`."""
    return "-" if value is None else f"{100 * value:.1f}%"


def size(nbytes: int) -> str:
    """Format bytes with three digits and a unit, for prose; tables have the exact number."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        # From there on the smaller unit would be rounded to 1e+03.
        if nbytes >= 0.9995 * factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} bytes"


def span(numbers: Sequence[int]) -> str:
    """The least and the greatest of some numbers, for prose: `8`, or `4 to 8`."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
