"""The options of the phone benchmark; the command line is written from them, as that of a run."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from d2c_mlx.utils.validation import Checked, expects, option

__all__ = ["CONTEXTS", "PhoneConfig"]

# Tokens of the prompts unless they are named.
CONTEXTS = (128, 512, 1024)
_LIMITS, _QUALITY, _TIMES = "Model and device", "Quality", "Measurement"


class PhoneConfig(Checked):
    """Options of the phone benchmark, see docs/how-to/ios.md.

    Raises:
        ConfigError: every value of another type, out of range or at odds with another, one line
            each.
    """

    pack: str = Field(description="directory of the pack")
    device: str = option(
        ...,
        "iphone-6gb, iphone-8gb, iphone-12gb, mac-8gb, mac-16gb, android-8gb, or a .yaml file of"
        " your own",
        group=_LIMITS,
        metavar="PROFILE",
    )
    model: str | None = option(
        None,
        "mlx-lm directory, Hugging Face id or .gguf file",
        group=_LIMITS,
        metavar="M",
        default_text="the embedded SmolLM2-135M-Instruct",
    )
    bits: int | None = option(
        None,
        "4 or 8, if M is not quantized yet",
        group=_LIMITS,
        default_text="M as it is",
        expected="4 or 8",
    )
    adapters: str | None = option(
        None, "the individual adapters, to measure them too", group=_QUALITY, metavar="A", path=True
    )
    tasks: str | None = option(
        None,
        "rows as a run has them, to measure quality too",
        group=_QUALITY,
        metavar="DIR",
        path=True,
    )
    test_examples: int = option(
        10, "rows that judge, 0 is all", group=_QUALITY, ge=0, expected="0 (all) or more"
    )
    answers: int | None = option(
        None,
        "how many of them are answered and compared, 0 is none",
        group=_QUALITY,
        default_text="all of them",
        ge=0,
    )
    contexts: tuple[int, ...] | None = option(
        None,
        "tokens of the prompts",
        group=_TIMES,
        metavar="LIST",
        default_text=f"{','.join(map(str, CONTEXTS))}, if the model has room",
        expected='numbers of 1 or more, such as "128,512"',
    )
    decode: int = option(32, "tokens generated after each", group=_TIMES, ge=2)
    runs: int = option(3, "timed runs of each", group=_TIMES, ge=1)

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
