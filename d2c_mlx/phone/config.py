"""Options of the phone benchmark, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d2c_mlx.utils.errors import ConfigError

__all__ = ["CONTEXTS", "PhoneConfig", "read_contexts"]

# Prompt lengths in tokens if none are given.
CONTEXTS = (128, 512, 1024)


@dataclass(frozen=True)
class PhoneConfig:
    """Options of `d2c-mlx phone PACK`.

    Attributes:
        pack: directory of the pack.
        device: name of a profile, or a `.yaml` file with one.
        model: base model, see `models.resolve.resolve_model`; None is the embedded default.
        bits: 4 or 8, to quantize a model that is not quantized yet; None takes it as it is.
        adapters: directory of the task adapters, to measure them too; None leaves them out.
        tasks: directory of `<task>/test.jsonl`, to measure quality; None leaves it out.
        contexts: prompt lengths in tokens; None is those of `CONTEXTS` that fit into the model.
        decode: tokens generated after each prompt.
        runs: timed runs of each measurement.
        test_examples: held-out rows per task, the first of test.jsonl; 0 is all.
        answers: how many of these rows are answered, to compare with the expected answers; None is
            all of them, 0 none.
        history: file to which the result is added as a line of JSON; None writes none.
    """

    pack: str
    device: str
    model: str | None = None
    bits: int | None = None
    adapters: str | None = None
    tasks: str | None = None
    contexts: tuple[int, ...] | None = None
    decode: int = 32
    runs: int = 3
    test_examples: int = 10
    answers: int | None = None
    history: str | None = None

    def __post_init__(self) -> None:
        """Check all values; raises ConfigError with every one that is out of range."""
        checks = {
            "bits": (self.bits in (None, 4, 8), "4 or 8"),
            "contexts": (self.contexts is None or (self.contexts and min(self.contexts) >= 1),
                         "numbers of 1 or more"),
            "decode": (self.decode >= 2, "2 or more"),
            "runs": (self.runs >= 1, "1 or more"),
            "test_examples": (self.test_examples >= 0, "0 (all) or more"),
            # Other rows are not tokenized, so they cannot be answered.
            "answers": (self.answers is None or (0 <= self.answers
                        and not 0 < self.test_examples < self.answers),
                        f"0 to test_examples ({self.test_examples or 'all'})"),
            "history": (not self.history or not Path(self.history).is_dir(), "a file"),
        }  # fmt: skip
        problems = [f"{name}: found {getattr(self, name)!r}, expected {expected}"
                    for name, (good, expected) in checks.items() if not good]  # fmt: skip
        if problems:
            raise ConfigError(problems)


def read_contexts(text: str | None) -> tuple[int, ...] | None:
    """Parse prompt lengths such as "128,512"; raises ConfigError for anything but numbers."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f'contexts: found {text!r}, expected numbers such as "128,512"') from None
