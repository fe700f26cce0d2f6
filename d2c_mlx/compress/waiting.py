"""Stored forms that wait in files: a plan measures several forms of every adapter."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from d2c_mlx.adapters.gguf_factors import GgufAdapter
from d2c_mlx.compress.compressed import Compressed

__all__ = ["WaitingForm"]

# Stands for an array that is in the file.
_IN_FILE = np.empty(0)


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

            def put(x: np.ndarray) -> np.ndarray:
                np.save(file, x, allow_pickle=False)
                return _IN_FILE

            self._without = _mapped(stored, put)

    def load(self) -> Compressed | GgufAdapter:
        """Read the form as it was written.

        Raises:
            OSError: the file is gone.
        """
        with self._path.open("rb") as file:
            found = _mapped(self._without, lambda _: np.load(file, allow_pickle=False))
        return cast(Compressed | GgufAdapter, found)


def _mapped(value: object, change: Callable[[np.ndarray], np.ndarray]) -> object:
    """The same mappings, tuples and dataclasses with every array changed, always in one order."""
    if isinstance(value, np.ndarray):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(one, change) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        found = {one.name: _mapped(getattr(value, one.name), change) for one in fields(value)}
        return replace(value, **found)
    return value
