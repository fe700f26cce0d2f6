"""Stored forms that wait in files: a plan measures several forms of every adapter."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from d2c_mlx.adapters.gguf_format import GgufAdapter
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.utils.sequences import shared

__all__ = ["WaitingForm"]


class _InFile:
    """Stands for an array that is in the file."""


class _Parts(NamedTuple):
    """A dataclass, taken apart: its type and the values of its fields."""

    kind: Callable[..., object]
    values: tuple[object, ...]


class WaitingForm:
    """A stored form whose numbers are in a temporary file, which ends with this object.

    The file is read, not mapped: pages of a mapping would stay in the process's memory.

    Attributes:
        name: the adapter's name.
        base: the base model's name, if it is known.
    """

    def __init__(self, stored: Compressed | GgufAdapter) -> None:
        """Write the form's arrays, in the order in which `load` finds them.

        Raises:
            OSError: they could not be written.
        """
        self.name, self.base = stored.name, stored.base
        # Closed after writing: a system may allow a process 256 open files.
        descriptor, path = tempfile.mkstemp(prefix="d2c-mlx-", suffix=".npy")
        self._path = Path(path)
        weakref.finalize(self, self._path.unlink, missing_ok=True)
        with os.fdopen(descriptor, "wb") as file:
            self._parts = _taken_apart(stored, lambda x: np.save(file, x, allow_pickle=False))

    def load(self) -> Compressed | GgufAdapter:
        """Read the form as it was written.

        Raises:
            OSError: the file is gone.
        """
        with self._path.open("rb") as file:
            found = _put_together(self._parts, lambda: np.load(file, allow_pickle=False))
        return cast(Compressed | GgufAdapter, found)


def _taken_apart(value: object, put: Callable[[np.ndarray], object]) -> object:
    """A value without its arrays, which `put` takes in the order of `_put_together`."""
    if isinstance(value, np.ndarray):
        put(value)
        return _InFile
    if isinstance(value, Mapping):
        return {key: shared(_taken_apart(one, put)) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_taken_apart(one, put) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        every = (getattr(value, one.name) for one in fields(value))
        return _Parts(type(value), tuple(_taken_apart(one, put) for one in every))
    return value


def _put_together(parts: object, read: Callable[[], object]) -> object:
    """The value that was taken apart, with arrays that `read` gives."""
    if parts is _InFile:
        return read()
    if isinstance(parts, dict):
        return {key: _put_together(one, read) for key, one in parts.items()}
    if isinstance(parts, _Parts):
        return parts.kind(*(_put_together(one, read) for one in parts.values))
    if isinstance(parts, tuple):
        return tuple(_put_together(one, read) for one in parts)
    return parts
