"""Strict parsing of strangers' files: JSON and YAML without surprises, numbers, patterns."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.files import read_text

__all__ = [
    "UNITS",
    "bytes_of",
    "is_positive",
    "json_or_none",
    "matches_end",
    "parse_json",
    "read_yaml",
]

# Bytes of a unit.
UNITS = {"B": 1, "KB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", re.IGNORECASE)

# Most seconds that a pattern may take on one module path; honest ones take microseconds.
_PATTERN_SECONDS = 1.0
# Most characters of a config; a list of some thousand paths of adapters must fit.
_MAX_YAML = 1_000_000
# Limits on what makes PyYAML slow: levels of brackets, values with aliases expanded, digits of a
# number. No config comes near them.
_MAX_LEVELS, _MAX_VALUES, _MAX_DIGITS = 20, 50_000, 1_000


def bytes_of(text: object) -> int | None:
    """Bytes of a size such as "40MB" (40,000,000) or "40MiB"; None for anything else, and for 0."""
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not math.isfinite(float(match[1]) * 1e12):
        return None
    return int(float(match[1]) * unit) or None


def parse_json(text: str) -> Any:  # noqa: ANN401  JSON is any
    """Parse JSON more strictly than Python's `json`; use it for files of strangers.

    Raises:
        ValueError: the text is no JSON, or has what Python's `json` accepts: NaN or infinity,
            numbers beyond 64 bits, a key that occurs twice, halves of surrogate pairs, or nesting
            that is too deep for Python.

    Source: RFC 8259, https://www.rfc-editor.org/rfc/rfc8259.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant,
                           parse_int=_integer, parse_float=_float)  # fmt: skip
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key in content if counts[key] > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"{text[:20]}... is beyond 64 bits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is beyond 64 bits")
    return value


def json_or_none(path: Path) -> Any:  # noqa: ANN401  JSON is any
    """Read a JSON file by `parse_json`; None if it is missing or cannot be read."""
    try:
        return parse_json(read_text(path))
    except (OSError, ValueError):
        return None


def is_positive(value: object) -> bool:
    """True if a JSON value is a number above 0; true and false are no numbers."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and value > 0  # type: ignore[operator]


def matches_end(pattern: str, path: str) -> bool:
    """True if the end of a module path matches a regular expression, as PEFT's `rank_pattern`.

    Args:
        pattern: a regular expression from a stranger's file.
        path: dotted path of a module.

    Raises:
        ValueError: the pattern is no regular expression, or takes longer than a second.

    Source: `get_pattern_key`, https://github.com/huggingface/peft.
    """
    import regex

    try:
        return bool(regex.match(rf"(.*\.)?({pattern})$", path, timeout=_PATTERN_SECONDS))
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    except TimeoutError:
        raise ValueError(f"{pattern!r} takes more than {_PATTERN_SECONDS:g} s on {path}") from None


class _Loader(yaml.SafeLoader):
    """A loader that refuses a key given twice, and early what would take PyYAML minutes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._n_values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        before, alias = self._n_values, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _MAX_LEVELS:
            raise yaml.YAMLError(f"more than {_MAX_LEVELS} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        # Aliases of aliases double with every line; the size of their targets is known by now.
        self._n_values += self._sizes.get(node, 1) if alias else 1
        if self._n_values > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES:,} values")
        self._sizes.setdefault(node, self._n_values - before)
        if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_DIGITS:
            raise yaml.YAMLError(f"a number of more than {_MAX_DIGITS:,} digits")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401  PyYAML's
        node = super().compose_mapping_node(anchor)
        there = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in there:
                text = f"{key.value} is given twice; keep one"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            there.add((key.tag, str(key.value)))
        return node


def _yaml_reason(error: Exception) -> str:
    where = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or where is None:
        return str(error).splitlines()[0]
    return f"line {where.line + 1}, column {where.column + 1}: {error.problem or error.context}"


def read_yaml(path: Path | None) -> dict[str, Any]:
    """Read the keys and values of a YAML file; an empty dict if `path` is None.

    Raises:
        ConfigError: the file cannot be read, is too large, or holds no mapping.
    """
    if path is None:
        return {}
    try:
        text = read_text(path, 4 * _MAX_YAML)
        if len(text) > _MAX_YAML:
            raise ConfigError(f"{path}: {len(text):,} characters, at most {_MAX_YAML:,} are read")
        data = yaml.load(text, Loader=_Loader) or {}
        json.dumps(data, ensure_ascii=False, skipkeys=True, default=str).encode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a directory, expected a YAML file of options") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as UTF-8 text ({error})") from None
    # Impossible dates and halves of surrogate pairs raise ValueError, `"\UFFFFFFFF"` raises
    # OverflowError. A word under `!!timestamp` or `!!bool` raises one of the last two.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, AttributeError,
            LookupError) as error:  # fmt: skip
        raise ConfigError(f"{path}: not readable as YAML ({_yaml_reason(error)})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(data).__name__}")
    return data
