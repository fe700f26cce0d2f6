"""Strict parsing of strangers' files: JSON and YAML without surprises, numbers, patterns."""

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

# Bytes of a unit.
UNITS = {"B": 1, "KB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", re.IGNORECASE)

# Most seconds that a pattern may take on one module path; honest ones take microseconds.
_PATTERN_SECONDS = 1.0
# Most bytes of a YAML file, which PyYAML reads slowly; a list of some thousand adapters must fit.
_MOST_YAML = 200_000


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
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_float,
            parse_int=_integer,
            parse_float=_float,
        )
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
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is there twice")
    return content


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"{text[:20]}... is beyond 64 bits")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is no number of 64 bits")
    return float(text)


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
    """A loader that refuses a key given twice, and aliases that would double with every line."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError("an alias of a list or mapping; write it out")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401  PyYAML's
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in keys:
                text = f"{key.value} is given twice; keep one"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            keys.add((key.tag, str(key.value)))
        return node


def read_yaml(path: Path | None) -> dict[str, Any]:
    """Read the keys and values of a YAML file; an empty dict if `path` is None.

    Raises:
        ConfigError: the file cannot be read, is too large, or holds no mapping.
    """
    if path is None:
        return {}
    try:
        data = yaml.load(read_text(path, _MOST_YAML), Loader=_Loader) or {}
        json.dumps(data, ensure_ascii=False, skipkeys=True, default=str).encode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}, expected a YAML file of options") from None
    # Impossible dates and halves of surrogate pairs raise ValueError, `"\UFFFFFFFF"` raises
    # OverflowError. A word under `!!timestamp` or `!!bool` raises one of the last two.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, AttributeError,
            LookupError) as error:  # fmt: skip
        reason, mark = str(error).splitlines()[0], getattr(error, "problem_mark", None)
        if isinstance(error, yaml.MarkedYAMLError) and mark:
            about = error.problem or error.context
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {about}"
        raise ConfigError(f"{path}: not readable as YAML ({reason})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(data).__name__}")
    return data
