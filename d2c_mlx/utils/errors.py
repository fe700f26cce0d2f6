"""Every error this package raises on purpose.

    D2CError                 something went wrong (exit code 1)
    └── InputError           the user's input must change (exit code 2)
        ├── ConfigError      an option or a YAML key
        ├── ModelError       the base model cannot be found or read
        ├── AdapterError     an adapter cannot be converted exactly
        ├── TaskError        a task's example file
        ├── BudgetError      the budget is unreadable or too small
        └── PackError        a pack or a run directory is missing or does not verify

An `InputError` carries *all* problems found, one line each. An `InputWarning` is for input that may
be right.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

T = TypeVar("T")
# Most problems that are told: a file of thousands has one reason.
_MOST_PROBLEMS = 200


class D2CError(Exception):
    """Base class of all errors raised on purpose."""

    exit_code = 1


class InputError(D2CError):
    """Bad input: `problems` holds one line per problem, each naming file, field and remedy.

    Characters that cannot be printed (line ends or control sequences in a stranger's file) are
    escaped.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        lines = [problems] if isinstance(problems, str) else list(problems)
        left = len(lines) - _MOST_PROBLEMS
        if left > 1:
            lines = [*lines[:_MOST_PROBLEMS], f"and {left:,} problems more"]
        self.problems = [printable(line) for line in lines]
        super().__init__("\n".join(self.problems))


class ConfigError(InputError):
    """An option or a YAML key is unknown or has a value of the wrong kind."""


class ModelError(InputError):
    """The base model cannot be found or read."""


class AdapterError(InputError):
    """An adapter cannot be read, or cannot be converted exactly."""


class TaskError(InputError):
    """A task's example file is missing or malformed."""


class BudgetError(InputError):
    """A budget is unreadable, or too small for a single adapter."""


class PackError(InputError):
    """A pack or a run directory is missing a part or does not verify."""


class InputWarning(UserWarning):
    """A warning, in one line, about input that is probably wrong."""


def printable(text: str, keep: str = "") -> str:
    """Escape what is not printable, such as control sequences of a terminal, and not in `keep`."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def collect(errors: list[InputError], call: Callable[[], T]) -> T | None:
    """Run `call`; on `InputError` append it to `errors` and return None.

    It tells the problems of several inputs at once; `gather` runs calls of one kind, and raises.
    """
    try:
        return call()
    except InputError as error:
        errors.append(error)
        return None


def gather(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Run every call and return the results.

    Raises:
        InputError: the problems of all calls that failed.
    """
    errors: list[InputError] = []
    results = [collect(errors, call) for call in calls]
    if errors:
        raise InputError(line for error in errors for line in error.problems)
    return cast(list[T], results)


def warn(text: str) -> None:
    """Warn of input that is probably wrong, in one line."""
    warnings.warn(printable(text), InputWarning, stacklevel=3)
