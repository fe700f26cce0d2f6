"""The options of a run, each declared once: type, default, range, help and group.

`python -m docs.scripts.options` writes the command line (`cli/options.py`) and
docs/reference/options.md from these fields; a test fails when they differ from what it would write.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from d2c_mlx.compress.budget import bytes_of
from d2c_mlx.merge.options import RUN_METHODS, MergeOptions
from d2c_mlx.plugins import CLUSTERINGS, MERGE_METHODS, Plugin, find, names
from d2c_mlx.run.rules import NOT_GIVEN, RunRules, is_planned
from d2c_mlx.utils.validation import option

__all__ = [
    "ANSWERED_ROWS",
    "BASELINES",
    "FORMATS",
    "PLANS",
    "RANDOM_PARTITIONS",
    "SAVINGS",
    "SEARCHES",
    "STAGES",
    "RunConfig",
    "is_planned",
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
PLANS = ("auto", "d2c")
FORMATS = ("compact", "gguf")
SEARCHES = ("estimates", "paper")
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


def _more(group: str) -> dict[str, Any]:
    """Details of an option that takes the names of plug-ins, too."""
    return {"more": partial(names, group), "more_text": "or a plug-in"}


class RunConfig(RunRules):
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
        missing=NOT_GIVEN.format("adapters"),
    )
    skip_bad: bool = option(
        False,
        "leave out adapters that cannot be read or have no rows, and list them",
        group=_INPUT,
        default_text="no",
    )
    accept_dora: int | None = option(
        None,
        "take DoRAs in as the closest LoRAs of this rank, and show the error",
        group=_INPUT,
        default_text="refuse them",
        ge=1,
        le=_MOST_RANK,
    )
    tasks: str | None = option(
        None,
        "folder with <adapter>/probe.jsonl and <adapter>/test.jsonl",
        group=_INPUT,
        metavar="DIR",
        path=True,
        default_text="none: by weights alone, nothing is measured",
    )
    unlabelled: str | None = option(
        None,
        'prompts without answers: JSONL, {"task": NAME, "prompt": ...} or with "messages"; the'
        " adapters' answers are the rows, beside --tasks more of them for layerwise and --refine",
        group=_INPUT,
        metavar="FILE",
        path=True,
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
        missing=NOT_GIVEN.format("output"),
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
    format: str = option(
        "compact",
        "files of a planned pack, whose bytes are planned: compact, one for all adapters; gguf, one"
        " for each, which llama.cpp reads as it is",
        group=_BUDGET,
        metavar="NAME",
        choices=FORMATS,
    )
    same_shape: bool = option(
        False,
        "plan one rank and one set of modules for all adapters, for runtimes that feed a LoRA to a"
        " fixed graph",
        group=_BUDGET,
        default_text="no",
    )
    max_adapters: int | None = option(
        None, "most adapters that a plan may store", group=_BUDGET, default_text="any number", ge=1
    )

    merge_method: str | None = option(
        None,
        "linear, ties, ..., auto; auto packs for every cluster the best of seven on its calibration"
        " rows",
        group=_MERGE,
        metavar="NAME",
        default_text="layerwise, or regmean++ where a model cannot be run by blocks; without rows"
        " tsv",
        choices=RUN_METHODS,
        **_more(MERGE_METHODS),
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
        default_text="tuned per cluster on the calibration rows, without any from the weights; for"
        " layerwise 1.0 or 1.4, by how alike the members are",
        gt=0,
        le=_MOST_SCALE,
    )

    clusters: str | None = option(
        None,
        "merge these clusters in place of D2C's, to compare merge methods: clusters.json of a run,"
        " or a JSON list of lists of adapters",
        group=_SEARCH,
        metavar="FILE",
        path=True,
    )
    search: str = option(
        "estimates",
        "estimates: measure the partitions that are estimated to be best; paper: the plain loop"
        " of D2C",
        group=_SEARCH,
        metavar="NAME",
        choices=SEARCHES,
        **_more(CLUSTERINGS),
    )
    thorough: bool = option(
        False,
        "measure every candidate of a plan, instead of those that estimates choose",
        group=_SEARCH,
        default_text="no",
    )
    eps: float = option(0.001, "smallest fall of regret that moves a task", group=_SEARCH, ge=0)
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
    baselines: tuple[str, ...] = option(
        BASELINES,
        'partitions that bench merges too, to compare; "" is none',
        group=_EVALUATION,
        metavar="LIST",
        choices=BASELINES,
    )
    memory_limit: str | None = option(
        None,
        'of the process while it evaluates: "3GB", "800MB"',
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
        "train every merge, or low-bit adapter, for a while to predict what its members predict",
        group=_REFINE,
        default_text="no",
        validate_default=True,
    )
    refine_steps: int = option(40, "steps of it", group=_REFINE, ge=1)
    refine_rate: float | None = option(
        None,
        "its learning rate",
        group=_REFINE,
        gt=0,
        default_text="0.0005, and 0.002 for low-bit adapters",
    )

    @property
    def merging(self) -> MergeOptions:
        """The options that decide how adapters are merged."""
        return MergeOptions(
            self.merge_method, self.density, self.scale, self.merge_rank, self.eps, self.seed
        )

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
        """True if the planner chooses what is stored, see `is_planned`."""
        return is_planned(self.plan, self.budget)

    @property
    def answered(self) -> bool:
        """True if the rows are answers of the task adapters to `unlabelled` prompts."""
        return bool(self.unlabelled and not self.tasks)

    @property
    def has_rows(self) -> bool:
        """True if there are rows to measure on; else weights decide."""
        return bool(self.tasks or self.unlabelled)

    @property
    def memory_bytes(self) -> int | None:
        """`memory_limit` in bytes; None if it is not given."""
        return bytes_of(self.memory_limit) if self.memory_limit else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` of a run directory holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self}


def stages_of(config: RunConfig, until: str = "report") -> list[str]:
    """Names of the stages of a run up to and including `until`, in order."""
    left_out = {"cluster", "merge"} if config.planned else {"plan"}
    if not config.refine:
        left_out.add("refine")
    if not config.unlabelled:
        left_out.add("answer")
    if not config.has_rows:
        left_out.add("probe")
    return [name for name in STAGES[: STAGES.index(until) + 1] if name not in left_out]
