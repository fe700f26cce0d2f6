"""Checked values: pydantic models whose problems are one line each, all at once.

    class Profile(Checked):
        memory: int = Field(gt=0)

    Profile.read({"memory": "3", "ram": 4}, place="phone.yaml")
    # phone.yaml: ram: unknown key; known: memory
    # phone.yaml: memory: found '3', input should be a valid integer

A validator of a field raises ValueError with a sentence that follows the field's name, or
`expects("words")` for "found VALUE, expected WORDS". `info.data` has the fields before it, so rules
about two fields are reported with all others.
"""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from d2c_mlx.utils.errors import ConfigError

T = TypeVar("T", bound="Checked")

# Most characters of a stranger's value or key that a message repeats.
_MOST_FOUND = 200


def expects(words: str) -> PydanticCustomError:
    """Make the error that a validator raises: "field: found VALUE, expected WORDS"."""
    return PydanticCustomError("expects", "expected {words}", {"words": words})


class Checked(BaseModel):
    """A frozen model that takes no unknown keys and converts nothing but whole numbers to floats.

    Both `Model(**values)` and `Model.read(values)` raise ConfigError with a line per problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:  # noqa: ANN401  validated here
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(problems_of(error, type(self), values)) from None

    # Pydantic's own RootModel does this too. Without it a nested model would be made by `__init__`,
    # and raise its problems alone.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def read(cls: type[T], values: object, place: str | Mapping[str, str] = "") -> T:
        """Check values from a file.

        Args:
            values: a mapping, or whatever the file holds in place of one.
            place: the file to name before every field; a mapping by top-level key if they differ.

        Raises:
            ConfigError: one line per problem.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(problems_of(error, cls, values, place)) from None

    def replace(self: T, **changes: object) -> T:
        """Copy the model with other values for some fields; everything is checked again."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def problems_of(
    error: ValidationError,
    model: type[BaseModel],
    values: object,
    place: str | Mapping[str, str] = "",
) -> list[str]:
    """List the problems of a validation, each "place: field: message".

    Unknown keys come before the fields beside them, because they often explain those.

    Args:
        error: the error that pydantic raised.
        model: class of the model that was validated.
        values: values that it was validated from.
        place: see `Checked.read`.
    """
    lines: dict[str, str] = {}
    errors = error.errors(include_url=False)
    for details in sorted(errors, key=lambda details: details["type"] != "extra_forbidden"):
        path, inner = [], values
        for part in details["loc"]:
            # Pydantic's path goes on into the members of a union.
            if not isinstance(inner, Mapping if isinstance(part, str) else list | tuple):
                break
            path.append(str(part)[:_MOST_FOUND])
            inner = inner.get(part) if isinstance(inner, Mapping) else inner[int(part)]
        field, kind, message = ".".join(path), details["type"], details["msg"]
        words = f"found {found_text(inner)}, {message[:1].lower()}{message[1:]}"
        if kind == "extra_forbidden":
            names = [about.alias or name for name, about in model.model_fields.items()]
            close = difflib.get_close_matches(path[-1], names, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
            words = f"unknown key; {hint}"
        elif kind == "missing":
            words = "missing"
        elif kind == "value_error":
            words = message.removeprefix("Value error, ")
        where = place if isinstance(place, str) else place.get(path[0] if path else "", "")
        lines.setdefault(field, ": ".join(text for text in (where, field, words) if text))
    return list(lines.values())


def found_text(value: object) -> str:
    """Format any value for a message, cut to 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits.
        text = "a number of thousands of digits"
    return text if len(text) <= _MOST_FOUND else f"{text[:_MOST_FOUND]}..."
