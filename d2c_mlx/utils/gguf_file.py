"""Opening a GGUF file whose metadata may be damaged."""

from __future__ import annotations

import mmap
from pathlib import Path

from gguf import GGUFReader

__all__ = ["GGUF_ERRORS", "open_gguf"]

# Errors that readers raise on bytes that are no GGUF.
GGUF_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)
# GGUFValueType -> bytes of a value; strings and arrays state their length.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def open_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file with the `gguf` package, after checking the lengths in its metadata.

    Use it in place of `GGUFReader`, and before MLX's reader. The package believes the length that
    an array states, also beyond the end of the file. So a single damaged bit fills the memory for
    hours.

    Raises:
        GGUF_ERRORS: one of these, if the file is no GGUF or is damaged.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:

        def number(at: int, width: int) -> int:
            return int.from_bytes(data[at : at + width], "little")

        def end_of(at: int, kind: int) -> int:
            if kind == _STRING:
                at += 8 + number(at, 8)
            elif kind == _ARRAY:
                inner, n, at = number(at, 4), number(at + 4, 8), at + 12
                if inner in _WIDTHS:
                    at += n * _WIDTHS[inner]
                else:
                    for _ in range(n):
                        at = end_of(at, inner)
            else:
                at += _WIDTHS[kind]
            if at > len(data):
                raise ValueError("a length in its metadata leads out of the file")
            return at

        at = 24
        for _ in range(number(16, 8)):
            at = end_of(at, _STRING)
            at = end_of(at + 4, number(at, 4))
    return GGUFReader(path)
