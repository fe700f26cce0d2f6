"""Routing: finds the task of a prompt from the base model's own hidden states.

    d2c-mlx route PACK --tasks DIR          # fit on calibration rows, keep it in the pack
    d2c-mlx route PACK "Write this number in German words: 896"

A task is represented by the mean direction of its calibration prompts' states (as in LORAUTER,
https://arxiv.org/abs/2601.21795, but without a second model). Which states tell tasks apart differs
between models. So the blocks, the last token or the mean over all but the first, and whether
channels are brought to one scale, are those that find most prompts' tasks when each is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import save

from d2c_mlx.adapters.tensor_file import open_tensors
from d2c_mlx.compress.budget import Budget
from d2c_mlx.evaluate.batches import batches_by_length
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import run_blocks
from d2c_mlx.packs.pack import Pack
from d2c_mlx.packs.write import with_file
from d2c_mlx.utils.errors import PackError, TaskError
from d2c_mlx.utils.parsing import parse_json

__all__ = [
    "ROUTER",
    "Match",
    "Router",
    "fit_router",
    "load_router",
    "prompt_states",
    "router_from_states",
    "save_router",
]

ROUTER = "router.safetensors"
# Padded tokens of a batch.
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Match:
    """A task found for a prompt.

    Attributes:
        task: its name.
        similarity: cosine between the states of prompt and task, both minus the mean of all tasks.
    """

    task: str
    similarity: float


@dataclass(frozen=True, eq=False)
class Router:
    """Tasks of a pack as directions in the space of hidden states.

    Make one with `fit_router`; `load_router` reads the one of a pack.

    Attributes:
        tasks: names.
        centre: `(hidden,)`, the mean state of all tasks.
        directions: `(n_tasks, hidden)`, unit vectors.
        threshold: a prompt whose best similarity is lower belongs to no task.
        n_blocks: number of blocks after which states are taken.
        pooling: "last" token, or "mean" over all tokens but the first.
        spread: `(hidden,)` that the distance from the centre is divided by; None is 1.
        accuracy: share of the calibration prompts that find their task when they are left out.
        system: system message of all prompts that it was fitted on, if they had one. A chat
            template may add one of its own where there is none, which moves every state.
    """

    tasks: tuple[str, ...]
    centre: np.ndarray
    directions: np.ndarray
    threshold: float
    n_blocks: int
    pooling: str = "last"
    spread: np.ndarray | None = None
    accuracy: float = 1.0
    system: str | None = None

    def states(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The states `(n, hidden)` that prompts are routed by; arguments as for `prompt_states`."""
        return prompt_states(model, prompts, self.n_blocks, self.pooling)

    def matches(self, state: np.ndarray, k: int = 1) -> list[Match]:
        """The `k` tasks nearest to the state `(hidden,)` of a prompt, nearest first."""
        cosines = self.directions @ _unit((state - self.centre) / _one(self.spread))
        order = np.argsort(-cosines, kind="stable")[:k]
        return [Match(self.tasks[i], float(cosines[i])) for i in order]

    def best(self, state: np.ndarray) -> Match | None:
        """The task nearest to a state; None if all are too far and the base should answer."""
        (match,) = self.matches(state)
        return match if match.similarity >= self.threshold else None

    def route(self, model: nn.Module, prompt: Sequence[int]) -> Match | None:
        """The task of a prompt; None if the base model should answer.

        Args:
            model: mlx-lm's, the pack's base without an adapter.
            prompt: token ids, the chat template applied.
        """
        return self.best(self.states(model, [prompt])[0])


def prompt_states(
    model: nn.Module, prompts: Sequence[Sequence[int]], n_blocks: int, pooling: str = "last"
) -> np.ndarray:
    """Hidden states `(n, hidden)` of prompts after `n_blocks` blocks, float32.

    Args:
        model: mlx-lm's, without an adapter.
        prompts: token ids of each.
        n_blocks: number of blocks.
        pooling: see `Router`.
    """
    return _states(model, prompts, [n_blocks])[n_blocks, pooling]


def _states(
    model: nn.Module, prompts: Sequence[Sequence[int]], places: Sequence[int]
) -> dict[tuple[int, str], np.ndarray]:
    """(Number of blocks, pooling) -> states `(n, hidden)`, in one pass; `places` ascend."""
    states: dict[tuple[int, str], dict[int, np.ndarray]] = {}
    for batch in batches_by_length([len(prompt) for prompt in prompts], _BATCH_TOKENS):
        lengths = np.array([len(prompts[i]) for i in batch])
        tokens = np.zeros((len(batch), lengths.max()), np.int32)
        for row, i in zip(tokens, batch):
            row[: len(prompts[i])] = prompts[i]
        place = np.arange(tokens.shape[1])
        weights = {
            "last": place == lengths[:, None] - 1,
            # The first token outweighs the rest; a prompt of one token has no other.
            "mean": (place < lengths[:, None]) & (place >= np.minimum(1, lengths[:, None] - 1)),
        }
        x, done = mx.array(tokens), 0
        for n_blocks in places:
            x, done = run_blocks(model, x, first=done, stop=n_blocks), n_blocks
            for pooling, chosen in weights.items():
                share = mx.array(chosen / chosen.sum(axis=1, keepdims=True), mx.float32)[:, None]
                pooled = np.array((share @ x.astype(mx.float32))[:, 0])
                states.setdefault((n_blocks, pooling), {}).update(zip(batch, pooled))
    return {key: np.stack([x[i] for i in range(len(prompts))]) for key, x in states.items()}


def fit_router(model: nn.Module, probes: Sequence[ExampleSet], system: str | None = None) -> Router:
    """Fit a router on the calibration prompts of each task; the answers are not used.

    Args:
        model: mlx-lm's, without an adapter.
        probes: examples of each task, at least two.
        system: system message of all prompts, see `Router`.

    Raises:
        TaskError: tasks with fewer prompts, or prompts without a token.
    """
    problems = []
    for probe in probes:
        if len(probe.examples) < 2:
            problems.append(f"task {probe.task!r}: found one probe prompt, expected two or more")
        elif any(not row.prompt_tokens for row in probe.examples):
            words = "a probe row has no prompt; expected prompt and completion, or messages"
            problems.append(f"task {probe.task!r}: {words}")
    if problems:
        raise TaskError(problems)
    n = len(model.layers)
    places = sorted({max(1, n // 4), n // 2 + 1, max(1, 3 * n // 4)})
    each = {
        probe.task: _states(model, [row.prompt_tokens for row in probe.examples], places)
        for probe in probes
    }
    routers = []
    for place in sorted(places, key=lambda place: place != n // 2 + 1):
        for pooling in ("last", "mean"):
            states = {task: x[place, pooling] for task, x in each.items()}
            routers += [router_from_states(states, place, pooling, yes) for yes in (False, True)]
    # The first of those that are as good: the one that served 24 tasks of SmolLM2 best.
    return replace(max(routers, key=lambda router: router.accuracy), system=system)


def router_from_states(
    states: Mapping[str, np.ndarray], n_blocks: int, pooling: str = "last", scaled: bool = False
) -> Router:
    """Make a router from states; use `fit_router` if there are only prompts.

    The threshold is the lowest similarity of any state to its task as the other states give it,
    without those that are far out (three quartile ranges below the quartile): a prompt that goes to
    the base model by mistake loses all that its adapter gains.

    Args:
        states: task -> `(n, hidden)` states of two or more prompts.
        n_blocks: number of blocks after which they were taken.
        pooling: how they were pooled, see `Router`.
        scaled: bring all channels to one scale.
    """
    centre = np.mean([x.mean(axis=0) for x in states.values()], axis=0)
    spread = None
    if scaled:
        spread = np.sqrt(np.mean([(x - centre).var(axis=0) for x in states.values()], axis=0))
        # Where no prompt differs from another, nothing is scaled.
        spread = np.maximum(spread, 1e-3 * spread.max() or 1.0)
    rows = [_unit((x - centre) / _one(spread)) for x in states.values()]
    directions = np.stack([_unit(x.mean(axis=0)) for x in rows])
    own, right = [], []
    for k, x in enumerate(rows):
        for i in range(len(x)):
            cosines = directions @ x[i]
            cosines[k] = _unit(np.delete(x, i, axis=0).mean(axis=0)) @ x[i]
            own.append(float(cosines[k]))
            right.append(int(cosines.argmax()) == k)
    low, high = np.quantile(own, (0.25, 0.75))
    threshold = min(cosine for cosine in own if cosine >= low - 3 * (high - low))
    accuracy = float(np.mean(right))
    return Router(tuple(states), centre, directions, threshold, n_blocks, pooling, spread, accuracy)


def save_router(pack: Pack, router: Router, budget: Budget | None = None) -> Pack:
    """Store a router as a file of the pack; its bytes count towards the budget.

    Args:
        pack: what `load_pack` verified.
        router: of tasks of the pack.
        budget: bytes for the pack with its router; None keeps the pack's own.

    Returns:
        The pack with its router.

    Raises:
        PackError: the pack has no room for it, or does not serve one of its tasks; nothing is
            changed.
    """
    unknown = sorted(set(router.tasks) - pack.tasks.keys())
    if unknown:
        raise PackError(f"{pack.path}: no task {', '.join(map(repr, unknown))}")

    def write(path: Path) -> None:
        about: dict[str, Any] = {"tasks": list(router.tasks), "threshold": router.threshold}
        about |= {"n_blocks": router.n_blocks, "pooling": router.pooling}
        about |= {"accuracy": router.accuracy, "system": router.system}
        # A channel of a state can exceed the range of float16; one of a unit vector cannot.
        tensors: dict[str, np.ndarray] = {
            "centre": router.centre.astype(np.float32),
            "directions": router.directions.astype(np.float16),
        }
        if router.spread is not None:
            tensors["spread"] = router.spread.astype(np.float32)
        # `save_file` has an error of its own for a full disk; here it is an OSError.
        path.write_bytes(save(tensors, metadata={"router": json.dumps(about)}))

    return with_file(pack, ROUTER, write, budget)


def load_router(pack: Pack) -> Router | None:
    """Read the router of a verified pack; None if it has none.

    Raises:
        PackError: the router is damaged, or the pack does not serve one of its tasks.
    """
    if ROUTER not in pack.manifest.files:
        return None
    path = pack.path / ROUTER
    try:
        with pack.reading([ROUTER]), open_tensors(path, PackError) as file:
            about: Any = parse_json(file.metadata["router"])
            read = file.handle.get_tensor
            tensors = {name: read(name).astype(np.float32) for name in file.handle.keys()}
        centre, directions, spread = tensors["centre"], tensors["directions"], tensors.get("spread")
        about |= {"tasks": tuple(about["tasks"]), "threshold": float(about["threshold"])}
        about |= {"n_blocks": int(about["n_blocks"]), "accuracy": float(about["accuracy"])}
        router = Router(**about, centre=centre, directions=directions, spread=spread)
        good = directions.shape == (len(router.tasks), *centre.shape) and centre.ndim == 1
        good &= bool(np.isfinite(directions).all() and np.isfinite(centre).all())
        good &= router.pooling in ("last", "mean")
        good &= spread is None or (spread.shape == centre.shape and bool((spread > 0).all()))
        good &= set(router.tasks) <= pack.tasks.keys() and router.n_blocks > 0
        good &= router.system is None or isinstance(router.system, str)
    except (PackError, KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise PackError(f"{path}: no router of this pack; fit it again with d2c-mlx route --tasks")
    return router


def _one(spread: np.ndarray | None) -> np.ndarray | float:
    return 1.0 if spread is None else spread


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
