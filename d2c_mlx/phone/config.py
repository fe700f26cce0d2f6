"""What the phone benchmark measures: its options, and the limits of devices."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.parsing import bytes_of, read_yaml
from d2c_mlx.utils.validation import Checked, expects

# Widths of mlx-lm's quantization, of which 16 is none, and its recipes of two widths.
BITS = {*"16 8 6 5 4 3 2 mixed_2_6 mixed_3_4 mixed_3_6 mixed_4_6".split()}


class PhoneConfig(Checked):
    """Options of the phone benchmark, see docs/how-to/ios.md; their help is in `cli/phone.py`.

    Raises:
        ConfigError: every value of another type, out of range or at odds with another, one line
            each.
    """

    packs: tuple[str, ...] = Field(min_length=1)
    device: str | None = None
    model: str | None = None
    bits: tuple[str, ...] = ()
    adapters: str | None = None
    tasks: str | None = None
    test_examples: int = Field(10, ge=0)
    answers: int = Field(10, ge=0)
    contexts: tuple[int, ...] = (1024, 4096, 8192)
    decode: int = Field(32, ge=2)
    runs: int = Field(3, ge=1)

    @field_validator("bits", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:  # noqa: ANN401  checked by its type next
        """The list of the command line, "16,4"."""
        parts = tuple(value.split(",") if isinstance(value, str) else value)
        if not BITS.issuperset(parts) or len({*parts}) < len(parts):
            raise expects(f'some of {", ".join(sorted(BITS))}, such as "16,8,4"')
        return parts

    @field_validator("contexts", mode="before")
    @classmethod
    def _contexts(cls, value: Any) -> Any:  # noqa: ANN401  checked by its type next
        """The list of the command line, "1024,4096"."""
        if isinstance(value, str):
            value = [int(part) if part.strip().isdecimal() else 0 for part in value.split(",")]
        if min(value, default=0) < 1:
            raise expects('numbers of 1 or more, such as "1024,4096"')
        return tuple(sorted({*value}))


Known = Literal["published", "measured", "estimated"]


class Profile(Checked):
    """The limits of a device.

    Attributes:
        chips: of such devices, in words.
        memory, storage: bytes that an app may use; that base model and pack may take together.
        memory_is, storage_is: how that figure is known: from the maker, measured, or estimated.
        memory_source, storage_source: where it is from or how it is estimated, in words.
    """

    chips: str = ""
    memory: int
    memory_is: Known
    memory_source: str = Field(pattern=r"\S")
    storage: int
    storage_is: Known
    storage_source: str = Field(pattern=r"\S")

    @field_validator("memory", "storage", mode="before")
    @classmethod
    def _nbytes(cls, value: object) -> int:
        if (nbytes := bytes_of(value)) is None:
            raise expects('bytes such as "4.2GB"')
        return nbytes


def find_profiles(spec: str | None) -> dict[str, Profile]:
    """Read a profile of `profiles.yaml` by its name, those of a `.yaml` file, or all; by name.

    Raises:
        ConfigError: no such profile, or every problem of the profile, one line each.
    """
    path = Path(os.path.expanduser(spec or ""))
    own = path.suffix in (".yaml", ".yml")
    file = path if own else Path(__file__).with_name("profiles.yaml")
    profiles = read_yaml(file)
    names = [spec] if spec and not own else list(profiles)
    if not names or names[0] not in profiles:
        raise ConfigError(
            f"{path if own else 'device'}: {spec!r} is no profile; expected"
            f" {', '.join(profiles)}, or a .yaml file as d2c_mlx/phone/profiles.yaml"
        )
    return {str(name): Profile.read(profiles[name], f"{file}: {name}") for name in names}
