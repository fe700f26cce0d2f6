"""The command line's options and docs/reference/options.md, written from the fields of the configs.

    python -m docs.scripts.options            # or: make options

The command line's options are written to a file, not made from the fields at run time: importing
pydantic takes longer than `--help` may take. Both files are checked in.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

from d2c_mlx.phone.config import PhoneConfig
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.field_words import range_of
from d2c_mlx.utils.files import write_text
from d2c_mlx.utils.validation import Checked

__all__ = ["FILES", "command_line", "documents", "main"]

_CLICK_HEAD = '''\
"""The options of the configs, as click has them. Written by `make options`; edit the configs."""

from __future__ import annotations

from functools import partial

import click

from .help import GroupedOption
from .paths import UserPath

__all__ = [{names}]

_PATH = UserPath(path_type=str)
'''
_DOCS_HEAD = """\
# Options
Written by `make options` from [d2c_mlx/run/config.py](../../d2c_mlx/run/config.py) and \
[d2c_mlx/phone/config.py](../../d2c_mlx/phone/config.py).
"""
# Name in the generated code, config, heading of the page, and text below the heading.
_CONFIGS: tuple[tuple[str, type[Checked], str, str], ...] = (
    (
        "RUN_OPTIONS",
        RunConfig,
        "A run and its stages",
        "Every option is also a key of the YAML file, with `_` for `-`; a list is one in YAML, or a"
        " text with commas. What is given on the command line overrides the file. `--output` of"
        " an earlier run, with neither a file nor `--adapters`, takes its options.",
    ),
    (
        "PHONE_OPTIONS",
        PhoneConfig,
        "A pack on a phone stand-in",
        "What is measured: [ship to iOS](../how-to/ios.md).",
    ),
)


class _Option(NamedTuple):
    """A field as the command line has it."""

    name: str
    group: str
    help: str
    kind: type
    default: str
    values: str
    metavar: str | None
    path: bool
    required: bool

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def maker(self) -> str:
        """Name of the function that makes options of this group, in the generated code."""
        return f"_{self.group.lower().replace(' ', '_')}"


def _options(config: type[Checked]) -> Iterator[_Option]:
    """The fields with a group; fields without one are arguments."""
    for name, field in config.model_fields.items():
        about: dict[str, Any] = dict(field.json_schema_extra or {})  # type: ignore[arg-type]
        if "group" not in about:
            continue
        kinds = [one for one in (*get_args(field.annotation), field.annotation)
                 if one in (int, float, bool)]  # fmt: skip
        # A list comes as one text, which the config splits.
        kind = str if about.get("metavar") else kinds[0]
        yield _Option(
            name, about["group"], field.description or "", kind,
            about.get("default_text") or _text(field.get_default()), range_of(field),
            about.get("metavar"), bool(about.get("path")), field.is_required(),
        )  # fmt: skip


def _text(default: object) -> str:
    if default is None or not isinstance(default, str | int | float | tuple):
        return ""
    return ",".join(default) if isinstance(default, tuple) else str(default)


def command_line() -> str:
    """Source of `cli/options.py`: every option of the configs, as click has them.

    No option has a default in it, since a default there would override the YAML file.
    """
    names = ", ".join(f'"{name}"' for name, *_ in sorted(_CONFIGS))
    each = {name: list(_options(config)) for name, config, *_ in _CONFIGS}
    makers = {one.maker: one.group for options in each.values() for one in options}
    head = _CLICK_HEAD.format(names=names) + "".join(
        f"{maker} = partial(click.option, cls=GroupedOption, group={json.dumps(group)})\n"
        for maker, group in makers.items()
    )
    parts = [head]
    for name, config, *_ in _CONFIGS:
        lines = [line for one in each[name] for line in _click(one, config is RunConfig)]
        parts.append("\n".join([f"{name} = (", *lines, ")"]))
    return "\n".join(parts) + "\n"


def _click(option: _Option, in_a_file: bool) -> Iterator[str]:
    """Lines of one option, as ruff formats them."""
    flag = option.flag
    names = f"{flag}/--no-{flag[2:]}" if option.kind is bool else flag
    help = option.help + (f"  [default: {option.default}]" if option.default else "")
    arguments = [json.dumps(names)]
    if option.path:
        arguments.append("type=_PATH")
    elif option.kind in (int, float):
        arguments.append(f"type={option.kind.__name__}")
    if option.kind is bool:
        arguments.append("default=None")
    if option.metavar:
        arguments.append(f'metavar="{option.metavar}"')
    # Options that a YAML file may give are required by the config, not by click.
    if option.required and not in_a_file:
        arguments.append("required=True")
    line = f"    {option.maker}({', '.join(arguments)}, help={_quoted(help)}),"
    if len(line) <= 100:
        yield line
        return
    yield f"    {option.maker}("
    yield from (f"        {argument}," for argument in arguments)
    yield from _wrapped("        help=", help)
    yield "    ),"


def _wrapped(start: str, text: str) -> Iterator[str]:
    """A string literal on lines of at most 100 characters."""
    if len(f"{start}{_quoted(text)},") <= 100:
        yield f"{start}{_quoted(text)},"
        return
    lines = textwrap.wrap(text, 80, drop_whitespace=False, break_on_hyphens=False)
    # The blank goes to the front of the next line, as everywhere in this repository.
    for i in range(len(lines) - 1):
        kept = lines[i].rstrip()
        lines[i], lines[i + 1] = kept, lines[i][len(kept) :] + lines[i + 1]
    yield f"{start}{_quoted(lines[0])}"
    yield from (f"        {_quoted(line)}" for line in lines[1:-1])
    yield f"        {_quoted(lines[-1])},"


def _quoted(text: str) -> str:
    return repr(text) if '"' in text else f'"{text}"'


def documents() -> str:
    """Text of docs/reference/options.md: all options, one table per group."""
    parts = [_DOCS_HEAD]
    for _, config, heading, about in _CONFIGS:
        parts.append(f"## {heading}\n{about}\n")
        options = list(_options(config))
        for group in dict.fromkeys(one.group for one in options):
            rows = [_row(one) for one in options if one.group == group]
            head = "| option | what it is | values | default |\n|---|---|---|---|"
            parts.append("\n".join([f"### {group}", head, *rows, ""]))
    return "\n".join(parts).rstrip() + "\n"


def _row(option: _Option) -> str:
    default = option.default or ("must be given" if option.required else "none")
    cells = (f"`{option.flag}`", option.help, option.values, default)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


# Path in the repository -> the function that gives its text.
FILES = {"cli/options.py": command_line, "docs/reference/options.md": documents}


def main() -> None:
    """Write both files into the repository in the working directory."""
    if not Path("cli/main.py").is_file():
        sys.exit("cli/main.py: no such file; run this in the root of the repository")
    for name, text in FILES.items():
        write_text(Path(name), text())


if __name__ == "__main__":
    main()
