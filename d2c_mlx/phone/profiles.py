"""Device profiles: the memory that an app may use, and the storage that may ship."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.utils.errors import BudgetError, ConfigError
from d2c_mlx.utils.parsing import read_yaml

__all__ = ["Profile", "builtin_profiles", "find_profile"]

_BUILTIN = Path(__file__).with_name("profiles.yaml")


@dataclass(frozen=True)
class Profile:
    """The limits of a device.

    Attributes:
        name: name of the device.
        memory: bytes that one app may use.
        memory_source: where that figure is from, in words.
        storage: bytes that base model and pack may take together.
        storage_source: where that figure is from, in words.
    """

    name: str
    memory: int
    memory_source: str
    storage: int
    storage_source: str


def builtin_profiles() -> dict[str, Profile]:
    """The profiles of `profiles.yaml`, by name."""
    return _read(_BUILTIN)


def find_profile(spec: str) -> Profile:
    """Find a built-in profile by its name, or read the one of a `.yaml` file.

    Raises:
        ConfigError: no such profile, or every problem of the file, one line each.
    """
    path = Path(os.path.expanduser(spec))
    if path.suffix not in (".yaml", ".yml"):
        known = builtin_profiles()
        if spec not in known:
            raise ConfigError(
                f"device: {spec!r} is no profile; expected {', '.join(known)}, or a .yaml file of"
                " the same form as d2c_mlx/phone/profiles.yaml"
            )
        return known[spec]
    if not path.is_file():
        raise ConfigError(f"device: {path}: no such file; --device names a profile that exists")
    found = _read(path)
    if len(found) != 1:
        raise ConfigError(f"{path}: holds {len(found)} profiles ({', '.join(found)}), expected one")
    return next(iter(found.values()))


def _read(path: Path) -> dict[str, Profile]:
    content = read_yaml(path)
    if not content:
        raise ConfigError(f"{path}: expected NAME: and below it memory, memory_source, storage and"
                          " storage_source")  # fmt: skip
    problems: list[str] = []
    found = {str(k): _profile(f"{path}: {k}", str(k), v, problems) for k, v in content.items()}
    if problems:
        raise ConfigError(problems)
    return {name: profile for name, profile in found.items() if profile}


def _profile(where: str, name: str, entry: Any, problems: list[str]) -> Profile | None:  # noqa: ANN401  as YAML gave it
    """Read one profile; if something is wrong, add it to `problems` and return None."""
    keys = [field.name for field in fields(Profile)][1:]
    if not isinstance(entry, dict):
        problems.append(f"{where}: found {entry!r}, expected {', '.join(keys)}")
        return None
    n_before = len(problems)
    problems += [f"{where}.{key}: unknown, expected {', '.join(keys)}"
                 for key in entry if key not in keys]  # fmt: skip
    values: dict[str, Any] = {}
    for key in keys:
        value = entry.get(key)
        if key.endswith("_source"):
            if not isinstance(value, str) or not value.strip():
                problems.append(
                    f"{where}.{key}: found {value!r}, expected where the figure is from, in words"
                )
            values[key] = value
        else:
            values[key] = _nbytes(value)
            if values[key] is None:
                problems.append(f'{where}.{key}: found {value!r}, expected bytes such as "4.2GB"')
    return Profile(name, **values) if len(problems) == n_before else None


def _nbytes(value: object) -> int | None:
    try:
        return parse_budget(value).nbytes if isinstance(value, str) else None
    except BudgetError:
        return None
