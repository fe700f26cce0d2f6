"""Files that a run is told by: its options (command line over YAML over defaults), its clusters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2c_mlx.cluster.partition import canonical
from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.merge.options import READ_ANSWERS
from d2c_mlx.run.config import SEARCHES, RunConfig
from d2c_mlx.utils.errors import BudgetError, ConfigError, warn
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.parsing import parse_json, read_yaml

__all__ = ["load_config", "read_clusters"]

# Options that only rows give a use.
_OF_ROWS = ("probe_examples", "test_examples", "baselines", "stack")


def load_config(
    path: Path | None, overrides: Mapping[str, object], saved: bool = False
) -> RunConfig:
    """Read the options of a run from a YAML file and `overrides`, and check all of them.

    Paths in the file are relative to the working directory; `~` is the home directory.

    Args:
        path: the YAML file; None reads no file.
        overrides: options given now, which replace those of the file. An `InputWarning` names
            those without effect.
        saved: the file is `config.yaml` of an earlier run. Values that contradict the overrides
            are dropped with an `InputWarning`, since no option can unset them.

    Raises:
        ConfigError: every unknown key and wrong value, one line each.
    """
    values: dict[str, Any] = {str(key): value for key, value in read_yaml(path).items()}
    place = dict.fromkeys(values.keys() - overrides.keys(), str(path))
    values |= overrides
    for name in sorted(_outdated(values) - overrides.keys()) if saved else ():
        found = values.pop(name)
        warn(f"{name}: {found} of {path} does not go with the options now, and is left out")
    config = RunConfig.read(values, place)
    _warn_of_idle(config, overrides)
    return config


def _or_default(values: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401  as YAML gave it
    return values.get(name, RunConfig.model_fields[name].default)


def _in_bytes(values: Mapping[str, Any]) -> bool | None:
    """True if the budget is one of bytes; None if it is unreadable, which `RunConfig` reports."""
    try:
        return parse_budget(_or_default(values, "budget")).in_bytes
    except BudgetError:
        return None


def _outdated(values: Mapping[str, Any]) -> set[str]:
    """Options that `RunConfig` would refuse beside the others, and that no value can unset."""
    found: set[str] = set()
    in_bytes = _in_bytes(values)
    if values.get("clusters") is not None and in_bytes:
        found.add("clusters")
    unread = in_bytes or values.get("merge_method") not in READ_ANSWERS
    if values.get("unlabelled") and values.get("tasks") and unread and not values.get("refine"):
        found.add("unlabelled")
    return found


def _warn_of_idle(config: RunConfig, overrides: Mapping[str, object]) -> None:
    """Warn about options given now that have no effect; a file may serve runs of both kinds."""
    needed: dict[str, str] = {}
    if config.planned:
        needed["search"] = "a number of adapters as the budget"
    if config.merge_rank and _sums_ranks(config):
        needed["merge_rank"] = "a merge method that keeps to a rank"
    if not config.has_rows:
        needed |= dict.fromkeys(_OF_ROWS, "rows, --tasks or --unlabelled")
        if config.search in SEARCHES:
            needed["search"] = needed["baselines"]
    for name, what in needed.items():
        value = getattr(config, name)
        if name in overrides and value != RunConfig.model_fields[name].default:
            warn(f"{name}: {value!r} does nothing without {what}")


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
