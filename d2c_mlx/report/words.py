"""The result of a run in words: what came out, what it costs, and what to type next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from d2c_mlx.evaluate.metrics import normalize_text
from d2c_mlx.utils.templates import percent, size

__all__ = ["OWN_ANSWERS", "answered", "excess_interval", "next_commands", "refined", "unmeasured",
           "verdict"]  # fmt: skip

OWN_ANSWERS = (
    "These rows are the adapters' own answers to your prompts, and no held-out rows of yours: a"
    " loss says how far the pack is from the adapters, not from the truth."
)

# A wider interval, as a share of what the adapters gain, cannot tell packs apart that are alike.
_WIDE = 0.01
# With fewer answers the interval is wider than a fifth.
_FEW_ANSWERS = 100


def verdict(bench: Mapping[str, Any]) -> str:
    """What came out, what it costs on held-out rows, and the worst task, in some sentences.

    Args:
        bench: content of `bench.json`, or of `weights.json` where there are no rows.
    """
    pack = bench["methods"]["pack"]
    if "loss" not in pack:
        return f"{_sizes(bench)}. {unmeasured(bench)}"
    cost = "nothing" if pack["excess"] <= 0 else f"{pack['excess']:.4f} nats per target token"
    said = f"{_sizes(bench)}. On held-out rows that costs {cost}"
    between = excess_interval(bench)
    if between and between["low"] is None:
        said += " (no interval: a task has one held-out row only)"
    elif between:
        said += f" (95% interval {between['low']:.4f} to {between['high']:.4f}"
        said += ": too few rows to tell more)" if between["few"] else ")"
    if pack["retention"] is not None:
        said += f"; {percent(pack['retention'])} of what the adapters gain is kept"
    name, worst = max(pack["tasks"].items(), key=lambda one: one[1]["excess"])
    kept = "" if worst["retention"] is None else f", {percent(worst['retention'])} kept"
    said += f". The worst task is {name}: {worst['excess']:.4f} nats{kept}."
    return said if bench["provenance"]["config"]["tasks"] else f"{said} {OWN_ANSWERS}"


def unmeasured(bench: Mapping[str, Any]) -> str:
    """What a run without rows can say of its pack, and what it cannot.

    Args:
        bench: content of `weights.json`.
    """
    pack = bench["methods"]["pack"]
    name, worst = max(pack["tasks"].items(), key=lambda one: one[1]["error"])
    return (
        "No loss and no answer was measured, as there are no rows: whether the tasks still work is"
        f" unknown. By weights, the mean error of an update is {percent(pack['error'])} of it, and"
        f" {percent(pack['kept'])} of its energy is kept; the worst is {name}, error"
        f" {percent(worst['error'])}. With rows, d2c-mlx run --tasks DIR measures."
    )


def _sizes(bench: Mapping[str, Any]) -> str:
    pack, inputs = bench["methods"]["pack"], bench["methods"]["individual"]
    share = percent(pack["nbytes"] / inputs["nbytes"])
    n = len(pack["tasks"])
    said = f"{n} adapters, {size(inputs['nbytes'])} in all, take" if n > 1 else (
        f"1 adapter, {size(inputs['nbytes'])}, takes")  # fmt: skip
    said += f" {size(pack['nbytes'])} ({share})"
    unpacked = bench.get("unpacked_nbytes", pack["nbytes"])
    if unpacked != pack["nbytes"]:
        said += f", unpacked for other programs {size(unpacked)}"
    return said


def excess_interval(bench: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The 95 % interval of the pack's excess: `low`, `high`, and `few` if that needs more rows.

    `low` and `high` are None where a task has one row only.

    Args:
        bench: content of `bench.json`; an older one has no interval, which gives None.
    """
    if "interval" not in bench:
        return None
    low, high = bench["interval"]["low"], bench["interval"]["high"]
    few = low is None or high - low > _WIDE * abs(bench["methods"]["base"]["excess"])
    return {"low": low, "high": high, "few": few}


def answered(bench: Mapping[str, Any]) -> str:
    """How many answers to held-out rows are as expected, with a 95 % interval; "" without any.

    Args:
        bench: content of `bench.json`.
    """
    rows = [row for rows in bench.get("answers", {}).values() for row in rows]
    if not rows:
        return ""
    right = {
        name: sum(normalize_text(row[name]) == normalize_text(row["expected"]) for row in rows)
        for name in ("individual", "pack", "base")
    }
    low, high = _interval(right["pack"], len(rows))
    said = (
        f"Of {len(rows)} answers to held-out rows {right['individual']} of the adapters are as"
        f" expected, {right['pack']} of the pack (95% interval {percent(low)} to {percent(high)}),"
        f" {right['base']} of the base model"
    )
    if 2 * right["individual"] < len(rows):
        chrf = {name: bench["metrics"][name]["chrf"] for name in right}
        said += f"; chrF {chrf['individual']:.1f}, {chrf['pack']:.1f}, {chrf['base']:.1f}"
    return said + (". So few judge roughly." if len(rows) < _FEW_ANSWERS else ".")


def _interval(n: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (https://doi.org/10.2307/2276774)."""
    z = 1.96
    share, more = n / of, z * z / of
    half = z * math.sqrt(share * (1 - share) / of + more / (4 * of))
    return (share + more / 2 - half) / (1 + more), (share + more / 2 + half) / (1 + more)


def next_commands(output: str, bench: Mapping[str, Any], compact: bool) -> list[str]:
    """Three commands that use the pack of a run.

    Args:
        output: the run directory.
        bench: content of `bench.json`.
        compact: the pack is one file, which other programs cannot load.
    """
    config, task = bench["provenance"]["config"], next(iter(bench["methods"]["pack"]["tasks"]))
    model = f" --model {shlex.quote(config['model'])}" if config["model"] else ""
    run = shlex.quote(output)
    to = "mlx" if compact else "peft"
    plain = f"d2c-mlx export {run} --to {to} --output {run}/{to}"
    ask = f'd2c-mlx generate {run} --task {shlex.quote(task)}{model} "..."'
    return [ask, plain, f"d2c-mlx serve {run}{model}"]


def refined(facts: Iterable[Mapping[str, Any]], planned: bool) -> str:
    """How many merges, or adapters of a plan, training changed; "" for a run that does not refine.

    Args:
        facts: content of `refines.json`.
        planned: they are of a plan, else merges.
    """
    facts = list(facts)
    if not facts:
        return ""
    # A merge of one is the task adapter itself, which is not trained.
    changed = [bool(one["refined"]) for one in facts if planned or len(one["members"]) > 1]
    if not changed:
        return "There was no merge to refine: every adapter of the pack serves one task."
    noun, n = "adapter" if planned else "merge", len(changed)
    were, them = (f"{noun} of the pack was", "it") if n == 1 else (
        f"{noun}s of the pack were", "them")  # fmt: skip
    start = f"{sum(changed)} of {n} {were} refined: "
    if not any(changed):
        return f"{start}no training brought {them} closer to the task adapters."
    what, row = ("scales and biases of their numbers", "plan") if planned else ("merges", "d2c")
    return (
        f"{start}{what} were trained to predict what the task adapters predict. The row {row} is"
        " the same without that."
    )
