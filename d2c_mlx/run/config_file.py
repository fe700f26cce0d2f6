"""Reading the options of a run: command line over YAML over defaults."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from d2c_mlx.run.config import RunConfig, is_planned
from d2c_mlx.utils.errors import BudgetError, ConfigError, InputWarning
from d2c_mlx.utils.parsing import read_yaml

__all__ = ["load_config"]

# Options that only D2C has a use for, and only a refinement.
_OF_D2C = ("search", "init", "patience", "rounds", "restarts")
_OF_REFINING = ("refine_steps", "refine_rate")


def load_config(
    path: Path | None, overrides: Mapping[str, object], saved: bool = False
) -> RunConfig:
    """Read a YAML file, put `overrides` over it, check everything.

    Paths in the file are relative to the working directory; `~` is the home directory.

    Args:
        path: of the file; None is none.
        overrides: what was asked for now; an `InputWarning` says what of it does nothing.
        saved: the file is what an earlier run was asked for. What of it cannot go with the
            overrides is left out with an `InputWarning`, as no option can say none.

    Raises:
        ConfigError: every unknown key and wrong value, one line each.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    known = {field.name: str(field.type) for field in fields(RunConfig)}
    for where, source in ((f"{path}: ", read_yaml(path)), ("", dict(overrides))):
        for key, value in source.items():
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
                problems.append(f"{where}{key}: unknown key{hint}")
                continue
            typed, problem = _typed(key, value, known[key], where)
            if problem:
                problems.append(problem)
            else:
                values[key] = typed
    if problems:
        raise ConfigError(problems)
    for name in sorted(_outdated(values) - overrides.keys()) if saved else ():
        warnings.warn(
            f"{name}: {values.pop(name)} of {path} does not go with the options now, and is left"
            " out",
            InputWarning,
            stacklevel=2,
        )
    config = RunConfig(**values)
    _warn_of_idle(config, overrides)
    return config


def _typed(name: str, value: Any, annotation: str, where: str) -> tuple[Any, str | None]:  # noqa: ANN401  as YAML gave it
    """Coerce one value to its field's type: `(value, problem or None)`."""
    kinds = {"str": (str,), "int": (int,), "float": (int, float), "tuple[str, ...]": (list, tuple)}
    if annotation == "bool":
        good = isinstance(value, bool)
        return value, None if good else f"{where}{name}: found {value!r}, expected true or false"
    optional = annotation.endswith(" | None")
    kind = annotation.removesuffix(" | None")
    if value is None and optional:
        return None, None
    if annotation == "str | tuple[str, ...]":
        kind = "str" if isinstance(value, str) else "tuple[str, ...]"
    if name == "budget" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value), None
    if kind == "tuple[str, ...]" and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, kinds[kind]) or isinstance(value, bool):
        plain = {"tuple[str, ...]": "a list of strings"}.get(kind, kind)
        return None, f"{where}{name}: found {value!r}, expected {plain}"
    typed: Any = value
    if kind == "float":
        try:
            return float(typed), None
        except OverflowError:
            return None, f"{where}{name}: found a number beyond 64 bits, expected float"
    return (tuple(map(str, typed)) if kind.startswith("tuple") else typed), None


def _outdated(values: Mapping[str, Any]) -> set[str]:
    """Options without a value for none that `RunConfig` would refuse beside the others."""
    found = set()
    plan, budget = (values.get(name, getattr(RunConfig, name)) for name in ("plan", "budget"))
    # An unreadable budget is for `RunConfig` to refuse.
    with contextlib.suppress(BudgetError):
        if values.get("max_adapters") is not None and not is_planned(plan, budget):
            found.add("max_adapters")
    if values.get("merge_rank") is not None and values.get("merge_method") == "concat":
        found.add("merge_rank")
    return found


def _warn_of_idle(config: RunConfig, overrides: Mapping[str, object]) -> None:
    """Of what was asked for now and does nothing; a file may be for runs of both kinds."""
    needed: dict[str, str] = {}
    if config.planned:
        needed |= dict.fromkeys(_OF_D2C, "a number of adapters as the budget, or --plan d2c")
    if not config.refine:
        needed |= dict.fromkeys(_OF_REFINING, "--refine")
    for name, what in needed.items():
        value = getattr(config, name)
        if name in overrides and value != getattr(RunConfig, name):
            warnings.warn(
                f"{name}: {value!r} does nothing without {what}", InputWarning, stacklevel=3
            )
