"""Merge methods and clusterings of other packages, found by their entry points.

    [project.entry-points."d2c_mlx.merge_methods"]
    median = "my_package:median"     # median(factors, options) -> (a, b), or a MergeMethod

    [project.entry-points."d2c_mlx.clusterings"]
    linkage = "my_package:linkage"   # linkage(problem, n_clusters, seed) -> labels

`--merge-method median --search linkage` uses them. Nothing of a package is imported before it is
used. What a plug-in returns is checked; a wrong result is an error that names the plug-in.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.cluster.partition import Labels, Problem, canonical
from d2c_mlx.utils.errors import ConfigError, D2CError
from d2c_mlx.utils.files import fingerprint, hash_file, visible_files

__all__ = [
    "CLUSTERINGS", "MERGE_METHODS", "Plugin", "cluster_by", "find", "merge_by", "names", "plugins",
]  # fmt: skip

# Groups of entry points -> what one of them is called in messages.
MERGE_METHODS, CLUSTERINGS = "d2c_mlx.merge_methods", "d2c_mlx.clusterings"
_KINDS = {MERGE_METHODS: "merge method", CLUSTERINGS: "clustering"}

Factors = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package.

    Attributes:
        group: `MERGE_METHODS` or `CLUSTERINGS`.
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
        kind = _KINDS[self.group]
        return f"{kind} {self.name!r} of {self.package} {self.version} ({self.target})"

    @property
    def identity(self) -> list[str]:
        """Package, version, target and a hash of the code, for the keys of stages.

        The code is the first package or module on the way to the function.
        """
        code, parts = "", self.target.partition(":")[0].split(".")
        for i in range(len(parts)):
            try:
                spec = find_spec(".".join(parts[: i + 1]))
            except (Exception, SystemExit):  # `load` tells why
                break
            # A namespace, which packages share, has no file of its own.
            if spec and spec.origin and Path(spec.origin).is_file():
                file = Path(spec.origin)
                files = visible_files(file.parent) if spec.submodule_search_locations else [file]
                files = [path for path in files if "__pycache__" not in path.parts]
                hashes = [[str(path.relative_to(file.parent)), hash_file(path)] for path in files]
                code = fingerprint(hashes)
                break
        return [self.package, self.version, self.target, code]

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
        parts = result if isinstance(result, tuple) else [result]
        words = " and ".join(map(_described, parts)) or "nothing"
        return D2CError(f"{self}: returned {words}, expected {expected}")


def plugins(group: str) -> list[Plugin]:
    """The installed plug-ins of a group, sorted by name and package."""
    return list(_installed(group, tuple(sys.path)))


@cache
def _installed(group: str, path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """Plug-ins of the packages on `path`, which is `sys.path` and the key of the cache."""
    entries = [
        Plugin(group, entry.name, entry.value, entry.dist.name, entry.dist.version)
        for entry in metadata.entry_points(group=group)
        if entry.dist
    ]
    return tuple(sorted(entries, key=lambda plugin: (plugin.name, plugin.package)))


def names(group: str) -> list[str]:
    """The names of a group's plug-ins."""
    return [plugin.name for plugin in plugins(group)]


def find(group: str, name: str) -> Plugin | None:
    """The plug-in of a name, or None.

    Raises:
        ConfigError: several packages have one of that name.
    """
    named = [plugin for plugin in plugins(group) if plugin.name == name]
    if len(named) > 1:
        both = " and ".join(f"{plugin.package} {plugin.version}" for plugin in named)
        raise ConfigError(f"{_KINDS[group]} {name!r}: found in {both}, expected one; remove one")
    return named[0] if named else None


def merge_by(plugin: Plugin, method: Any, factors: Sequence[Factors], options: Any) -> Factors:  # noqa: ANN401
    """Merge one module by a plug-in.

    Args:
        plugin: of the group `MERGE_METHODS`.
        method: its `merge.methods.MergeMethod`.
        factors: one pair per adapter, `(in, r)` and `(r, out)`; the plug-in cannot change them.
        options: a `merge.methods.Options`.

    Returns:
        The plug-in's pair `(in, k)`, `(k, out)`, finite, with k from 1 to `options.rank`, or to the
        sum of ranks if the method says so.

    Raises:
        D2CError: the plug-in failed, or returned anything else.
    """
    width, out = len(factors[0][0]), factors[0][1].shape[1]
    most = sum(len(b) for _, b in factors) if method.sums_ranks else options.rank
    result = plugin.call([(_readonly(a), _readonly(b)) for a, b in factors], options)
    match result:
        case (np.ndarray() as a, np.ndarray() as b) if a.dtype.kind == b.dtype.kind == "f":
            good = any((a.shape, b.shape) == ((width, k), (k, out)) for k in range(1, most + 1))
        case _:
            good = False
    if not good:
        expected = f"two float arrays of ({width}, k) and (k, {out}), k from 1 to {most}"
        raise plugin.wrong(result, expected)
    with np.errstate(over="ignore"):  # an overflow is infinite, which is told below
        a, b = a.astype(np.float32), b.astype(np.float32)
    if bad := int((~np.isfinite(a)).sum() + (~np.isfinite(b)).sum()):
        raise plugin.wrong(f"{bad} values that are not finite in float32", "none")
    return a, b


def cluster_by(plugin: Plugin, problem: Problem, n_clusters: int, seed: int) -> Labels:
    """Cluster by a plug-in.

    Args:
        plugin: of the group `CLUSTERINGS`.
        problem: adapters, and the callables that merge and measure them; the plug-in cannot change
            its arrays.
        n_clusters: most clusters.
        seed: seed of all random choices.

    Returns:
        The cluster of every adapter, numbered by first appearance.

    Raises:
        D2CError: the plug-in failed, or returned anything but a whole number per adapter.
    """
    similarity, features = _readonly(problem.similarity), _readonly(problem.features)
    given = replace(problem, similarity=similarity, features=features)
    result = plugin.call(given, n_clusters, seed)
    expected = f"{problem.n} whole numbers, the cluster of every adapter"
    try:
        labels = np.asarray(result)
    except ValueError:  # rows of unequal length
        raise plugin.wrong(type(result).__name__, expected) from None
    if labels.shape != (problem.n,) or labels.dtype.kind not in "iu":
        raise plugin.wrong(labels if labels.ndim else type(result).__name__, expected)
    if (n := len(np.unique(labels))) > n_clusters:
        raise plugin.wrong(f"{n} clusters", f"at most {n_clusters}")
    return canonical(labels)


def _readonly(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _described(part: object) -> str:
    if isinstance(part, np.ndarray):
        return f"{part.dtype} array of {part.shape}"
    return part if isinstance(part, str) else type(part).__name__


def _in_a_line(error: BaseException) -> str:
    """An error in one line, with the line of code that raised it."""
    text = (str(error).strip() or "it says no more").splitlines()[0]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}, line {where.lineno})"
