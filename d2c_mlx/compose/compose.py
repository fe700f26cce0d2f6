"""Make one adapter for a new task of the adapters that there are, and about ten rows.

    d2c-mlx compose --from runs/first/pack --task tasks/gec-nl --output loras/gec-nl
    d2c-mlx add runs/first/pack loras/gec-nl

Several methods are compared by cross-validation on the rows; the one chosen is made again of all
rows. What is no better than the base model, the best single adapter or a LoRA trained on the rows
alone is said to be so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import BaseWeights
from d2c_mlx.adapters.reading import read_adapters
from d2c_mlx.adapters.sources import Source, find_adapters
from d2c_mlx.compose.cross_validation import (
    Score,
    as_good,
    choose,
    cross_validate,
    difference,
    join,
    split,
)
from d2c_mlx.compose.methods import AUTO, METHODS, Method
from d2c_mlx.compose.new_task import Kept, NewTask
from d2c_mlx.compose.train import TrainOptions
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import find_head
from d2c_mlx.models.tasks import encode_probes, load_task, load_tasks
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.overwrite import adapter_inputs, check_output, local_model, mark
from d2c_mlx.packs.pack import Pack, load_pack, pack_directory
from d2c_mlx.serve.router import Router, fit_router, load_router
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import (
    AdapterError,
    ConfigError,
    InputError,
    PackError,
    TaskError,
    collect,
    warn,
)
from d2c_mlx.utils.files import write_dir, write_json
from d2c_mlx.utils.progress import Progress

__all__ = ["ABOUT", "ComposeOptions", "compose", "compose_adapter"]

# The file beside the adapter that says how it was made.
ABOUT = "compose.json"
# What every adapter is compared with, besides the base model.
_REFERENCES = ("best", "fresh")
# Methods that follow no gradient, so that any head will do.
_UNTRAINED = ("best", "uniform", "retrieve", "top", "continual", "lorahub", "lorahub-factors")
_NO_GRADIENT = (
    "scales or caps its logits, while training needs a head that is linear in the hidden states"
)


@dataclass(frozen=True)
class ComposeOptions:
    """Options of `compose`.

    Attributes:
        method: a key of `METHODS`, or "auto".
        n_probe: rows that are used, the first of probe.jsonl.
        tasks: directory with `<adapter>/probe.jsonl` of the library's tasks, whose prompts tell
            which are near; None takes the router of a pack, if it has one.
        model: the base model, as for `resolve_model`.
        seed: seed of all random choices.
    """

    method: str = "auto"
    n_probe: int = 10
    tasks: Path | None = None
    model: str | None = None
    seed: int = 0


def compose(
    source: str, task: Path, output: Path, options: ComposeOptions | None = None,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Read adapters and rows, compose one adapter, and write it with `compose.json`.

    Args:
        source: a pack, or adapters as `find_adapters` takes them.
        task: directory with probe.jsonl of the new task.
        output: directory of the adapter, replaced as a whole.
        options: how it is made.
        quiet: show no progress.

    Returns:
        The content of `compose.json`, see `compose_adapter`.

    Raises:
        InputError: every problem of options, adapters, rows and output; nothing is written.
    """
    options, started = options or ComposeOptions(), time.monotonic()
    errors: list[InputError] = []
    collect(errors, partial(_check_method, options.method))
    given = collect(errors, partial(_given, source, output))
    rows = collect(errors, partial(load_task, task, tests=False))
    if given is None or rows is None or errors:
        raise InputError(line for error in errors for line in error.problems)
    pack, sources = given
    inputs = [("task", task), *adapter_inputs(sources), *local_model(options.model)]
    inputs += [("from", pack.path)] if pack else []
    check = partial(check_output, output, inputs)
    check()
    base = BaseModel(str(pack.base_directory(options.model)) if pack else options.model)
    _check_head(base, options.method)
    (encoded,) = encode_probes(base.encode, [rows], options.n_probe)
    if len(encoded.examples) < 2:
        raise TaskError(f"{task}: found one row, expected two or more; about ten are best")
    library = _of_pack(pack) if pack else _read(base, sources)
    similarity = _similarity(base, library, encoded, pack, options)
    cache, progress = LossCache(cache_directory() / "losses.sqlite"), Progress(not quiet)
    scorer = Scorer(Engine(base), cache, progress)
    new = NewTask(rows.name, base, scorer, library, similarity, TrainOptions(seed=options.seed),
                  Kept(cache_directory() / "trained"))  # fmt: skip
    with progress.section("compose"):
        made, about = compose_adapter(new, encoded, options.method)
    about |= {"base": base.name, "seed": options.seed,
              "seconds": round(time.monotonic() - started, 1)}  # fmt: skip
    with write_dir(output, lambda _: check()) as directory:
        made.save(directory, base.n_layers)
        write_json(directory / ABOUT, about)
        mark(directory, "compose")
    return about


def _check_method(name: str) -> None:
    if name not in (*METHODS, "auto"):
        known = ", ".join(("auto", *METHODS))
        raise ConfigError(f"method: found {name!r}, expected one of {known}")


def _check_head(base: BaseModel, method: str) -> bool:
    """True if a LoRA can be trained on the base model; ConfigError if `method` has to."""
    if find_head(base.model) is not None:
        return True
    if method in (*_UNTRAINED, "auto"):
        return False
    raise ConfigError(
        f"method: found {method!r}, which trains, and {base.name} {_NO_GRADIENT}; expected auto"
        f" or one of {', '.join(_UNTRAINED)}"
    )


def _given(source: str, output: Path) -> tuple[Pack | None, list[Source]]:
    """The pack, or adapters without the one that an earlier time made in their folder."""
    if (pack_directory(source) / MANIFEST).is_file():
        return load_pack(source), []
    found = find_adapters(source, "--from")
    others = [one for one in found if one.path.resolve() != output.resolve()]
    if not others:
        raise AdapterError(f"{source}: no adapter but the output itself, expected one or more")
    return None, others


def _read(base: BaseModel, sources: Sequence[Source]) -> list[Adapter]:
    own = BaseWeights(base.weight)
    return read_adapters(sources, base.module_shapes, base.config, base=own)


def _of_pack(pack: Pack) -> list[Adapter]:
    """The adapters of a pack, each named after the tasks that it serves."""
    found = [(tasks, pack.load(tasks[0])) for tasks in pack.adapters.values()]
    library = [replace(one, name="+".join(tasks)) for tasks, one in found if one]
    if not library:
        raise PackError(f"{pack.path}: the base model serves all tasks, expected adapters")
    return library


def _similarity(
    base: BaseModel, library: Sequence[Adapter], rows: ExampleSet, pack: Pack | None,
    options: ComposeOptions,
) -> np.ndarray | None:  # fmt: skip
    """`(n,)` cosines of the new task's prompts with each adapter's tasks; None if unknown."""
    router = load_router(pack) if pack and not options.tasks else None
    if options.tasks:
        names = sorted(pack.tasks) if pack else [one.name for one in library]
        own = load_tasks(options.tasks, names, tests=False)
        router = fit_router(base.model, encode_probes(base.encode, own, options.n_probe))
    prompts = [one.prompt_tokens for one in rows.examples]
    if router is None or not all(prompts):
        if options.method in METHODS and METHODS[options.method].needs_prompts:
            raise ConfigError(
                f"method: {options.method} compares prompts, and those of the library are missing;"
                " give --tasks DIR with <adapter>/probe.jsonl, or a pack with a router, and rows"
                " that have prompts"
            )
        return None
    return _nearness(router, router.states(base.model, prompts), pack, library)


def _nearness(
    router: Router, states: np.ndarray, pack: Pack | None, library: Sequence[Adapter]
) -> np.ndarray:
    """The largest cosine of the prompts' mean state with a task of each adapter."""
    cosines = {one.task: one.similarity
               for one in router.matches(states.mean(axis=0), len(router.tasks))}  # fmt: skip
    tasks: dict[str, Sequence[str]] = {one.name: [one.name] for one in library}
    if pack:
        tasks = {"+".join(some): some for some in pack.adapters.values()}
    return np.array([max(cosines.get(t, -1.0) for t in tasks[one.name]) for one in library])


def compose_adapter(
    task: NewTask, rows: ExampleSet, method: str = "auto"
) -> tuple[Adapter, dict[str, Any]]:
    """Compose an adapter by a method, or by the one that cross-validation chooses.

    Args:
        task: the new task.
        rows: its rows, at least two.
        method: a key of `METHODS`, or "auto".

    Returns:
        The adapter in the base model's 16-bit dtype, and what is known of it: `task`, `method`,
        `choice`, `rows`, `library`, `candidates` (name -> `loss` on rows not seen, and `ahead`: by
        how much the method is better, with its standard `error`, in nats) and `as_good`: names of
        "base", "best" and "fresh" that are no worse than it by more than one standard error.
        Where the base model allows no training, methods that train are left out, "fresh" too.

    Raises:
        ConfigError: the method trains, and the base model allows no training.
    """
    methods = _compared(task, method)
    folds = split(rows, task.training.seed)
    scores = cross_validate(task, methods, folds)
    chosen = choose(scores) if method == "auto" else method
    score = scores[chosen]
    assert score.choice is not None, "only the base model has none"
    made = METHODS[chosen].make(task, join(folds), score.choice)
    made = replace(made, name=task.name, base=made.base or task.library[0].base, origin=None)
    return made.uniform(task.base.dtype), _about(task, rows, chosen, scores)


def _compared(task: NewTask, method: str) -> dict[str, Method]:
    """The methods that cross-validation compares, the simplest first."""
    names = AUTO if method == "auto" else (*_REFERENCES, method)
    methods = {name: one for name, one in METHODS.items() if name in names}
    if task.similarity is None:
        methods = {name: one for name, one in methods.items() if not one.needs_prompts}
    if _check_head(task.base, method):
        return methods
    left_out = ", ".join(name for name in methods if name not in _UNTRAINED)
    warn(f"method: {task.base.name} {_NO_GRADIENT}; left out: {left_out}")
    return {name: one for name, one in methods.items() if name in _UNTRAINED}


def _about(
    task: NewTask, rows: ExampleSet, chosen: str, scores: dict[str, Score]
) -> dict[str, Any]:
    candidates = {}
    for name, score in scores.items():
        ahead, error = difference(score, scores[chosen])
        candidates[name] = {"loss": score.loss, "ahead": ahead, "error": error}
    others = [name for name in ("base", *_REFERENCES) if name in scores and name != chosen]
    choice = scores[chosen].choice
    picked = task.library[int(choice or 0)].name if METHODS[chosen].choices is None else choice
    return {
        "task": task.name, "method": chosen, "choice": picked, "rows": len(rows.examples),
        "library": [one.name for one in task.library], "candidates": candidates,
        "as_good": [name for name in others if as_good(scores[name], scores[chosen])],
    }  # fmt: skip
