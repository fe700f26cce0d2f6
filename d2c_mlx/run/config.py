"""The options of a run, each declared once: type, default, range, help and group.

`python -m d2c_mlx.run.options` writes the command line (`cli/options.py`) and docs/options.md from
these fields; a test fails when they differ from what it would write.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, field_validator

from d2c_mlx.compress.budget import bytes_of, parse_budget
from d2c_mlx.merge.options import RUN_METHODS, MergeOptions
from d2c_mlx.run.removed import REMOVED_VALUES
from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.validation import Checked, expects, option, refused

__all__ = [
    "BASELINES",
    "PLANS",
    "SAVINGS",
    "SEARCHES",
    "STAGES",
    "STARTS",
    "RunConfig",
    "is_planned",
    "stages_of",
]

# The keys of `pipeline.STAGES`, repeated here so that a finished run imports no model code.
STAGES = ("convert", "probe", "plan", "cluster", "merge", "refine", "pack", "bench", "report")
STARTS = ("table", "kmeans")
BASELINES = ("merge-all", "random", "kmeans")
PLANS = ("auto", "d2c")
SEARCHES = ("moves", "paper")
SAVINGS = (
    "head",
    "prefix",
    "batches",
    "frozen",
    "fold",
    "streams",
    "exponentials",
    "cache",
    "bound",
)
# No matrix of a model is wider, so no update has a larger rank.
_MOST_RANK = 1_000_000
# Tuned scales reach a few, and sums of hundreds of adapters reach hundreds. More overflows float16.
_MOST_SCALE = 1_000
# The largest seed that scikit-learn and NumPy's older generators take.
_MOST_SEED = 2**32 - 1

_INPUT, _BUDGET, _MERGE = "Adapters and tasks", "Budget", "Merge"
_SEARCH, _EVALUATION, _REFINE = "Search", "Evaluation", "Refine"
_NOT_GIVEN = "not given; pass --{} or set it in the YAML file"


class RunConfig(Checked):
    """Options of `d2c-mlx run`. Every field is a YAML key and a command-line option.

    Use `config_file.load_config` to read one from a file; `RunConfig.read` takes values.

    Raises:
        ConfigError: every value that is missing, of another type, out of range or at odds with
            another, one line each.
    """

    adapters: str | tuple[str, ...] = option(
        ...,
        "folder with one subdirectory per adapter (PEFT, MLX or GGUF), or a list with commas:"
        " directories, .gguf files, Hugging Face ids owner/name[@revision]",
        group=_INPUT,
        metavar="A",
        path=True,
        expected="a list of strings",
        missing=_NOT_GIVEN.format("adapters"),
    )
    tasks: str = option(
        ...,
        "folder with <adapter>/probe.jsonl and <adapter>/test.jsonl",
        group=_INPUT,
        metavar="DIR",
        path=True,
        missing=_NOT_GIVEN.format("tasks"),
    )
    model: str | None = option(
        None,
        "base model: mlx-lm directory, Hugging Face id or .gguf file",
        group=_INPUT,
        metavar="M",
        default_text="the embedded SmolLM2-135M-Instruct",
    )
    output: str = option(
        ...,
        "run directory; the same command continues there",
        group=_INPUT,
        metavar="DIR",
        path=True,
        missing=_NOT_GIVEN.format("output"),
    )

    budget: str = option(
        "12.5%", '"12.5%", "40MB", "500KB" or a number of adapters', group=_BUDGET, metavar="B"
    )
    plan: str = option(
        "auto",
        "of a budget in bytes: auto chooses clusters, rank and bits by measuring; d2c merges in 16"
        " bit, as a number of adapters always does",
        group=_BUDGET,
        metavar="NAME",
        choices=PLANS,
    )
    max_adapters: int | None = option(
        None,
        "most adapters that a plan may store",
        group=_BUDGET,
        default_text="any number",
        ge=1,
    )

    merge_method: str | None = option(
        None,
        "linear, ties, ..., auto (docs/merging.md); auto packs for every cluster the best of seven"
        " on its calibration rows",
        group=_MERGE,
        metavar="NAME",
        default_text="layerwise, or regmean++ where a model cannot be run by blocks",
        choices=RUN_METHODS,
    )
    merge_rank: int | None = option(
        None,
        "largest rank of a merged adapter",
        group=_MERGE,
        default_text="the largest of the inputs",
        ge=1,
        le=_MOST_RANK,
    )
    density: float = option(
        0.5, "share of entries kept by methods that sparsify", group=_MERGE, gt=0, le=1
    )
    scale: float | None = option(
        None,
        "scale of every merge",
        group=_MERGE,
        default_text="tuned per cluster on the calibration rows",
        gt=0,
        le=_MOST_SCALE,
    )

    search: str = option(
        "moves",
        "moves: single moves and swaps from the best start; paper: the plain loop of D2C from every"
        " start",
        group=_SEARCH,
        metavar="NAME",
        choices=SEARCHES,
    )
    init: tuple[str, ...] = option(
        STARTS, "starts: table, kmeans", group=_SEARCH, metavar="LIST", choices=STARTS, min_length=1
    )
    patience: int = option(
        10, "proposals of moves in a row that may fail before it ends", group=_SEARCH, ge=1
    )
    eps: float = option(0.001, "smallest fall of regret that moves a task", group=_SEARCH, ge=0)
    neighbours: int = option(
        32,
        "other adapters under which a task is probed, the most alike; or twice as many as share a"
        " slot",
        group=_SEARCH,
        ge=1,
    )
    seed: int = option(0, "of all random choices", group=_SEARCH, ge=0, le=_MOST_SEED)

    probe_examples: int = option(
        10, "calibration rows that decide, the first of probe.jsonl", group=_EVALUATION, ge=1
    )
    test_examples: int = option(
        100,
        "held-out rows that judge, the first of test.jsonl; 0 is all",
        group=_EVALUATION,
        ge=0,
        expected="0 (all) or more",
    )
    answers: int = option(
        0,
        "held-out rows of each task that are answered and compared with the expected answers",
        group=_EVALUATION,
        ge=0,
    )
    baselines: tuple[str, ...] = option(
        BASELINES,
        'partitions that bench merges too, to compare; "" is none',
        group=_EVALUATION,
        metavar="LIST",
        choices=BASELINES,
    )
    random_seeds: int = option(3, "random partitions to average", group=_EVALUATION, ge=1)
    memory_limit: str | None = option(
        None,
        '"3GB", "800MB"',
        group=_EVALUATION,
        metavar="M",
        default_text="what the device recommends, else half the memory",
        expected='something like "3GB" or "800MB"',
    )
    without: tuple[str, ...] = option(
        (),
        f"optimizations of the evaluation to switch off: {', '.join(SAVINGS)}",
        group=_EVALUATION,
        metavar="LIST",
        choices=SAVINGS,
    )
    stack: int = option(
        1,
        "adapters evaluated in one batch; above 1 a loss depends on the others by rounding",
        group=_EVALUATION,
        ge=1,
    )

    refine: bool = option(
        False,
        "train every merge for a while to match its members (docs/refining.md)",
        group=_REFINE,
        default_text="no",
    )
    refine_steps: int = option(40, "most steps of it", group=_REFINE, ge=1)
    refine_rate: float = option(0.0005, "its learning rate", group=_REFINE, gt=0)
    unlabelled: str | None = option(
        None,
        'prompts without answers for it: JSONL, {"task": NAME, "prompt": ...} or with "messages"',
        group=_REFINE,
        metavar="FILE",
        path=True,
        expected='"" unless with --refine',
    )

    @field_validator("adapters", "init", "baselines", "without", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401  as YAML gave it
        """Read lists of YAML and lists with commas; a start that is named twice counts once."""
        if isinstance(value, str) and info.field_name != "adapters":
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list | tuple):
            return value
        names = tuple(map(str, value))
        gone = REMOVED_VALUES.get(str(info.field_name), {})
        if said := [gone[name] for name in names if name in gone]:
            raise refused("; ".join(said))
        return tuple(dict.fromkeys(names)) if info.field_name == "init" else names

    @field_validator("budget", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:  # noqa: ANN401  as YAML gave it
        """Turn a number of adapters, which YAML gives as a number, into text."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if number else value

    @field_validator("adapters", "tasks", "output")
    @classmethod
    def _given(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401  one of two types
        if not value:
            raise refused(_NOT_GIVEN.format(info.field_name))
        return value

    @field_validator("tasks", "output", "unlabelled")
    @classmethod
    def _expanded(cls, value: str | None) -> str | None:
        """Expand `~`. `adapters` and `model` may be hub ids, so their look-up expands them."""
        return os.path.expanduser(value) if value else value

    @field_validator("output")
    @classmethod
    def _is_no_file(cls, value: str) -> str:
        if Path(value).is_file():
            raise refused(f"{value} is a file, expected a directory or a new name")
        return value

    @field_validator("budget")
    @classmethod
    def _is_a_budget(cls, value: str) -> str:
        try:
            parse_budget(value)
        except BudgetError as error:
            raise refused(str(error).removeprefix("budget: ")) from None
        return value

    @field_validator("memory_limit")
    @classmethod
    def _is_bytes(cls, value: str | None) -> str | None:
        if value is not None and bytes_of(value) is None:
            raise expects('something like "3GB" or "800MB"')
        return value

    # Rules about two options. `info.data` holds the fields above that are valid.

    @field_validator("plan")
    @classmethod
    def _with_bytes(cls, plan: str, info: ValidationInfo) -> str:
        if plan == "d2c" and _in_bytes(info) is False:
            raise expects(
                f"{'auto'!r} with a number of adapters as the budget, which is always merged by"
                " D2C; leave --plan out"
            )
        return plan

    @field_validator("max_adapters")
    @classmethod
    def _with_a_plan(cls, most: int | None, info: ValidationInfo) -> int | None:
        budget, plan = info.data.get("budget"), info.data.get("plan")
        if most is not None and budget and plan and not is_planned(plan, budget):
            raise expects(
                f"none unless a budget in bytes is planned (budget {budget!r}, plan {plan!r})"
            )
        return most

    @field_validator("merge_method")
    @classmethod
    def _with_slots(cls, method: str | None, info: ValidationInfo) -> str | None:
        if method == "concat" and _in_bytes(info):
            raise refused(
                "'concat' keeps the sum of all ranks, so only a number of adapters can be its"
                f" budget; found {info.data['budget']!r}"
            )
        return method

    @field_validator("merge_rank")
    @classmethod
    def _with_a_method(cls, rank: int | None, info: ValidationInfo) -> int | None:
        if rank is not None and info.data.get("merge_method") == "concat":
            raise expects("none with merge_method 'concat', which keeps the sum of all ranks")
        return rank

    @field_validator("answers")
    @classmethod
    def _of_the_rows(cls, n: int, info: ValidationInfo) -> int:
        """Refuse more rows than are tokenized, which are the held-out rows of `test_examples`."""
        most = info.data.get("test_examples")
        if most and n > most:
            raise expects(f"0 to test_examples ({most})")
        return n

    @field_validator("refine")
    @classmethod
    def _with_merges(cls, refine: bool, info: ValidationInfo) -> bool:
        if refine and _in_bytes(info) and info.data.get("plan") == "auto":
            raise expects(
                "False where a budget in bytes is planned; pass --plan d2c, or a number of adapters"
                " as the budget"
            )
        return refine

    @field_validator("unlabelled")
    @classmethod
    def _with_refine(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path and info.data.get("refine") is False:
            raise expects('"" unless with --refine')
        return path

    @property
    def merging(self) -> MergeOptions:
        """The options that decide how adapters are merged."""
        return MergeOptions(
            self.merge_method, self.density, self.scale, self.merge_rank, self.eps, self.seed
        )

    @property
    def planned(self) -> bool:
        """True if the planner chooses what is stored, see `is_planned`."""
        return is_planned(self.plan, self.budget)

    @property
    def memory_bytes(self) -> int | None:
        """`memory_limit` in bytes; None if it is not given."""
        return bytes_of(self.memory_limit) if self.memory_limit else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` of a run directory holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self}


def is_planned(plan: str, budget: str) -> bool:
    """True if `compress/planner.py` chooses what is stored; False if adapters are merged in 16 bit.

    Args:
        plan: one of `PLANS`.
        budget: text of the budget.

    Raises:
        BudgetError: the budget is unreadable.
    """
    return plan == "auto" and parse_budget(budget).n_adapters is None


def stages_of(config: RunConfig, until: str = "report") -> list[str]:
    """Names of the stages of a run up to and including `until`, in order."""
    left_out = {"cluster", "merge", "refine"} if config.planned else {"plan"}
    if not config.refine:
        left_out.add("refine")
    return [name for name in STAGES[: STAGES.index(until) + 1] if name not in left_out]


def _in_bytes(info: ValidationInfo) -> bool | None:
    """True if the budget is one of bytes; None if it is missing or invalid."""
    budget = info.data.get("budget")
    return None if budget is None else parse_budget(budget).n_adapters is None
