"""Words for what a field of a pydantic model expects, from its type, choices and limits."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

__all__ = ["choice_words", "expected_words", "is_object", "own_words", "plain_type"]

_TYPE_WORDS = {int: "int", float: "float", str: "str", bool: "true or false"}
# Words for a list by the type of its items; any other is "a list".
_LIST_WORDS = {str: "a list of strings", int: "a list of whole numbers"}


def expected_words(kind: Any, field: FieldInfo | None, details: ErrorDetails) -> str:  # noqa: ANN401
    """The words after "expected", from a field's own ones or its type and range."""
    if details["type"] == "expects":
        return str(details["ctx"]["words"])
    if own := own_words(field).get("expected"):
        return str(own)
    kind = plain_type(kind)
    if get_origin(kind) is Literal:
        return choice_words(get_args(kind), False)
    items = get_args(kind)
    if get_origin(kind) in (list, tuple) and items:
        item = plain_type(items[0])
        if get_origin(item) is Literal:
            whole = details["type"] in ("tuple_type", "list_type")
            return _LIST_WORDS[str] if whole else choice_words(get_args(item), True)
        if details["type"] == "too_short" and "choices" in own_words(field):
            return choice_words(own_words(field)["choices"], True)
        return _LIST_WORDS.get(item, "a list")
    limits = _limits(field)
    if not details["type"].endswith(("_type", "_parsing", "_from_float", "missing")) and limits:
        return _range(kind, limits)
    if get_origin(kind) in (dict, Mapping) or is_object(kind):
        names = ", ".join(getattr(kind, "model_fields", ()))
        return f"an object with {names}" if names else "an object"
    if kind in _TYPE_WORDS:
        return _TYPE_WORDS[kind]
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return message[:1].lower() + message[1:]


def choice_words(choices: Sequence[str], several: bool) -> str:
    """A choice in words: one of the names, or some of them."""
    return f"{'some' if several else 'one'} of {list(choices)}"


def own_words(field: FieldInfo | None) -> Mapping[str, Any]:
    """Choices and words of a field: the arguments of its `validation.option` but for limits."""
    extra = field.json_schema_extra if field else None
    return extra if isinstance(extra, dict) else {}


def plain_type(kind: Any) -> Any:  # noqa: ANN401  types are any
    """A type without `Annotated` and without `| None`."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, types.UnionType):
            members = [one for one in get_args(kind) if one is not type(None)]
            if len(members) > 1:
                return kind
            kind = members[0]
        else:
            return kind


def is_object(kind: Any) -> bool:  # noqa: ANN401  types are any
    """True for a model or a mapping, which messages call an object."""
    kind = plain_type(kind)
    is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
    return is_model or get_origin(kind) in (dict, Mapping)


def _limits(field: FieldInfo | None) -> dict[str, float]:
    """The limits of a field, such as `{"ge": 1, "le": 10}`."""
    return {
        name: getattr(one, name)
        for one in (field.metadata if field else ())
        for name in ("gt", "ge", "lt", "le")
        if getattr(one, name, None) is not None
    }


def _range(kind: Any, limits: Mapping[str, float]) -> str:  # noqa: ANN401  types are any
    """Limits in words: `1 or more`, `0 to 100`, `a number above 0 and at most 1`."""
    if limits.keys() == {"ge"}:
        return f"{limits['ge']:,} or more"
    if limits.keys() == {"ge", "le"}:
        return f"{limits['ge']:,} to {limits['le']:,}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    number = "a whole number" if kind is int else "a number"
    return f"{number} {' and '.join(f'{words[name]} {one:g}' for name, one in limits.items())}"
