"""Routing prompts to the tasks of a pack: fits its router on calibration rows, and asks it.

    d2c-mlx route PACK --tasks DIR
    d2c-mlx route PACK "Write this number in German words: 896"

`serve/router.py` defines the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2c_mlx.compress.budget import parse_budget
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import encode_prompts
from d2c_mlx.models.tasks import common_system, encode_probes, load_tasks
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.update import opened
from d2c_mlx.run.records import keep_pack
from d2c_mlx.serve.router import fit_router, load_router, save_router
from d2c_mlx.utils.errors import BudgetError, PackError, warn
from d2c_mlx.utils.files import hash_tree

__all__ = ["RouteOptions", "route_prompts"]


# Least share of calibration prompts that should find their task.
_GOOD = 0.95


@dataclass(frozen=True)
class RouteOptions:
    """Options of `route_prompts`.

    Attributes:
        tasks: directory with `<task>/probe.jsonl` for every task of the pack, to fit the router on
            first; None uses the router that the pack has.
        n_probe: calibration rows per task, the first of probe.jsonl.
        model: the pack's base model, as for `resolve_model`.
        top: number of matches listed per prompt.
        budget: bytes for the pack with its router; None keeps the pack's own.
    """

    tasks: Path | None = None
    n_probe: int = 10
    model: str | None = None
    top: int = 3
    budget: str | None = None


def route_prompts(
    pack: Path, prompts: Sequence[str], options: RouteOptions | None = None
) -> list[dict[str, Any]]:
    """Find the task of a pack that each prompt belongs to.

    Args:
        pack: directory of the pack.
        prompts: a user's messages, each a conversation of its own; none only fits the router.
        options: see `RouteOptions`.

    Returns:
        For each prompt a dict: `prompt`, `task` (None: the base model) and `matches`, best first.

    Raises:
        InputError: no such pack or model, problems of tasks, or no router and no `tasks`.
        D2CError: the router is to be fitted, and another process is at work on the pack.
    """
    options = options or RouteOptions()
    tasks, budget = options.tasks, parse_budget(options.budget) if options.budget else None
    if budget and not budget.nbytes:
        raise BudgetError(f"budget: found {budget.text}, expected bytes, such as 40MB")
    # Reading takes no lock: it neither waits for other processes nor blocks them.
    with opened(pack) if tasks else nullcontext(load_pack(pack)) as found:
        base = BaseModel(str(found.base_directory(options.model)))
        if tasks:
            own = load_tasks(tasks, sorted(found.tasks), tests=False)
            probes = encode_probes(base.encode, own, options.n_probe)
            before = hash_tree(found.path)
            fitted = fit_router(base.model, probes, common_system(own))
            if fitted.accuracy < _GOOD:
                warn(
                    f"router: {fitted.accuracy:.0%} of the calibration prompts find their task when"
                    f" they are left out, expected {_GOOD:.0%}; name tasks in requests, or give"
                    " more rows with --probe-examples"
                )
            found = save_router(found, fitted, budget)
            keep_pack(found.path.resolve(), before)
    router = load_router(found)
    if router is None:
        raise PackError(f"{pack}: has no router; fit one with d2c-mlx route {pack} --tasks DIR")
    if not prompts:
        return []
    asked = encode_prompts(base.tokenizer, prompts, router.system)
    states = router.states(base.model, asked)
    result = []
    for prompt, state in zip(prompts, states):
        best = router.best(state)
        result.append({
            "prompt": prompt,
            "task": best and best.task,
            "matches": [asdict(one) for one in router.matches(state, options.top)],
        })  # fmt: skip
    return result
