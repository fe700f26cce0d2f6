"""The options of a run: type, default, range and rules of each; its help is in `cli/run.py`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.merge.methods import NEED_ROWS, RUN_METHODS, MergeOptions
from d2c_mlx.plugins import MERGE_METHODS, Plugin, find, names
from d2c_mlx.utils.errors import BudgetError, ConfigError, warn
from d2c_mlx.utils.parsing import read_yaml
from d2c_mlx.utils.validation import Checked, expects

Baseline = Literal["merge-all", "random", "kmeans"]
# The keys of `pipeline.STAGES`, repeated here so that a finished run imports no model code.
STAGES = (
    "convert", "answer", "probe", "plan", "cluster", "merge", "refine", "pack", "bench", "report",
)  # fmt: skip
# Random partitions that bench averages, as one may be lucky.
RANDOM_PARTITIONS = 3
# Most held-out rows of each task that are answered.
ANSWERED_ROWS = 3
# No matrix of a model is wider, so no update has a larger rank.
_MOST_RANK = 1_000_000
# Options that only rows give a use.
_OF_ROWS = ("probe_examples", "test_examples", "baselines")
_NOT_GIVEN = "not given; pass --{} or set it in the YAML file, which d2c-mlx init DIR writes"


class RunConfig(Checked):
    """Options of `d2c-mlx run`, whose help says what each is; every field is a key of a YAML file.

    Use `load_config` to read one from a file; `RunConfig.read` takes values.

    Raises:
        ConfigError: every value that is missing, of another type, out of range or at odds with
            another, one line each.
    """

    adapters: str | tuple[str, ...] = Field("", validate_default=True)
    skip_bad: bool = False
    accept_dora: int | None = Field(None, ge=1, le=_MOST_RANK)
    tasks: str | None = None
    model: str | None = None
    output: str = Field("", validate_default=True)

    budget: Budget = parse_budget("12.5%")
    format: Literal["compact", "gguf"] = "compact"

    merge_method: str | None = None
    merge_rank: int | None = Field(None, ge=1, le=_MOST_RANK)

    clusters: str | None = None
    search: Literal["estimates", "paper"] = "estimates"
    # The largest that scikit-learn and NumPy's older generators take.
    seed: int = Field(0, ge=0, le=2**32 - 1)

    probe_examples: int = Field(10, ge=1)
    test_examples: int = Field(100, ge=0)
    baselines: tuple[Baseline, ...] = ()

    refine: bool = Field(False, validate_default=True)

    @property
    def merging(self) -> MergeOptions:
        """The options that decide how adapters are merged."""
        return MergeOptions(self.merge_method, rank=self.merge_rank, seed=self.seed)

    @property
    def plugins(self) -> list[Plugin]:
        """The plug-ins that these options name; raises ConfigError as `plugins.find` does."""
        name = self.merge_method
        return [find(MERGE_METHODS, name)] if name and name not in RUN_METHODS else []

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` of a run directory holds them."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self}
        return {**plain, "budget": self.budget.text}

    @field_validator("adapters", "baselines", "budget", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401  as YAML gave it
        """Read budgets, lists of YAML and lists with commas."""
        if info.field_name == "budget" and not isinstance(value, Budget):
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise expects('"12.5%", "40MB" or a number of adapters')
            try:
                return parse_budget(str(value))
            except BudgetError as error:
                raise ValueError(str(error).removeprefix("budget: ")) from None
        if info.field_name == "baselines" and isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        return tuple(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("merge_method")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        """Take our own names and those of plug-ins, which are looked for only if need be."""
        own = (None, *RUN_METHODS)
        if value not in own and value not in (others := names(MERGE_METHODS)):
            raise expects(f"one of {[*RUN_METHODS, *others]}")
        return value

    @field_validator("adapters", "output", "tasks", "clusters")
    @classmethod
    def _path(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401  one of two types
        """Refuse what is missing or a file, and expand `~` where no hub id may stand."""
        if not value and info.field_name in ("adapters", "output"):
            raise ValueError(_NOT_GIVEN.format(info.field_name))
        if not value or info.field_name == "adapters":
            return value
        path = os.path.expanduser(value)
        try:
            is_file = info.field_name == "output" and Path(path).is_file()
        except OSError as error:
            raise ValueError(f"{error.strerror}, expected a directory or a new name") from None
        if is_file:
            raise ValueError(f"{path} is a file, expected a directory or a new name")
        return path

    @field_validator("format", "merge_method", "clusters", "refine")
    @classmethod
    def _beside_others(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401
        """Refuse what the budget, the format or a lack of rows makes impossible.

        `info.data` holds the fields above that are valid.
        """
        budget, name = info.data.get("budget"), info.field_name
        if budget and name == "format" and value != "compact" and not budget.in_bytes:
            raise expects(f"'compact' unless the budget is in bytes ({budget.text!r})")
        if budget and name == "clusters" and value and budget.in_bytes:
            raise expects("none where the budget is in bytes; pass a number of adapters")
        if name == "refine" and value and info.data.get("format") == "gguf":
            raise expects("False where a plan is stored as GGUF; leave --format gguf out")
        if not info.data.get("tasks", True) and value in (True, *NEED_ROWS):
            raise ValueError(f"found {value!r}, which needs calibration rows: pass --tasks DIR")
        return value


def stages_of(config: RunConfig, until: str = "report") -> list[str]:
    """Names of the stages of a run up to and including `until`, in order.

    Raises:
        ConfigError: the run has no such stage.
    """
    left_out = {"cluster", "merge"} if config.budget.in_bytes else {"plan"}
    if not config.refine:
        left_out.add("refine")
    if not config.tasks:
        left_out |= {"answer", "probe"}
    stages = [name for name in STAGES if name not in left_out]
    if until not in stages:
        raise ConfigError(
            f"until: found {until!r}, expected a stage of this run: {', '.join(stages)}"
        )
    return stages[: stages.index(until) + 1]


def load_config(path: Path | None, overrides: Mapping[str, object]) -> RunConfig:
    """Read the options of a run from a YAML file and `overrides`, and check all of them.

    Paths in the file are relative to the working directory; `~` is the home directory.

    Args:
        path: the YAML file, which may be `config.yaml` of an earlier run; None reads no file.
        overrides: options given now, which replace those of the file; an empty text takes the
            default. An `InputWarning` names those without effect.

    Raises:
        ConfigError: every unknown key and wrong value, one line each.
    """
    values: dict[str, Any] = {str(key): value for key, value in read_yaml(path).items()}
    place = dict.fromkeys(values.keys() - overrides.keys(), str(path))
    values |= overrides
    empty = {name for name in ("tasks", "clusters", "merge_method") if values.get(name) == ""}
    config = RunConfig.read({k: v for k, v in values.items() if k not in empty}, place)
    needed = {} if config.tasks else dict.fromkeys(_OF_ROWS, "rows, --tasks")
    if config.budget.in_bytes:
        needed["search"] = "a number of adapters as the budget"
    for name in needed.keys() & overrides.keys():
        if (value := getattr(config, name)) != RunConfig.model_fields[name].default:
            warn(f"{name}: {value!r} does nothing without {needed[name]}")
    return config
