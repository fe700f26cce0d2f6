"""What the phone benchmark measures: its options, and the limits of a device."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.parsing import bytes_of, read_yaml
from d2c_mlx.utils.validation import Checked, expects


class PhoneConfig(Checked):
    """Options of the phone benchmark, see docs/how-to/ios.md; their help is in `cli/phone.py`.

    Raises:
        ConfigError: every value of another type, out of range or at odds with another, one line
            each.
    """

    pack: str
    device: str
    model: str | None = None
    bits: Literal[4, 8] | None = None
    adapters: str | None = None
    tasks: str | None = None
    test_examples: int = Field(10, ge=0)
    contexts: tuple[int, ...] = (128, 512, 1024)
    decode: int = Field(32, ge=2)
    runs: int = Field(3, ge=1)

    @field_validator("contexts", mode="before")
    @classmethod
    def _contexts(cls, value: Any) -> Any:  # noqa: ANN401  checked by its type next
        """The list of the command line, "128,512"; no context is empty."""
        if isinstance(value, str):
            value = [int(part) if part.strip().isdecimal() else 0 for part in value.split(",")]
        if min(value, default=0) < 1:
            raise expects('numbers of 1 or more, such as "128,512"')
        return tuple(value)


class Profile(Checked):
    """The limits of a device.

    Attributes:
        memory: bytes that one app may use.
        memory_source: where that figure is from, in words.
        storage: bytes that base model and pack may take together.
        storage_source: where that figure is from, in words.
    """

    memory: int
    memory_source: str = Field(pattern=r"\S")
    storage: int
    storage_source: str = Field(pattern=r"\S")

    @field_validator("memory", "storage", mode="before")
    @classmethod
    def _nbytes(cls, value: object) -> int:
        if (nbytes := bytes_of(value)) is None:
            raise expects('bytes such as "4.2GB"')
        return nbytes


def find_profile(spec: str) -> tuple[str, Profile]:
    """Find a profile of `profiles.yaml` by its name, or read that of a `.yaml` file; returns both.

    Raises:
        ConfigError: no such profile, or every problem of the profile, one line each.
    """
    path = Path(os.path.expanduser(spec))
    own = path.suffix in (".yaml", ".yml")
    file = path if own else Path(__file__).with_name("profiles.yaml")
    profiles = read_yaml(file)
    if own and len(profiles) != 1:
        raise ConfigError(
            f"{path}: found {len(profiles)} profiles, expected one: NAME: and below it"
            f" {', '.join(Profile.model_fields)}"
        )
    name = next(iter(profiles)) if own else spec
    if name not in profiles:
        raise ConfigError(
            f"device: {spec!r} is no profile; expected {', '.join(profiles)}, or a .yaml file of"
            " the same form as d2c_mlx/phone/profiles.yaml"
        )
    return str(name), Profile.read(profiles[name], f"{file}: {name}")
