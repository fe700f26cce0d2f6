"""Make one adapter for a new task of the adapters that there are, and about ten rows.

    d2c-mlx compose --from runs/first/pack --task tasks/gec-nl --output loras/gec-nl
    d2c-mlx add runs/first/pack loras/gec-nl

`auto` compares several methods by cross-validation on the rows; the one chosen is made again of all
rows. If the base model, the best single adapter or a LoRA trained on the rows alone is as good, the
result says so. Only `auto`, and a method that trains, train anything.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Self

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.reading import Source, find_adapters, read_adapters
from d2c_mlx.compose.methods import METHODS, Method, NewTask, find_method
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import find_head
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import encode_rows, load_task, load_tasks
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.overwrite import check_output, mark
from d2c_mlx.packs.pack import Pack, load_pack, pack_directory
from d2c_mlx.serve.router import fit_router, load_router
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import (
    AdapterError,
    ConfigError,
    D2CError,
    InputError,
    PackError,
    TaskError,
    collect,
    warn,
)
from d2c_mlx.utils.files import write_dir, write_json
from d2c_mlx.utils.progress import Progress, say

_N_FOLDS = 5
# Nats per target token that are no difference, however small the standard error is.
_EQUAL = 1e-3


def compose(
    source: str,
    task: Path,
    output: Path,
    *,
    method: str = "auto",
    n_probe: int = 10,
    tasks: Path | None = None,
    model: str | None = None,
    seed: int = 0,
    anyway: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Read adapters and rows, compose one adapter, and write it with `compose.json`.

    Args:
        source: a pack, or adapters as `find_adapters` takes them.
        task: directory with probe.jsonl of the new task.
        output: directory of the adapter, replaced as a whole.
        method: a key of `METHODS`, the name of a plug-in, or "auto".
        n_probe: rows that are used, the first of probe.jsonl.
        tasks: directory with `<adapter>/probe.jsonl` of the library's tasks, whose prompts tell
            which are near; None takes the router of a pack, if it has one.
        model: the base model, as for `resolve_model`.
        seed: seed of all random choices.
        anyway: write the adapter also where the base model alone is better.
        dry_run: check everything and return the `methods`, `tokens` and `seconds` of the work.
        quiet: show no progress.

    Returns:
        The content of `compose.json`, see `compose_adapter`.

    Raises:
        InputError: every problem of options, adapters, rows and output; nothing is written.
        D2CError: the base model alone is better; nothing is written.
    """
    started, errors = time.monotonic(), list[InputError]()
    if method != "auto":
        collect(errors, partial(find_method, method))
    given = collect(errors, partial(_find, source, output))
    rows = collect(errors, partial(load_task, task, tests=False))
    if given is None or rows is None or errors:
        raise InputError(line for error in errors for line in error.problems)
    pack, sources = given
    inputs = [("task", task), *(("adapters", adapter.path) for adapter in sources)]
    inputs += [("from", pack.path)] if pack else []
    check = partial(check_output, output, "compose", inputs, model=model)
    check()
    base = Model(str(pack.base_directory(model)) if pack else model)
    (encoded,) = encode_rows(base.encode, [rows], n_probe)
    if len(encoded.examples) < 2:
        raise TaskError(f"{task}: found one row, expected two or more; about ten are best")
    library = _library(base, pack, sources)
    near = _similarity(base, library, pack, tasks, encoded, n_probe)
    progress = Progress(not quiet)
    scorer = Scorer(Engine(base), LossCache(cache_directory() / "losses.sqlite"), progress)
    new = NewTask(rows.name, base, scorer, library, near)
    new = replace(new, training=replace(new.training, seed=seed))
    methods = _compared(new, method)
    tokens = expected_tokens(new, encoded, methods)
    seconds = tokens / scorer.engine.tokens_per_second([encoded])
    say(f"compares {', '.join(methods)}: about {seconds:.0f} s here", quiet=dry_run)
    if dry_run:
        return {"methods": [*methods], "tokens": tokens, "seconds": seconds}
    with progress.section("compose", tokens):
        adapter, about = compose_adapter(new, encoded, method)
    ahead, error = (about["candidates"]["base"][key] for key in ("ahead", "error"))
    if -ahead > max(error, _EQUAL) and not anyway:
        raise D2CError(
            f"{task}: the base model alone is better than {about['method']}, by {-ahead:.3f} +-"
            f" {error:.3f} nats per token on rows not seen, so nothing is written; give more rows,"
            " another --method, or --anyway"
        )
    about |= {"base": base.name, "seed": seed, "seconds": round(time.monotonic() - started, 1)}
    with write_dir(output, lambda _: check()) as directory:
        adapter.save(directory, base.n_layers)
        write_json(directory / "compose.json", about)
        mark(directory, "compose")
    return about


def _find(source: str, output: Path) -> tuple[Pack | None, list[Source]]:
    """The pack, or adapters without the one that an earlier time made in their folder."""
    if (pack_directory(source) / MANIFEST).is_file():
        return load_pack(source), []
    sources = find_adapters(source, "--from")
    others = [adapter for adapter in sources if adapter.path.resolve() != output.resolve()]
    if not others:
        raise AdapterError(f"{source}: no adapter but the output itself, expected one or more")
    return None, others


def _library(base: Model, pack: Pack | None, sources: Sequence[Source]) -> list[Adapter]:
    """The adapters; those of a pack have the tasks that they serve as sources."""
    if pack is None:
        return read_adapters(sources, base.module_shapes, base.config)
    loaded = [(tuple(tasks), pack.load(tasks[0])) for tasks in pack.adapters.values()]
    library = [replace(x, name="+".join(tasks), sources=tasks) for tasks, x in loaded if x]
    if not library:
        raise PackError(f"{pack.path}: the base model serves all tasks, expected adapters")
    return library


def _similarity(
    base: Model,
    library: Sequence[Adapter],
    pack: Pack | None,
    tasks: Path | None,
    rows: ExampleSet,
    n_probe: int,
) -> np.ndarray | None:
    """`(n,)` the largest cosine of the prompts' mean state with a task of each adapter.

    None where the prompts of either side are not known.
    """
    served = [adapter.sources or (adapter.name,) for adapter in library]
    router = load_router(pack) if pack and not tasks else None
    if tasks:
        near = load_tasks(tasks, sorted(chain(*served)), tests=False)
        router = fit_router(base.model, encode_rows(base.encode, near, n_probe))
    prompts = [row.prompt_tokens for row in rows.examples]
    if router is None or not all(prompts):
        return None
    state = router.states(base.model, prompts).mean(axis=0)
    cosines = {match.task: match.similarity for match in router.matches(state, len(router.tasks))}
    return np.array([max(cosines.get(name, -1.0) for name in names) for names in served])


def compose_adapter(
    task: NewTask, rows: ExampleSet, method: str = "auto"
) -> tuple[Adapter, dict[str, Any]]:
    """Compose an adapter by a method, or by the one that cross-validation chooses.

    Args:
        task: the new task.
        rows: its rows, at least two.
        method: a key of `METHODS`, the name of a plug-in, or "auto".

    Returns:
        The adapter in the base model's 16-bit dtype, and facts: `task`, `method`, `choice`, `rows`,
        `library`, `candidates` (name -> `loss` on rows not seen, and `ahead`: by how much the
        method is better, with its standard `error`, in nats) and `as_good`: names of "base", "best"
        and, where it was compared, "fresh" that are no worse than it by more than one standard
        error. Where the base model allows no training, methods that train are left out.

    Raises:
        ConfigError: the method is unknown, or compares prompts that are not known.
        ModelError: the method trains, and the base model allows no training.
    """
    folds, methods = split(rows, task.training.seed), _compared(task, method)
    scores = cross_validate(task, methods, folds)
    chosen = choose(scores) if method == "auto" else method
    choice = scores[chosen].choice
    assert choice is not None, "only the base model has none"
    adapter = methods[chosen](task, join(folds), choice)
    adapter = replace(adapter, name=task.name, base=task.library[0].base, origin=None)
    candidates = {}
    for name, score in scores.items():
        ahead, error = score.minus(scores[chosen])
        candidates[name] = {"loss": score.loss, "ahead": ahead, "error": error}
    references = [name for name in ("base", "best", "fresh") if name in scores and name != chosen]
    facts = {
        "task": task.name,
        "method": chosen,
        "choice": task.library[int(choice)].name if methods[chosen].choices is None else choice,
        "rows": len(rows.examples),
        "library": [member.name for member in task.library],
        "candidates": candidates,
        "as_good": [name for name in references if as_good(scores[name], scores[chosen])],
    }
    return adapter.uniform(task.base.dtype), facts


def _compared(task: NewTask, method: str) -> dict[str, Method]:
    """The methods that cross-validation compares, the simplest first."""
    if method != "auto":
        named = find_method(method)
        if named.needs_prompts and task.similarity is None:
            raise ConfigError(
                f"method: {method} compares prompts, and those of the library are missing; give"
                " --tasks DIR with <adapter>/probe.jsonl, or a pack with a router, and rows that"
                " have prompts"
            )
        if named.trains:
            Distiller(task.base)  # tells why it cannot
        return {"best": METHODS["best"], method: named}
    left_out = {name for name, row in METHODS.items() if row.needs_prompts}
    if task.similarity is not None:
        left_out.clear()
    if find_head(task.base.model) is None:
        trained = [name for name, row in METHODS.items() if row.trains]
        warn(
            f"method: {task.base.name} scales or caps its logits, so nothing can be trained on it;"
            f" left out: {', '.join(trained)}"
        )
        left_out |= {*trained}
    return {name: row for name, row in METHODS.items() if name not in left_out}


def expected_tokens(task: NewTask, rows: ExampleSet, methods: Mapping[str, Method]) -> int:
    """Tokens that pass through the model: rows under every choice, and trainings by fold."""
    n_choices = sum(len(method.choices or task.library) for method in methods.values())
    starts = {method.trains for method in methods.values() if method.trains}
    step = task.training.step_tokens(rows.examples)
    n_trainings = len(starts) * (min(_N_FOLDS, len(rows.examples)) + 1)
    return rows.n_tokens * (1 + n_choices) + n_trainings * task.training.steps * step


@dataclass(frozen=True)
class Score:
    """A method on rows that it did not see.

    Attributes:
        losses: `(n_folds,)` mean NLL per target token of each fold, in nats.
        n_targets: `(n_folds,)` target tokens of each fold.
        choice: the number that all folds together choose, see `Method`; None is the base model.
    """

    losses: np.ndarray
    n_targets: np.ndarray
    choice: float | None = None

    @property
    def loss(self) -> float:
        """Mean NLL per target token over all rows, in nats."""
        return float(np.average(self.losses, weights=self.n_targets))

    def minus(self, other: Self) -> tuple[float, float]:
        """The loss minus that of the other, and its standard error over folds, in nats."""
        each = self.losses - other.losses
        weights = self.n_targets / self.n_targets.sum()
        mean = float(each @ weights)
        spread = np.sqrt((weights**2 * (each - mean) ** 2).sum() * len(each) / (len(each) - 1))
        return mean, float(spread)


def split(rows: ExampleSet, seed: int = 0) -> list[ExampleSet]:
    """Cut two or more rows into five folds in a random order, or into as many as there are."""
    n = len(rows.examples)
    order = np.random.default_rng(seed).permutation(n)
    return [
        replace(rows, examples=tuple(rows.examples[i] for i in sorted(fold)), cuts=())
        for fold in np.array_split(order, min(_N_FOLDS, n))
    ]


def join(folds: Sequence[ExampleSet]) -> ExampleSet:
    """Folds as one set with them as its parts, so that a loss on a fold is evaluated once."""
    ends = accumulate(len(fold.examples) for fold in folds[:-1])
    examples = tuple(example for fold in folds for example in fold.examples)
    return replace(folds[0], examples=examples, cuts=tuple(ends))


def cross_validate(
    task: NewTask, methods: Mapping[str, Method], folds: Sequence[ExampleSet]
) -> dict[str, Score]:
    """Score the base model and every method, each fold by what is made of the others.

    A method's choice for a fold is that of the lowest loss on the other folds, so no fold chooses
    for itself.

    Args:
        task: the new task.
        methods: name -> method.
        folds: two or more parts of the task's rows.

    Returns:
        "base", and every name, in the order given -> its score.
    """
    n_targets = np.array([fold.n_targets for fold in folds])
    ((base),) = task.scorer.losses([(None, folds)])
    scores = {"base": Score(base, n_targets)}
    for name, method in methods.items():
        choices = range(len(task.library)) if method.choices is None else method.choices
        jobs = []
        for k, fold in enumerate(folds):
            rest = join([*folds[:k], *folds[k + 1 :]])
            jobs += [(method(task, rest, choice), [fold]) for choice in choices]
        losses = np.concatenate(task.scorer.losses(jobs)).reshape(len(folds), -1)
        sums = losses * n_targets[:, None]
        others = sums.sum(axis=0) - sums
        honest = losses[np.arange(len(folds)), others.argmin(axis=1)]
        scores[name] = Score(honest, n_targets, float(choices[int(sums.sum(axis=0).argmin())]))
    return scores


def as_good(score: Score, other: Score) -> bool:
    """True if the loss is above that of the other by no more than a standard error."""
    mean, error = score.minus(other)
    return mean <= max(error, _EQUAL)


def choose(scores: Mapping[str, Score]) -> str:
    """The first method, the simplest, that is `as_good` as the one with the lowest loss.

    "base" takes no part.
    """
    methods = {name: score for name, score in scores.items() if name != "base"}
    lowest = min(methods.values(), key=lambda score: score.loss)
    return next(name for name, score in methods.items() if as_good(score, lowest))
