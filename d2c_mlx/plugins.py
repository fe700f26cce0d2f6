"""Merge methods and ways to compose of other packages, found by their entry points.

    [project.entry-points."d2c_mlx.merge_methods"]
    median = "my_package:median"     # median(factors, options) -> (a, b), or a MergeMethod

    [project.entry-points."d2c_mlx.compose_methods"]
    sum = "my_package:sum"           # sum(task, rows, choice) -> Adapter, or a compose Method

`--merge-method median` uses one. Nothing of a package is imported before it is used. What a plug-in
returns is checked where it is used; a wrong result names the plug-in.
"""

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.utils.errors import ConfigError, D2CError
from d2c_mlx.utils.files import fingerprint, hash_file, visible_files

MERGE_METHODS, COMPOSE_METHODS = "d2c_mlx.merge_methods", "d2c_mlx.compose_methods"
# The options that name a plug-in of a group.
_FIELDS = {MERGE_METHODS: "merge_method", COMPOSE_METHODS: "method"}


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package.

    Attributes:
        group: `MERGE_METHODS` or `COMPOSE_METHODS`.
        name: the name that an option takes.
        target: where the function is, `module:function`.
        package: name of the package.
        version: its version.
    """

    group: str
    name: str
    target: str
    package: str
    version: str

    def __str__(self) -> str:
        kind = self.group.removeprefix("d2c_mlx.").removesuffix("s").replace("_", " ")
        return f"{kind} {self.name!r} of {self.package} {self.version} ({self.target})"

    @property
    def identity(self) -> list[str]:
        """Package, version, target and a hash of all files of the code, for the keys of stages."""
        hashes = []
        with suppress(Exception, SystemExit):  # `load` tells why
            spec = find_spec(self.target.partition(":")[0].partition(".")[0])
            places = spec.submodule_search_locations or [spec.origin or ""] if spec else []
            for place in map(Path, places):
                for file in visible_files(place) if place.is_dir() else [place]:
                    if "__pycache__" not in file.parts:
                        hashes.append([file.name, hash_file(file)])
        return [self.package, self.version, self.target, fingerprint(hashes)]

    def load(self) -> Callable[..., Any]:
        """Import the function.

        Raises:
            ConfigError: it cannot be imported, or is no function.
        """
        try:
            function = metadata.EntryPoint(self.name, self.target, self.group).load()
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{self}: cannot be imported: {_in_a_line(error)}") from error
        if not callable(function):
            raise ConfigError(f"{self}: found {type(function).__name__}, expected a function")
        return function

    def call(self, *arguments: object) -> Any:  # noqa: ANN401  a stranger's function
        """Call the function.

        Raises:
            D2CError: it raised an error.
        """
        try:
            return self.load()(*arguments)
        except (Exception, SystemExit) as error:
            raise D2CError(f"{self}: failed: {_in_a_line(error)}") from error

    def wrong(self, result: object, expected: str) -> D2CError:
        """Make the error for a result, or words for one, that is not as it must be."""
        words = []
        for part in result if isinstance(result, tuple) else [result]:
            array = f"{part.dtype} array of {part.shape}" if isinstance(part, np.ndarray) else None
            words.append(array or (part if isinstance(part, str) else type(part).__name__))
        returned = " and ".join(words) or "nothing"
        return D2CError(f"{self}: returned {returned}, expected {expected}")


@cache
def plugins(group: str) -> list[Plugin]:
    """The installed plug-ins of a group, sorted by name and package."""
    entries = [
        Plugin(group, entry.name, entry.value, entry.dist.name, entry.dist.version)
        for entry in metadata.entry_points(group=group)
        if entry.dist
    ]
    return sorted(entries, key=lambda plugin: (plugin.name, plugin.package))


def names(group: str) -> list[str]:
    """The names of a group's plug-ins."""
    return [plugin.name for plugin in plugins(group)]


def find(group: str, name: str, own: Sequence[str] = ()) -> Plugin:
    """The plug-in of a name; `own` are our own names, for the message.

    Raises:
        ConfigError: there is none, or several packages have one of that name.
    """
    named, field = [plugin for plugin in plugins(group) if plugin.name == name], _FIELDS[group]
    if not named:
        expected = ", ".join((*own, *names(group)))
        raise ConfigError(f"{field}: found {name!r}, expected one of {expected}")
    if len(named) > 1:
        both = " and ".join(map(str, named))
        raise ConfigError(f"{field}: found {both}, expected one of these; remove the other")
    return named[0]


def readonly(array: np.ndarray) -> np.ndarray:
    """A view of an array that a plug-in cannot change."""
    view = array.view()
    view.flags.writeable = False
    return view


def _in_a_line(error: BaseException) -> str:
    """An error in one line, with the line of code that raised it."""
    text = (str(error).strip() or "it says no more").splitlines()[0]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}, line {where.lineno})"
