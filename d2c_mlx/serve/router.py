"""Which task a prompt without a label is of, by the base model's own hidden states.

    d2c-mlx route PACK --tasks DIR          # fit on probe prompts, keep it in the pack
    d2c-mlx route PACK "Write this number in German words: 896"

A task is the mean direction of its probe prompts' states (task representations as in LORAUTER,
https://arxiv.org/abs/2601.21795, without a second model). A state is that of the last prompt token
after half of the blocks: the mean over tokens is nearly the same for all prompts there, since the
first token outweighs the rest.
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
from d2c_mlx.evaluate.batches import by_length
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
    "router_of",
    "save_router",
]

ROUTER = "router.safetensors"
# Padded tokens of a batch.
_BATCH = 512


@dataclass(frozen=True)
class Match:
    """One task for a prompt.

    Attributes:
        task: its name.
        similarity: cosine of the prompt's state and the task's, both from the mean of all.
    """

    task: str
    similarity: float


@dataclass(frozen=True, eq=False)
class Router:
    """Tasks as directions.

    Attributes:
        tasks: names.
        centre: `(hidden,)`, the mean state of all tasks.
        directions: `(n_tasks, hidden)`, of length 1.
        threshold: a prompt whose best similarity is below it is of none of the tasks.
        n_blocks: after so many blocks states are taken.
        system: the system message of all prompts that it learned from. A chat template may have one
            of its own for prompts that have none, which moves every state.
    """

    tasks: tuple[str, ...]
    centre: np.ndarray
    directions: np.ndarray
    threshold: float
    n_blocks: int
    system: str | None = None

    def matches(self, state: np.ndarray, k: int = 1) -> list[Match]:
        """The `k` tasks nearest to a prompt's state `(hidden,)`, the nearest first."""
        cosines = self.directions @ _unit(state - self.centre)
        order = np.argsort(-cosines, kind="stable")[:k]
        return [Match(self.tasks[i], float(cosines[i])) for i in order]

    def best(self, state: np.ndarray) -> Match | None:
        """The nearest task, or None: it is too far, the base model should answer."""
        (match,) = self.matches(state)
        return match if match.similarity >= self.threshold else None

    def route(self, model: nn.Module, prompt: Sequence[int]) -> Match | None:
        """The task of a prompt, or None: the base model should answer.

        Args:
            model: of mlx-lm, the pack's base without an adapter.
            prompt: token ids, the chat template applied.
        """
        return self.best(prompt_states(model, [prompt], self.n_blocks)[0])


def prompt_states(model: nn.Module, prompts: Sequence[Sequence[int]], n_blocks: int) -> np.ndarray:
    """`(n, hidden)` states of every prompt's last token after `n_blocks` blocks, float32."""
    found: dict[int, np.ndarray] = {}
    for some in by_length([len(prompt) for prompt in prompts], _BATCH):
        tokens = np.zeros((len(some), max(len(prompts[i]) for i in some)), np.int32)
        for row, i in zip(tokens, some):
            row[: len(prompts[i])] = prompts[i]
        states = run_blocks(model, mx.array(tokens), stop=n_blocks)
        last = mx.array([len(prompts[i]) - 1 for i in some])
        rows = np.array(states[mx.arange(len(some)), last].astype(mx.float32))
        found |= dict(zip(some, rows))
    return np.stack([found[i] for i in range(len(prompts))])


def fit_router(model: nn.Module, probes: Sequence[ExampleSet], system: str | None = None) -> Router:
    """Learn tasks from their probe prompts; answers are not looked at.

    Args:
        model: of mlx-lm, without an adapter.
        probes: of each task, two prompts at least.
        system: see `Router`.

    Raises:
        TaskError: tasks with fewer prompts, or prompts without a token.
    """
    few = [one.task for one in probes if len(one.examples) < 2]
    empty = [one.task for one in probes if any(not row.asked for row in one.examples)]
    if few or empty:
        raise TaskError(
            [f"task {name!r}: found one probe prompt, expected two or more" for name in few]
            + [f"task {name!r}: a probe row has no prompt, which rows of text never have; expected"
               " prompt and completion, or messages" for name in empty]
        )  # fmt: skip
    n_blocks = len(model.layers) // 2 + 1
    states = {
        one.task: prompt_states(model, [row.asked for row in one.examples], n_blocks)
        for one in probes
    }
    return replace(router_of(states, n_blocks), system=system)


def router_of(states: Mapping[str, np.ndarray], n_blocks: int) -> Router:
    """The router that states give.

    The threshold is what all of them reach, each compared with its task as the others give it: a
    prompt that goes to the base model by mistake loses all that its adapter gains.

    Args:
        states: task -> `(n, hidden)` of two or more prompts.
        n_blocks: after which they were taken.
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
    """Keep a router in the pack, as one of its files; its bytes count.

    Raises:
        PackError: it is over the pack's budget, or for a task that the pack does not serve; the
            pack stays as it is.
    """
    unknown = sorted(set(router.tasks) - pack.tasks.keys())
    if unknown:
        raise PackError(f"{pack.path}: no task {', '.join(map(repr, unknown))}")

    def write(path: Path) -> None:
        about = {"tasks": list(router.tasks), "threshold": router.threshold,
                 "n_blocks": router.n_blocks, "system": router.system}  # fmt: skip
        # Single channels of a state can be beyond float16, those of a unit vector cannot.
        tensors: dict[str, np.ndarray] = {
            "centre": router.centre.astype(np.float32),
            "directions": router.directions.astype(np.float16),
        }
        save_file(tensors, path, metadata={"router": json.dumps(about)})

    return with_file(pack, ROUTER, write)


def load_router(pack: Pack) -> Router | None:
    """The router of a verified pack, if it has one.

    Raises:
        PackError: it is damaged, or for tasks that the pack does not serve.
    """
    if ROUTER not in pack.manifest["files"]:
        return None
    path = pack.path / ROUTER
    try:
        with open_tensors(path, PackError) as file:
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
