"""Routing: finds the task of a prompt from the base model's own hidden states.

    d2c-mlx route PACK --tasks DIR          # fit on calibration rows, keep it in the pack
    d2c-mlx route PACK "Write this number in German words: 896"

A task is represented by the mean direction of its calibration prompts' states (as in LORAUTER,
https://arxiv.org/abs/2601.21795, but without a second model). The state of a prompt is the hidden
state of its last token after half of the blocks. A mean over tokens would be nearly the same for
all prompts there, since the first token outweighs the rest.
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
from safetensors.numpy import save_file

from d2c_mlx.adapters.tensor_file import open_tensors
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
        system: system message of all prompts that it was fitted on, if they had one. A chat
            template may add one of its own where there is none, which moves every state.
    """

    tasks: tuple[str, ...]
    centre: np.ndarray
    directions: np.ndarray
    threshold: float
    n_blocks: int
    system: str | None = None

    def matches(self, state: np.ndarray, k: int = 1) -> list[Match]:
        """The `k` tasks nearest to the state `(hidden,)` of a prompt, nearest first."""
        cosines = self.directions @ _unit(state - self.centre)
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
        return self.best(prompt_states(model, [prompt], self.n_blocks)[0])


def prompt_states(model: nn.Module, prompts: Sequence[Sequence[int]], n_blocks: int) -> np.ndarray:
    """Hidden states `(n, hidden)` of each prompt's last token after `n_blocks` blocks, float32.

    Args:
        model: mlx-lm's, without an adapter.
        prompts: token ids of each.
        n_blocks: number of blocks.
    """
    found: dict[int, np.ndarray] = {}
    for batch in batches_by_length([len(prompt) for prompt in prompts], _BATCH_TOKENS):
        tokens = np.zeros((len(batch), max(len(prompts[i]) for i in batch)), np.int32)
        for row, i in zip(tokens, batch):
            row[: len(prompts[i])] = prompts[i]
        states = run_blocks(model, mx.array(tokens), stop=n_blocks)
        last = mx.array([len(prompts[i]) - 1 for i in batch])
        rows = np.array(states[mx.arange(len(batch)), last].astype(mx.float32))
        found |= dict(zip(batch, rows))
    return np.stack([found[i] for i in range(len(prompts))])


def fit_router(model: nn.Module, probes: Sequence[ExampleSet], system: str | None = None) -> Router:
    """Fit a router on the calibration prompts of each task; the answers are not used.

    Args:
        model: mlx-lm's, without an adapter.
        probes: examples of each task, at least two.
        system: system message of all prompts, see `Router`.

    Raises:
        TaskError: tasks with fewer prompts, or prompts without a token.
    """
    few = [one.task for one in probes if len(one.examples) < 2]
    empty = [one.task for one in probes if any(not row.prompt_tokens for row in one.examples)]
    if few or empty:
        raise TaskError(
            [f"task {name!r}: found one probe prompt, expected two or more" for name in few]
            + [f"task {name!r}: a probe row has no prompt, which rows of text never have; expected"
               " prompt and completion, or messages" for name in empty]
        )  # fmt: skip
    n_blocks = len(model.layers) // 2 + 1
    states = {
        one.task: prompt_states(model, [row.prompt_tokens for row in one.examples], n_blocks)
        for one in probes
    }
    return replace(router_from_states(states, n_blocks), system=system)


def router_from_states(states: Mapping[str, np.ndarray], n_blocks: int) -> Router:
    """Make a router from states; use `fit_router` if there are only prompts.

    The threshold is the lowest similarity of any state to its task as the other states give it:
    a prompt that goes to the base model by mistake loses all that its adapter gains.

    Args:
        states: task -> `(n, hidden)` states of two or more prompts.
        n_blocks: number of blocks after which they were taken.
    """
    centre = np.mean([x.mean(axis=0) for x in states.values()], axis=0)
    rows = [_unit(x - centre) for x in states.values()]
    own = [
        float(_unit(np.delete(x, i, axis=0).mean(axis=0)) @ x[i])
        for x in rows for i in range(len(x))
    ]  # fmt: skip
    return Router(
        tuple(states), centre, np.stack([_unit(x.mean(axis=0)) for x in rows]),
        min(own), n_blocks,
    )  # fmt: skip


def save_router(pack: Pack, router: Router) -> Pack:
    """Store a router as a file of the pack; its bytes count towards the budget.

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
        about = {"tasks": list(router.tasks), "threshold": router.threshold,
                 "n_blocks": router.n_blocks, "system": router.system}  # fmt: skip
        # A channel of a state can exceed the range of float16; one of a unit vector cannot.
        tensors: dict[str, np.ndarray] = {
            "centre": router.centre.astype(np.float32),
            "directions": router.directions.astype(np.float16),
        }
        save_file(tensors, path, metadata={"router": json.dumps(about)})

    return with_file(pack, ROUTER, write)


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
            centre, directions = (
                file.handle.get_tensor(name).astype(np.float32) for name in ("centre", "directions")
            )
        router = Router(
            tuple(about["tasks"]), centre, directions, float(about["threshold"]),
            int(about["n_blocks"]), about.get("system"),
        )  # fmt: skip
        good = directions.shape == (len(router.tasks), *centre.shape) and centre.ndim == 1
        good &= bool(np.isfinite(directions).all() and np.isfinite(centre).all())
        good &= set(router.tasks) <= pack.tasks.keys() and router.n_blocks > 0
        good &= router.system is None or isinstance(router.system, str)
    except (PackError, KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise PackError(f"{path}: no router of this pack; fit it again with d2c-mlx route --tasks")
    return router


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
