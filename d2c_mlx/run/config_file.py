"""Files that a run is told by: its options (command line over YAML over defaults), its clusters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2c_mlx.cluster.partition import canonical
from d2c_mlx.run.config import SEARCHES, RunConfig
from d2c_mlx.utils.errors import ConfigError, warn
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.parsing import parse_json, read_yaml

__all__ = ["load_config", "read_clusters"]

# Options that only rows give a use.
_OF_ROWS = ("probe_examples", "test_examples", "baselines")


def load_config(path: Path | None, overrides: Mapping[str, object]) -> RunConfig:
    """Read the options of a run from a YAML file and `overrides`, and check all of them.

    Paths in the file are relative to the working directory; `~` is the home directory.

    Args:
        path: the YAML file, which may be `config.yaml` of an earlier run; None reads no file.
        overrides: options given now, which replace those of the file; an empty text takes the
            default. An `InputWarning` names those without effect.

    Raises:
        ConfigError: every unknown key and wrong value, one line each.
    """
    values: dict[str, Any] = {str(key): value for key, value in read_yaml(path).items()}
    place = dict.fromkeys(values.keys() - overrides.keys(), str(path))
    values |= overrides
    for name in ("tasks", "clusters", "merge_method"):
        if values.get(name) == "":
            del values[name]
    config = RunConfig.read(values, place)
    needed: dict[str, str] = {}
    if config.budget.in_bytes:
        needed["search"] = "a number of adapters as the budget"
    if config.merge_rank and _sums_ranks(config):
        needed["merge_rank"] = "a merge method that keeps to a rank"
    if not config.tasks:
        needed |= dict.fromkeys(_OF_ROWS, "rows, --tasks")
        if config.search in SEARCHES:
            needed["search"] = needed["baselines"]
    for name, what in needed.items():
        value = getattr(config, name)
        if name in overrides and value != RunConfig.model_fields[name].default:
            warn(f"{name}: {value!r} does nothing without {what}")
    return config


def _sums_ranks(config: RunConfig) -> bool:
    """True if the plug-in that merges keeps all columns; the inputs tell of one that is broken."""
    try:
        return any(getattr(plugin.load(), "sums_ranks", False) for plugin in config.plugins)
    except ConfigError:
        return False


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
