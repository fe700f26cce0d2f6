"""Routing: finds the task of a prompt from the base model's own hidden states.

    d2c-mlx route PACK --tasks DIR          # fit on calibration rows, keep it in the pack
    d2c-mlx route PACK "Write this number in German words: 896"

A task is represented by the mean direction of its calibration prompts' states (as in LORAUTER,
https://arxiv.org/abs/2601.21795, but without a second model): after half of the blocks, the mean
over all tokens but the first, all channels brought to one scale.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from safetensors.numpy import save

from d2c_mlx.adapters.tensor_file import open_tensors
from d2c_mlx.compress.budget import Budget, parse_budget
from d2c_mlx.evaluate.batches import batches_by_length
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import run_blocks
from d2c_mlx.models.model import Model
from d2c_mlx.models.rows import Row, answered_row
from d2c_mlx.models.tasks import common_system, encode_rows, load_tasks
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.packs.write import opened, with_file
from d2c_mlx.utils.errors import BudgetError, PackError, TaskError, warn
from d2c_mlx.utils.parsing import parse_json

ROUTER = "router.safetensors"
# Padded tokens of a batch.
_BATCH_TOKENS = 512
# Least share of calibration prompts that should find their task.
_GOOD = 0.95


class Match(NamedTuple):
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
        spread: `(hidden,)` that the distance from the centre is divided by.
        directions: `(n_tasks, hidden)`, unit vectors.
        threshold: a prompt whose best similarity is lower belongs to no task.
        n_blocks: number of blocks after which states are taken.
        accuracy: share of the calibration prompts that find their task when they are left out.
        system: system message of all prompts that it was fitted on, if they had one. A chat
            template may add one of its own where there is none, which moves every state.
    """

    tasks: tuple[str, ...]
    centre: np.ndarray
    spread: np.ndarray
    directions: np.ndarray
    threshold: float
    n_blocks: int
    accuracy: float = 1.0
    system: str | None = None

    def states(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The states `(n, hidden)` that prompts are routed by; arguments as for `prompt_states`."""
        return prompt_states(model, prompts, self.n_blocks)

    def matches(self, state: np.ndarray, k: int = 1) -> list[Match]:
        """The `k` tasks nearest to the state `(hidden,)` of a prompt, nearest first."""
        cosines = self.directions @ _unit((state - self.centre) / self.spread)
        order = np.argsort(-cosines, kind="stable")[:k]
        return [Match(self.tasks[i], float(cosines[i])) for i in order]

    def best(self, state: np.ndarray) -> Match | None:
        """The task nearest to a state; None if all are too far and the base should answer."""
        (match,) = self.matches(state)
        return match if match.similarity >= self.threshold else None


def prompt_states(model: nn.Module, prompts: Sequence[Sequence[int]], n_blocks: int) -> np.ndarray:
    """Hidden states of prompts `(n, hidden)`, float32.

    Args:
        model: mlx-lm's, without an adapter.
        prompts: token ids of each.
        n_blocks: number of blocks after which they are taken.
    """
    states: dict[int, np.ndarray] = {}
    for batch in batches_by_length([len(prompt) for prompt in prompts], _BATCH_TOKENS):
        lengths = np.array([len(prompts[i]) for i in batch])
        tokens = np.zeros((len(batch), lengths.max()), np.int32)
        for row, i in zip(tokens, batch):
            row[: len(prompts[i])] = prompts[i]
        place = np.arange(tokens.shape[1])
        # The first token outweighs the rest; a prompt of one token has no other.
        chosen = (place < lengths[:, None]) & (place >= np.minimum(1, lengths[:, None] - 1))
        share = mx.array(chosen / chosen.sum(axis=1, keepdims=True), mx.float32)[:, None]
        x = run_blocks(model, mx.array(tokens), stop=n_blocks).astype(mx.float32)
        states.update(zip(batch, np.array((share @ x)[:, 0])))
    return np.stack([states[i] for i in range(len(prompts))])


def fit_router(model: nn.Module, probes: Sequence[ExampleSet], system: str | None = None) -> Router:
    """Fit a router on the calibration prompts of each task, at least two; answers are not used.

    Args:
        model: mlx-lm's, without an adapter.
        probes: examples of each task.
        system: system message of all prompts, see `Router`.

    Raises:
        TaskError: tasks with fewer prompts, or prompts without a token.
    """
    problems = [
        f"task {probe.task!r}: found {len(probe.examples)} probe rows, expected two or more, each"
        " with a prompt and a completion, or messages"
        for probe in probes
        if len(probe.examples) < 2 or not all(row.prompt_tokens for row in probe.examples)
    ]
    if problems:
        raise TaskError(problems)
    n_blocks = len(model.layers) // 2 + 1
    states = {
        probe.task: prompt_states(model, [row.prompt_tokens for row in probe.examples], n_blocks)
        for probe in probes
    }
    return replace(router_from_states(states, n_blocks), system=system)


def router_from_states(states: Mapping[str, np.ndarray], n_blocks: int) -> Router:
    """Make a router from states; use `fit_router` if there are only prompts.

    The threshold is the lowest similarity of any state to its task as the other states give it,
    without those that are far out (three quartile ranges below the quartile): a prompt that goes to
    the base model by mistake loses all that its adapter gains.

    Args:
        states: task -> `(n, hidden)`, of two or more prompts after `n_blocks` blocks.
        n_blocks: see `Router`.
    """
    centre = np.mean([x.mean(axis=0) for x in states.values()], axis=0)
    spread = np.sqrt(np.mean([(x - centre).var(axis=0) for x in states.values()], axis=0))
    # Where no prompt differs from another, nothing is scaled.
    spread = np.maximum(spread, 1e-3 * spread.max() or 1.0)
    rows = [_unit((x - centre) / spread) for x in states.values()]
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
    return Router(tuple(states), centre, spread, directions, threshold, n_blocks, accuracy)


def route_prompts(
    directory: Path,
    prompts: Sequence[str],
    *,
    tasks: Path | None = None,
    n_probe: int = 10,
    model: str | None = None,
    top: int = 3,
    budget: str | None = None,
) -> list[dict[str, Any]]:
    """Find the task of a pack that each prompt belongs to.

    Args:
        directory: of the pack.
        prompts: a user's messages, each a conversation of its own; none only fits the router.
        tasks: directory with `<task>/probe.jsonl` for every task of the pack, to fit the router on
            first; None uses the router that the pack has.
        n_probe: calibration rows per task, the first of probe.jsonl.
        model: the pack's base model, as for `resolve_model`.
        top: number of matches listed per prompt.
        budget: bytes for the pack with its router; None keeps the pack's own.

    Returns:
        For each prompt a dict: `prompt`, `task` (None: the base model) and `matches`, best first.

    Raises:
        InputError: no such pack or model, problems of tasks, or no router and no `tasks`.
        D2CError: the router is to be fitted, and another process is at work on the pack.
    """
    parsed = parse_budget(budget) if budget else None
    if parsed and not parsed.nbytes:
        raise BudgetError(f"budget: found {parsed.text}, expected bytes, such as 40MB")
    # Reading takes no lock.
    with opened(directory) if tasks else nullcontext(load_pack(directory)) as pack:
        base = Model(str(pack.base_directory(model)))
        if tasks:
            rows = load_tasks(tasks, sorted(pack.tasks), tests=False)
            probes = encode_rows(base.encode, rows, n_probe)
            router = fit_router(base.model, probes, common_system(rows))
            if router.accuracy < _GOOD:
                warn(
                    f"router: {router.accuracy:.0%} of the calibration prompts find their task when"
                    f" they are left out, expected {_GOOD:.0%}; name tasks in requests, or give"
                    " more rows with --probe-examples"
                )
            pack = save_router(pack, router, parsed)
    stored = load_router(pack)
    if stored is None:
        raise PackError(
            f"{directory}: has no router; fit one with d2c-mlx route {directory} --tasks DIR"
        )
    if not prompts:
        return []
    before = [] if stored.system is None else [{"role": "system", "content": stored.system}]
    turns = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
    # With a stand-in for the answer.
    asked = base.encode("prompts", [answered_row(Row(messages=x), "?") for x in turns])
    states = stored.states(base.model, [row.prompt_tokens for row in asked.examples])
    result = []
    for prompt, state in zip(prompts, states):
        best, matches = stored.best(state), stored.matches(state, top)
        row = {"prompt": prompt, "task": best and best.task}
        result.append({**row, "matches": [match._asdict() for match in matches]})
    return result


def save_router(pack: Pack, router: Router, budget: Budget | None = None) -> Pack:
    """Store a router as a file of a verified pack; its bytes count towards the budget.

    Raises:
        PackError: the pack, or `budget` in place of its own, has no room; nothing is changed.
    """
    # A channel of a state can exceed the range of float16; one of a unit vector cannot.
    dtypes = {"centre": np.float32, "spread": np.float32, "directions": np.float16}
    tensors = {name: getattr(router, name).astype(dtype) for name, dtype in dtypes.items()}
    about = {name: value for name, value in vars(router).items() if name not in dtypes}
    # `save_file` has an error of its own for a full disk; here it is an OSError.
    content = save(tensors, metadata={"router": json.dumps(about)})
    return with_file(pack, ROUTER, content, budget)


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
        router = Router(**{**about, "tasks": tuple(about["tasks"])}, **tensors)
        n = router.centre.shape
        good = len(n) == 1 and router.directions.shape == (len(router.tasks), *n)
        good &= all(bool(np.isfinite(x).all()) for x in tensors.values())
        good &= router.spread.shape == n and bool(router.spread.min() > 0)
        good &= set(router.tasks) <= pack.tasks.keys()
        good &= type(router.n_blocks) is int and router.n_blocks > 0
        good &= isinstance(router.threshold + router.accuracy, float)
        good &= router.system is None or isinstance(router.system, str)
    except (PackError, KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise PackError(f"{path}: no router of this pack; fit it again with d2c-mlx route --tasks")
    return router


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
