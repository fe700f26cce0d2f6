"""Checked values: pydantic models whose problems are our one-line messages, all at once.

    class Profile(Checked):
        memory: str = Field(max_length=9, json_schema_extra={"expected": 'bytes like "4GB"'})

    Profile.read({"memory": 3, "ram": 4}, place="phone.yaml")
    # phone.yaml: ram: unknown key; known: memory
    # phone.yaml: memory: found 3, expected bytes like "4GB"

The words after "expected" are a field's own `expected`, else they follow from its type and range. A
field may also say what to do when it is absent (`missing`) or wrong (`remedy`). A validator of a
field raises `expects("words")`, or `refused("a sentence")` where "found X, expected Y" does not
fit. `info.data` has the fields before it, so rules about two fields are reported with all others.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import (
    Any,
    ClassVar,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from d2c_mlx.utils.errors import ConfigError, InputError, Problem
from d2c_mlx.utils.field_words import (
    choice_words,
    expected_words,
    is_object,
    own_words,
    plain_type,
)

__all__ = ["Checked", "expects", "found_text", "option", "problems_of", "refused"]

Path = tuple[str | int, ...]
T = TypeVar("T", bound="Checked")

# Most characters of a value that a message repeats.
_MOST_FOUND = 200
_MOST_INT = 2**64


def expects(words: str) -> PydanticCustomError:
    """Make the error that a validator raises: "field: found VALUE, expected WORDS"."""
    return PydanticCustomError("expects", "{words}", {"words": words})


def refused(sentence: str) -> PydanticCustomError:
    """Make the error that a validator raises in a sentence of its own: "field: SENTENCE".

    Use it where "found X, expected Y" of `expects` does not fit.
    """
    return PydanticCustomError("refused", "{words}", {"words": sentence})


def option(default: Any, **details: Any) -> Any:  # noqa: ANN401  as `Field` has it
    """Define an option with its range and the words of its messages.

    Use pydantic's `Field` for fields that are no option.

    Args:
        default: the default; `...` makes the option required.
        details: arguments of pydantic's `Field` (`ge`, `le`, `gt`, `min_length`,
            `validate_default`). Also `choices` for a name or each name in a list, `more` for a
            function that gives further names, and `expected`, `missing` and `remedy` for messages.
    """
    kept = ("ge", "gt", "le", "min_length", "validate_default")
    limits = {key: details.pop(key) for key in kept if key in details}
    return Field(default, json_schema_extra=details, **limits)


class Checked(BaseModel):
    """A frozen model that takes no unknown keys and converts nothing but whole numbers to floats.

    Both `Model(**values)` and `Model.read(values)` raise `error` with every problem, one line each.
    A nested model adds its problems to those of the outer one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # The class of the error for bad values, and the remedy for fields that name none of their own.
    error: ClassVar[type[InputError]] = ConfigError
    remedy: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:  # noqa: ANN401  validated here
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self.error(map(str, problems_of(error, type(self), values))) from None

    # Pydantic's own RootModel does this too. Without it a nested model would be made by `__init__`,
    # and raise its problems alone.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("*")
    @classmethod
    def _is_a_choice(cls, value: object, info: ValidationInfo) -> object:
        about = own_words(cls.model_fields.get(info.field_name or ""))
        choices = about.get("choices")
        names = value if isinstance(value, tuple) else () if value is None else (value,)
        if choices and not set(names) <= set(choices):
            choices = (*choices, *about["more"]()) if "more" in about else choices
            if not set(names) <= set(choices):
                raise expects(choice_words(choices, isinstance(value, tuple)))
        return value

    @classmethod
    def read(cls: type[T], values: object, place: str | Mapping[str, str] = "") -> T:
        """Check values from a file.

        Args:
            values: a mapping, or whatever the file holds in place of one.
            place: the file to name before every field; a mapping by top-level key if they differ.

        Raises:
            InputError: `cls.error`, with one line per problem.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise cls.error(map(str, problems_of(error, cls, values, place))) from None

    def replace(self: T, **changes: object) -> T:
        """Copy the model with other values for some fields; everything is checked again."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def problems_of(
    error: ValidationError,
    model: type[BaseModel],
    values: object,
    place: str | Mapping[str, str] = "",
) -> list[Problem]:
    """List the problems of a validation, one per field, unknown keys before those beside them.

    Args:
        error: the error that pydantic raised.
        model: class of the model that was validated.
        values: values that it was validated from, to repeat in messages.
        place: see `Checked.read`.
    """
    found: dict[Path, Problem] = {}
    for details in _unknown_first(error.errors(include_url=False)):
        path, field, kind, parent = _follow(model, details)
        if path in found:
            continue
        name = ".".join(_cut(str(key)) for key in path)
        words = details.get("ctx", {}).get("words", "")
        where = place if isinstance(place, str) else place.get(str(path[0]) if path else "", "")
        about, absent = own_words(field), details["type"] == "missing"
        if details["type"] == "extra_forbidden":
            words = f"unknown key; {_known(path[-1], parent)}"
        elif absent:
            words = about.get("missing", "")
        elif details["type"] != "refused":
            words = ""
        if words:
            found[path] = Problem(name, said=words, place=where)
            continue
        found[path] = Problem(
            name,
            "" if absent else found_text(_value(values, path, details["input"])),
            expected_words(kind, field, details),
            where,
            str(about.get("remedy", getattr(model, "remedy", ""))),
        )
    return list(found.values())


def found_text(value: object) -> str:
    """Format any value for a message, cut to 200 characters."""
    if isinstance(value, int) and abs(value) >= _MOST_INT:
        return "a number beyond 64 bits"
    return _cut(repr(value))


def _unknown_first(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Move the unknown keys of an object before its fields, because they often explain those."""
    result = list(errors)
    for details in errors:
        if details["type"] == "extra_forbidden":
            parent = details["loc"][:-1]
            result.remove(details)
            beside = (i for i, other in enumerate(result)
                      if other["loc"][: len(parent)] == parent
                      and other["type"] != "extra_forbidden")  # fmt: skip
            result.insert(next(beside, len(result)), details)
    return result


def _follow(
    model: type[BaseModel], details: ErrorDetails
) -> tuple[Path, FieldInfo | None, Any, type[BaseModel] | None]:
    """Find the field of an error: `(path, its definition, its type, model it belongs to)`.

    Pydantic's path goes on into the members of a union, and the items of a list of plain values.
    This path ends before, because a message shows such a value as a whole.
    """
    kind: Any = model
    field: FieldInfo | None = None
    parent: type[BaseModel] | None = None
    path: Path = ()
    for part in details["loc"]:
        kind = plain_type(kind)
        items = get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            parent, field = kind, _field(kind, part)
            kind = field.annotation if field else _extra_kind(kind)
        elif get_origin(kind) in (dict, Mapping) and items:
            # Pydantic adds "[key]" to the path if the key itself is wrong.
            parent, field, kind = None, None, None if part == "[key]" else items[1]
        elif get_origin(kind) in (list, tuple) and items and is_object(items[0]):
            parent, field, kind = None, None, items[0]
        else:
            break
        path = (*path, part) if part != "[key]" else path
    return path, field, kind, parent


def _field(model: type[BaseModel], key: str | int) -> FieldInfo | None:
    by_alias = (one for one in model.model_fields.values() if one.alias == key)
    return model.model_fields.get(str(key)) or next(by_alias, None)


def _extra_kind(model: type[BaseModel]) -> Any:  # noqa: ANN401  types are any
    """The type of a model's extra keys, if it declares one."""
    said = get_type_hints(model).get("__pydantic_extra__")
    members = get_args(plain_type(said))
    return members[1] if members else None


def _known(key: str | int, parent: type[BaseModel] | None) -> str:
    names = [one.alias or name for name, one in parent.model_fields.items()] if parent else []
    close = difflib.get_close_matches(str(key), names, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _value(values: object, path: Path, default: object) -> object:
    """The value at a path of `values`; `default` if the path leads nowhere."""
    for part in path:
        try:
            values = values[part]  # type: ignore[index]
        except (TypeError, LookupError):
            return default
    return values


def _cut(text: str) -> str:
    """Cut a text from a stranger's file to 200 characters."""
    return text if len(text) <= _MOST_FOUND else f"{text[:_MOST_FOUND]}..."
