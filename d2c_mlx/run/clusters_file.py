"""Clusters that the user gives in a file, in place of those that D2C would find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2c_mlx.cluster.partition import canonical
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.parsing import parse_json

__all__ = ["read_clusters"]


def read_clusters(path: Path, names: Sequence[str], most: int) -> tuple[int, ...]:
    """Read a partition of the adapters: the cluster of each, numbered by first appearance.

    Args:
        path: `clusters.json` of a run, of which those of D2C count, or a list of lists of names.
        names: names of the adapters.
        most: number of clusters that the budget has room for.

    Raises:
        ConfigError: the file cannot be read, has not exactly these adapters, or too many clusters.
    """
    try:
        clusters = _clusters(parse_json(read_text(path)))
    except OSError as error:
        raise ConfigError(f"clusters: {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"clusters: {path}: expected clusters.json of a run, or a JSON list of lists of names"
        ) from None
    listed = Counter(name for cluster in clusters for name in cluster)
    problems, known = [], set(names)
    if wrong := sorted(name for name, n in listed.items() if name not in known or n > 1):
        problems.append(f"clusters: {path}: {', '.join(wrong)}: no adapter, or there twice")
    if missing := [name for name in names if name not in listed]:
        problems.append(f"clusters: {path}: {', '.join(missing)}: in no cluster")
    if len(clusters) > most:
        problems.append(
            f"clusters: {path}: found {len(clusters)} clusters, expected at most {most}, for which"
            " the budget has room"
        )
    if problems:
        raise ConfigError(problems)
    label = {name: k for k, cluster in enumerate(clusters) for name in cluster}
    return canonical([label[name] for name in names])


def _clusters(content: Any) -> list[list[str]]:  # noqa: ANN401  as JSON gave it
    if isinstance(content, dict):
        labels = content["methods"]["d2c"][0]["labels"]
        found: dict[int, list[str]] = {}
        for name, label in zip(content["adapters"], labels, strict=True):
            found.setdefault(label, []).append(str(name))
        return list(found.values())
    return [[str(name) for name in cluster] for cluster in content if cluster]
