"""Device profiles: the memory that an app may use, and the storage that may ship."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.parsing import bytes_of, read_yaml
from d2c_mlx.utils.validation import Checked, expects

__all__ = ["Profile", "builtin_profiles", "find_profile"]

_BUILTIN = Path(__file__).with_name("profiles.yaml")
_BYTES, _SOURCE = 'bytes such as "4.2GB"', "where the figure is from, in words"


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


def _nbytes(value: object) -> int:
    nbytes = bytes_of(value)
    if nbytes is None:
        raise expects(_BYTES)
    return nbytes


def _words(value: str) -> str:
    if not value.strip():
        raise expects(_SOURCE)
    return value


_Bytes = Annotated[int, BeforeValidator(_nbytes)]
_Source = Annotated[str, AfterValidator(_words)]


class _Entry(Checked):
    """A profile in a file."""

    memory: _Bytes = Field(json_schema_extra={"expected": _BYTES})
    memory_source: _Source = Field(json_schema_extra={"expected": _SOURCE})
    storage: _Bytes = Field(json_schema_extra={"expected": _BYTES})
    storage_source: _Source = Field(json_schema_extra={"expected": _SOURCE})


class _File(Checked):
    """Names, and a profile below each."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Entry]


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
    found = _File.read({str(name): entry for name, entry in content.items()}, str(path))
    return {name: Profile(name, **dict(entry)) for name, entry in (found.model_extra or {}).items()}
