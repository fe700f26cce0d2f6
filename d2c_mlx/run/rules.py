"""Rules about the values of a run's options, alone and beside each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, field_validator

from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.merge.options import NEED_ROWS, READ_ANSWERS
from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.validation import Checked, expects, refused

__all__ = ["NOT_GIVEN", "RunRules"]

NOT_GIVEN = "not given; pass --{} or set it in the YAML file, which d2c-mlx init DIR writes"


class RunRules(Checked):
    """The rules of `RunConfig`, which has the fields.

    A validator sees in `info.data` the valid fields above its own, so a rule about two options is
    told with all other problems.
    """

    @field_validator("adapters", "baselines", mode="before", check_fields=False)
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401  as YAML gave it
        """Read lists of YAML and lists with commas."""
        if isinstance(value, str) and info.field_name != "adapters":
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            return value
        return tuple(map(str, value))

    @field_validator("budget", mode="before", check_fields=False)
    @classmethod
    def _text(cls, value: Any) -> Any:  # noqa: ANN401  as YAML gave it
        """Turn a number of adapters, which YAML gives as a number, into text."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if number else value

    @field_validator("adapters", "output", check_fields=False)
    @classmethod
    def _given(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401  one of two types
        if not value:
            raise refused(NOT_GIVEN.format(info.field_name))
        return value

    @field_validator("tasks", "output", "unlabelled", "clusters", check_fields=False)
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        """Expand `~`. `adapters` and `model` may be hub ids, so their look-up expands them."""
        return os.path.expanduser(value) if value else value

    @field_validator("output", check_fields=False)
    @classmethod
    def _is_no_file(cls, value: str) -> str:
        try:
            is_file = Path(value).is_file()
        except OSError as error:
            raise refused(f"{error.strerror}, expected a directory or a new name") from None
        if is_file:
            raise refused(f"{value} is a file, expected a directory or a new name")
        return value

    @field_validator("budget", check_fields=False)
    @classmethod
    def _is_a_budget(cls, value: str) -> str:
        try:
            parse_budget(value)
        except BudgetError as error:
            raise refused(str(error).removeprefix("budget: ")) from None
        return value

    # Rules about two options. `info.data` holds the fields above that are valid.

    @field_validator("format", check_fields=False)
    @classmethod
    def _of_a_plan(cls, value: str, info: ValidationInfo) -> str:
        if value != "compact" and _in_bytes(info) is False:
            raise expects(f"'compact' unless the budget is in bytes ({info.data['budget']!r})")
        return value

    @field_validator("merge_method", "refine", check_fields=False)
    @classmethod
    def _with_rows(cls, value: str | bool | None, info: ValidationInfo) -> str | bool | None:
        """Refuse what needs rows where there are none."""
        rows = info.data.get("tasks") or info.data.get("unlabelled")
        if "tasks" in info.data and not rows and (value in NEED_ROWS or value is True):
            raise refused(f"found {value!r}, which needs calibration rows: pass --tasks DIR, or"
                          " prompts as --unlabelled FILE")  # fmt: skip
        return value

    @field_validator("clusters", check_fields=False)
    @classmethod
    def _with_merges(cls, clusters: str | None, info: ValidationInfo) -> str | None:
        """Refuse clusters where a plan has none."""
        if clusters and _in_bytes(info):
            raise expects(
                "none where a budget in bytes is planned; pass a number of adapters as the budget"
            )
        return clusters

    @field_validator("refine", check_fields=False)
    @classmethod
    def _in_a_compact_file(cls, refine: bool, info: ValidationInfo) -> bool:
        """Refuse to train what a plan stores as GGUF."""
        if refine and _in_bytes(info) and info.data.get("format") == "gguf":
            raise expects("False where a plan is stored as GGUF, which is not trained; leave"
                          " --format gguf out")  # fmt: skip
        return refine

    @field_validator("refine", check_fields=False)
    @classmethod
    def _for_prompts(cls, refine: bool, info: ValidationInfo) -> bool:
        """Refuse prompts beside rows where nothing would read their answers."""
        prompts, method = info.data.get("unlabelled"), info.data.get("merge_method")
        if refine or not prompts or not info.data.get("tasks"):
            return refine
        if _in_bytes(info):
            raise refused(f"found False, but beside --tasks no plan reads answers to {prompts}:"
                          " pass --refine, or a number of adapters as the budget, or leave"
                          " --unlabelled out")  # fmt: skip
        if method not in READ_ANSWERS:
            raise refused(f"found False, but beside --tasks merge_method {method} does not read"
                          f" answers to {prompts}: pass layerwise or --refine, or leave"
                          " --unlabelled out")  # fmt: skip
        return refine


def _in_bytes(info: ValidationInfo) -> bool | None:
    """True if the budget is one of bytes; None if it is missing or invalid."""
    budget = info.data.get("budget")
    return None if budget is None else parse_budget(budget).in_bytes
