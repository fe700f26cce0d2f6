"""Reading what strangers wrote: JSON without surprises, numbers in range, patterns that end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

__all__ = ["match_end", "parse_json", "positive"]

# Seconds that a pattern may take on one module path; honest ones take microseconds.
_PATIENCE = 1.0


def parse_json(text: str) -> Any:  # noqa: ANN401  JSON is any
    """JSON as RFC 8259 means it.

    Raises:
        ValueError: it is none. So are, other than for Python's `json`: NaN and infinity, numbers
            beyond 64 bits, a key that is there twice, halves of surrogate pairs, and nesting that
            is deeper than Python can walk.
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
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


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


def positive(value: object) -> bool:
    """Whether a JSON value is a number above 0; true and false are none."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    return good and value > 0  # type: ignore[operator]


def match_end(pattern: str, path: str) -> bool:
    """PEFT's rule for keys of `rank_pattern`: a regular expression that matches a path's end.

    Raises:
        ValueError: no regular expression, or one that takes longer than a second.

    Source: `get_pattern_key`, https://github.com/huggingface/peft.
    """
    import regex

    try:
        return bool(regex.match(rf"(.*\.)?({pattern})$", path, timeout=_PATIENCE))
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    except TimeoutError:
        raise ValueError(f"{pattern!r} takes more than {_PATIENCE:g} s on {path}") from None
