"""The options of the phone benchmark: type, default and range; help is in `cli/phone.py`."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationInfo, field_validator

from d2c_mlx.utils.validation import Checked, expects, option

__all__ = ["CONTEXTS", "PhoneConfig"]

# Tokens of the prompts unless they are named.
CONTEXTS = (128, 512, 1024)


class PhoneConfig(Checked):
    """Options of the phone benchmark, see docs/how-to/ios.md.

    Raises:
        ConfigError: every value of another type, out of range or at odds with another, one line
            each.
    """

    pack: str
    device: str
    model: str | None = None
    bits: int | None = option(None, expected="4 or 8")
    adapters: str | None = None
    tasks: str | None = None
    test_examples: int = option(10, ge=0, expected="0 (all) or more")
    answers: int | None = option(None, ge=0)
    contexts: tuple[int, ...] | None = option(
        None, expected='numbers of 1 or more, such as "128,512"'
    )
    decode: int = option(32, ge=2)
    runs: int = option(3, ge=1)

    @field_validator("contexts", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:  # noqa: ANN401  checked by its type next
        """The list of the command line, "128,512"."""
        if isinstance(value, str):
            parts = value.split(",")
            return tuple(int(one) if one.strip().isdecimal() else one for one in parts)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("contexts")
    @classmethod
    def _above_zero(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and min(value, default=0) < 1:
            raise expects('numbers of 1 or more, such as "128,512"')
        return value

    @field_validator("bits")
    @classmethod
    def _known(cls, bits: int | None) -> int | None:
        if bits not in (None, 4, 8):
            raise expects("4 or 8")
        return bits

    @field_validator("answers")
    @classmethod
    def _of_the_rows(cls, n: int | None, info: ValidationInfo) -> int | None:
        """Refuse more rows than are tokenized, which are the held-out rows of `test_examples`."""
        most = info.data.get("test_examples")
        if n is not None and most and n > most:
            raise expects(f"0 to test_examples ({most})")
        return n
