"""The options of a run: what there is, defaults, and what a value may be."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.merge.options import RUN_METHODS, MergeOptions
from d2c_mlx.utils.errors import BudgetError, ConfigError

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

# The keys of `pipeline.STAGES`, named here so that a finished run imports no model code.
STAGES = ("convert", "probe", "plan", "cluster", "merge", "refine", "pack", "bench", "report")
STARTS = ("adapters", "kmeans", "random", "table", "pairs")
BASELINES = ("merge-all", "random", "kmeans")
PLANS = ("d2c", "auto")
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
# Tuned scales end at a few, and sums of hundreds of adapters at hundreds; beyond, float16 ends.
_MOST_SCALE = 1_000.0
# Of scikit-learn and NumPy's older generators.
_SEEDS = 2**32


@dataclass(frozen=True)
class RunConfig:
    """Options of `d2c-mlx run`. Every field is a YAML key and a command-line option.

    Attributes:
        model: mlx-lm directory, Hugging Face id or .gguf; None is the embedded default.
        adapters: a directory with one subdirectory per adapter, or adapters one by one, see
            `sources.find_adapters`.
        tasks: directory with `<adapter>/probe.jsonl` and `<adapter>/test.jsonl`.
        budget: "12.5%", "40MB", "500KB" or a number of adapters.
        output: run directory.
        plan: "auto" chooses clusters, rank and bits for a budget in bytes by measuring (see
            `planned`), and merges by D2C for a budget in adapters; "d2c" does that for both.
        max_adapters: most adapters that a plan may store; None is any number.
        merge_method: one of `RUN_METHODS`, see docs/merging.md; None is "layerwise", or "regmean++"
            where an architecture cannot be run block by block. These and "auto" cluster by
            "regmean"; "auto" packs for every cluster the best of `AUTO_METHODS` and the default on
            its probes.
        merge_rank: largest rank of a merged adapter, at most that of the base model's widest
            module; None takes the largest of the inputs, and "concat" their sum.
        density: share of entries kept by methods that sparsify.
        scale: of every merge; None tunes it per cluster on the probes.
        search: "paper", the loop of D2C, or "moves" from the best partition that it starts from.
        init: starts of D2C, see `d2c.d2c`.
        rounds: most rounds of one start of the loop.
        patience: rounds of "paper" without a new best, or proposals of "moves" in a row that may
            fail; None is 2 rounds or 10 proposals.
        restarts: draws per kind of start.
        eps: a task moves only if its normalised regret falls by more.
        seed: of all random choices.
        probe_examples: how many rows of probe.jsonl decide, the first ones.
        neighbours: a task is probed under so many other adapters, the most alike in dW, or twice as
            many as share a slot; all of them for a start from "adapters".
        test_examples: how many rows of test.jsonl judge, the first ones; 0 is all.
        answers: how many held-out rows of each task are answered and compared with the expected
            answers, the first of those that judge; the report shows three.
        baselines: partitions that `bench` merges too and compares, some of `BASELINES`; each takes
            about as long to merge as what is packed.
        random_seeds: how many random partitions the `random` row averages.
        memory_limit: "3GB", "800MB", of the evaluation; None is what the device recommends.
        without: savings of the evaluation to do without, see `engine.Savings`; also "cache" and
            "bound" (stopping an evaluation that is proven to change nothing).
        stack: adapters evaluated in one batch; above 1 losses depend on their neighbours in it by
            rounding.
        compile: evaluate through `mx.compile`.
        refine: train every merge for a while to match its members, see docs/refining.md.
        refine_steps: most steps of it.
        refine_rate: its learning rate.
        unlabelled: JSONL file of prompts without answers that refining uses too.
    """

    adapters: str | tuple[str, ...] = ""
    tasks: str = ""
    output: str = ""
    budget: str = "12.5%"
    model: str | None = None
    plan: str = "auto"
    max_adapters: int | None = None
    merge_method: str | None = None
    density: float = 0.5
    scale: float | None = None
    merge_rank: int | None = None
    search: str = "moves"
    patience: int | None = None
    init: tuple[str, ...] = ("table", "kmeans")
    rounds: int = 10
    restarts: int = 1
    eps: float = 1e-3
    seed: int = 0
    probe_examples: int = 10
    neighbours: int = 32
    test_examples: int = 100
    answers: int = 0
    baselines: tuple[str, ...] = BASELINES
    random_seeds: int = 3
    memory_limit: str | None = None
    without: tuple[str, ...] = ()
    stack: int = 1
    compile: bool = False
    refine: bool = False
    refine_steps: int = 40
    refine_rate: float = 5e-4
    unlabelled: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError listing every value that is missing or out of range."""
        for name in ("tasks", "output", "unlabelled"):
            if path := getattr(self, name):
                # As `adapters` and `model` are, whose entries may be ids, where they are looked up.
                object.__setattr__(self, name, os.path.expanduser(path))
        # A start that is named twice would make the same draws twice.
        object.__setattr__(self, "init", tuple(dict.fromkeys(self.init)))
        problems = [
            f"{name}: not given; pass --{name} or set it in the YAML file"
            for name in ("adapters", "tasks", "output")
            if not getattr(self, name)
        ]
        checks = {
            "merge_method": (
                self.merge_method in (None, *RUN_METHODS),
                f"one of {list(RUN_METHODS)}",
            ),
            "plan": (self.plan in PLANS, f"one of {list(PLANS)}"),
            "max_adapters": (self.max_adapters is None or self.max_adapters >= 1, "1 or more"),
            "merge_rank": (
                self.merge_rank is None or 1 <= self.merge_rank <= _MOST_RANK,
                f"1 to {_MOST_RANK:,}",
            ),
            "search": (self.search in SEARCHES, f"one of {list(SEARCHES)}"),
            "patience": (self.patience is None or self.patience >= 1, "1 or more"),
            "density": (0 < self.density <= 1, "a number above 0 and at most 1"),
            "scale": (
                self.scale is None or 0 < self.scale <= _MOST_SCALE,
                f"a number above 0 and at most {_MOST_SCALE:g}",
            ),
            "init": (self.init and set(self.init) <= set(STARTS), f"some of {list(STARTS)}"),
            "rounds": (self.rounds >= 0, "0 or more"),
            "restarts": (self.restarts >= 1, "1 or more"),
            "eps": (0 <= self.eps < math.inf, "0 or more"),
            "seed": (0 <= self.seed < _SEEDS, f"0 to {_SEEDS - 1:,}"),
            "probe_examples": (self.probe_examples >= 1, "1 or more"),
            "test_examples": (self.test_examples >= 0, "0 (all) or more"),
            # Rows that do not judge are not tokenized, so there is nothing to answer.
            "answers": (
                0 <= self.answers and not 0 < self.test_examples < self.answers,
                f"0 to test_examples ({self.test_examples or 'all'})",
            ),
            "baselines": (set(self.baselines) <= set(BASELINES), f"some of {list(BASELINES)}"),
            "random_seeds": (self.random_seeds >= 1, "1 or more"),
            "neighbours": (self.neighbours >= 1, "1 or more"),
            "memory_limit": (self._limit_is_bytes(), 'something like "3GB" or "800MB"'),
            "without": (set(self.without) <= set(SAVINGS), f"some of {list(SAVINGS)}"),
            "stack": (self.stack >= 1, "1 or more"),
            "refine_steps": (self.refine_steps >= 1, "1 or more"),
            "refine_rate": (0 < self.refine_rate < math.inf, "a number above 0"),
            "unlabelled": (self.refine or not self.unlabelled, '"" unless with --refine'),
        }
        for name, (good, expected) in checks.items():
            if not good:
                problems.append(f"{name}: found {getattr(self, name)!r}, expected {expected}")
        if self.output and Path(self.output).is_file():
            problems.append(f"output: {self.output} is a file, expected a directory or a new name")
        try:
            problems += self._budget_problems(parse_budget(self.budget))
        except BudgetError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)

    def _budget_problems(self, budget: Budget) -> list[str]:
        """What does not go with the kind of budget."""
        in_bytes = budget.n_adapters is None
        problems = []
        if self.merge_method == "concat" and in_bytes:
            problems.append(
                "merge_method: 'concat' keeps the sum of all ranks, so only a number of adapters"
                f" can be its budget; found {self.budget!r}"
            )
        if self.refine and in_bytes and self.plan == "auto":
            problems.append(
                "refine: found True, expected False where a budget in bytes is planned; pass"
                " --plan d2c, or a number of adapters as the budget"
            )
        if self.max_adapters is not None and not (in_bytes and self.plan == "auto"):
            problems.append(
                f"max_adapters: found {self.max_adapters}, expected none unless a budget in bytes"
                f" is planned (budget {self.budget!r}, plan {self.plan!r})"
            )
        if self.merge_rank is not None and self.merge_method == "concat":
            problems.append(
                f"merge_rank: found {self.merge_rank}, expected none with merge_method 'concat',"
                " which keeps the sum of all ranks"
            )
        return problems

    @property
    def merging(self) -> MergeOptions:
        """How to merge."""
        return MergeOptions(
            self.merge_method, self.density, self.scale, self.merge_rank, self.eps, self.seed
        )

    @property
    def planned(self) -> bool:
        """Whether `planner` chooses what is stored."""
        return is_planned(self.plan, self.budget)

    def _limit_is_bytes(self) -> bool:
        try:
            return self.memory_limit is None or self.memory_bytes is not None
        except BudgetError:
            return False

    @property
    def memory_bytes(self) -> int | None:
        """`memory_limit` in bytes."""
        return parse_budget(self.memory_limit).nbytes if self.memory_limit else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` of a run directory holds them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def is_planned(plan: str, budget: str) -> bool:
    """Whether `planner` chooses what is stored; BudgetError for one that is unreadable."""
    return plan == "auto" and parse_budget(budget).n_adapters is None


def stages_of(config: RunConfig, until: str = "report") -> list[str]:
    """Names of the stages that a run up to and including `until` consists of, in their order."""
    left_out = {"cluster", "merge", "refine"} if config.planned else {"plan"}
    if not config.refine:
        left_out.add("refine")
    return [name for name in STAGES[: STAGES.index(until) + 1] if name not in left_out]
