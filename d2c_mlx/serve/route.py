"""Routing prompts to the tasks of a pack: fits its router on calibration rows, and asks it.

    d2c-mlx route PACK --tasks DIR
    d2c-mlx route PACK "Write this number in German words: 896"

`router.py` defines the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import encode_prompts
from d2c_mlx.models.tasks import common_system, encode_probes, load_tasks
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.update import opened
from d2c_mlx.serve.router import fit_router, load_router, save_router
from d2c_mlx.utils.errors import BudgetError, PackError, warn

__all__ = ["route_prompts"]

# Least share of calibration prompts that should find their task.
_GOOD = 0.95


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
    # Reading takes no lock: it neither waits for other processes nor blocks them.
    with opened(directory) if tasks else nullcontext(load_pack(directory)) as pack:
        base = BaseModel(str(pack.base_directory(model)))
        if tasks:
            rows = load_tasks(tasks, sorted(pack.tasks), tests=False)
            probes = encode_probes(base.encode, rows, n_probe)
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
    states = stored.states(base.model, encode_prompts(base.tokenizer, prompts, stored.system))
    result = []
    for prompt, state in zip(prompts, states):
        best = stored.best(state)
        matches = [asdict(match) for match in stored.matches(state, top)]
        result.append({"prompt": prompt, "task": best and best.task, "matches": matches})
    return result
