"""The options of a run: type, default and range of each; its help is in `cli/run.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.merge.options import RUN_METHODS, MergeOptions
from d2c_mlx.plugins import CLUSTERINGS, MERGE_METHODS, Plugin, find, names
from d2c_mlx.run.rules import NOT_GIVEN, RunRules
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.validation import option

__all__ = [
    "ANSWERED_ROWS",
    "BASELINES",
    "FORMATS",
    "RANDOM_PARTITIONS",
    "SEARCHES",
    "STAGES",
    "RunConfig",
    "stages_of",
]

# The keys of `pipeline.STAGES`, repeated here so that a finished run imports no model code.
STAGES = (
    "convert", "answer", "probe", "plan", "cluster", "merge", "refine", "pack", "bench", "report",
)  # fmt: skip
# Random partitions that bench averages, as one may be lucky.
RANDOM_PARTITIONS = 3
# Most held-out rows of each task that are answered.
ANSWERED_ROWS = 3
BASELINES = ("merge-all", "random", "kmeans")
FORMATS = ("compact", "gguf")
SEARCHES = ("estimates", "paper")
# No matrix of a model is wider, so no update has a larger rank.
_MOST_RANK = 1_000_000
# The largest seed that scikit-learn and NumPy's older generators take.
_MOST_SEED = 2**32 - 1


class RunConfig(RunRules):
    """Options of `d2c-mlx run`, whose help says what each is; every field is a key of a YAML file.

    Use `config_file.load_config` to read one from a file; `RunConfig.read` takes values.

    Raises:
        ConfigError: every value that is missing, of another type, out of range or at odds with
            another, one line each.
    """

    adapters: str | tuple[str, ...] = option(..., missing=NOT_GIVEN.format("adapters"))
    skip_bad: bool = False
    accept_dora: int | None = option(None, ge=1, le=_MOST_RANK)
    tasks: str | None = None
    unlabelled: str | None = None
    model: str | None = None
    output: str = option(..., missing=NOT_GIVEN.format("output"))

    budget: str = "12.5%"
    format: str = option("compact", choices=FORMATS)

    merge_method: str | None = option(None, choices=RUN_METHODS, more=partial(names, MERGE_METHODS))
    merge_rank: int | None = option(None, ge=1, le=_MOST_RANK)

    clusters: str | None = None
    search: str = option("estimates", choices=SEARCHES, more=partial(names, CLUSTERINGS))
    seed: int = option(0, ge=0, le=_MOST_SEED)

    probe_examples: int = option(10, ge=1)
    test_examples: int = option(100, ge=0)
    baselines: tuple[str, ...] = option(BASELINES, choices=BASELINES)

    refine: bool = option(False, validate_default=True)

    @property
    def merging(self) -> MergeOptions:
        """The options that decide how adapters are merged."""
        return MergeOptions(self.merge_method, rank=self.merge_rank, seed=self.seed)

    @property
    def plugins(self) -> list[Plugin]:
        """The plug-ins that these options name; raises ConfigError as `plugins.find` does."""
        named = []
        if self.merge_method and self.merge_method not in RUN_METHODS:
            named.append(find(MERGE_METHODS, self.merge_method))
        if self.search not in SEARCHES:
            named.append(find(CLUSTERINGS, self.search))
        return [one for one in named if one]

    @property
    def planned(self) -> bool:
        """True for a budget in bytes: a plan chooses what is stored."""
        return parse_budget(self.budget).in_bytes

    @property
    def answered(self) -> bool:
        """True if the rows are answers of the task adapters to `unlabelled` prompts."""
        return bool(self.unlabelled and not self.tasks)

    @property
    def has_rows(self) -> bool:
        """True if there are rows to measure on; else weights decide."""
        return bool(self.tasks or self.unlabelled)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` of a run directory holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self}


def stages_of(config: RunConfig, until: str = "report") -> list[str]:
    """Names of the stages of a run up to and including `until`, in order.

    Raises:
        ConfigError: the run has no such stage.
    """
    left_out = {"cluster", "merge"} if config.planned else {"plan"}
    if not config.refine:
        left_out.add("refine")
    if not config.unlabelled:
        left_out.add("answer")
    if not config.has_rows:
        left_out.add("probe")
    stages = [name for name in STAGES if name not in left_out]
    if until not in stages:
        raise ConfigError(
            f"until: found {until!r}, expected a stage of this run: {', '.join(stages)}"
        )
    return stages[: stages.index(until) + 1]
