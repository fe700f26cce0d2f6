"""The result of a run in words: what came out, what it costs, and what to type next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from d2c_mlx.evaluate.answers import normalize_text
from d2c_mlx.utils.templates import percent, size

__all__ = ["answered", "cost", "next_commands", "questions", "refined", "verdict"]

Json = Mapping[str, Any]
_OWN_ANSWERS = (
    " These rows are the adapters' own answers to your prompts, and no held-out rows of yours: a"
    " loss says how far the pack is from the adapters, not from the truth."
)
# A wider interval, as a share of what the adapters gain, cannot tell packs apart that are alike.
_WIDE = 0.01
# With fewer answers the interval is wider than a fifth.
_FEW_ANSWERS = 100


def verdict(bench: Json) -> str:
    """What came out, what it costs, and the worst task, in some sentences.

    Args:
        bench: content of `bench.json`, or of `weights.json` where there are no rows.
    """
    pack, inputs = bench["methods"]["pack"], bench["methods"]["individual"]
    n, total = len(pack["tasks"]), size(inputs["nbytes"])
    start = f"{n} adapters, {total} in all, take" if n > 1 else f"1 adapter, {total}, takes"
    text = f"{start} {size(pack['nbytes'])} ({percent(pack['nbytes'] / inputs['nbytes'])})"
    unpacked = bench.get("unpacked_nbytes", pack["nbytes"])
    if unpacked != pack["nbytes"]:
        text += f", unpacked for other programs {size(unpacked)}"
    return f"{text}. {cost(bench)}"


def cost(bench: Json) -> str:
    """What a pack costs on held-out rows, or what only its weights can tell; and the worst task.

    Args:
        bench: content of `bench.json` or `weights.json`.
    """
    pack = bench["methods"]["pack"]
    if "loss" not in pack:
        name, worst = max(pack["tasks"].items(), key=lambda item: item[1]["error"])
        return (
            "No loss and no answer was measured, as there are no rows: whether the tasks still work"
            f" is unknown. By weights, the mean error of an update is {percent(pack['error'])} of"
            f" it, and {percent(pack['kept'])} of its energy is kept; the worst is {name}, error"
            f" {percent(worst['error'])}. With rows, d2c-mlx run --tasks DIR measures."
        )
    nats = "nothing: " if pack["excess"] <= 0 else ""
    text = f"On held-out rows that costs {nats}{pack['excess']:.4f} nats per target token"
    low, high = bench["interval"]["low"], bench["interval"]["high"]
    if low is None:
        text += " (no interval: a task has one held-out row only)"
    else:
        few = high - low > _WIDE * abs(bench["methods"]["base"]["excess"])
        text += f" (95% interval {low:.4f} to {high:.4f}"
        text += ": too few rows to tell more)" if few else ")"
    if pack["retention"] is not None:
        text += f"; {percent(pack['retention'])} of what the adapters gain is kept"
    name, worst = max(pack["tasks"].items(), key=lambda item: item[1]["excess"])
    kept = "" if worst["retention"] is None else f", {percent(worst['retention'])} kept"
    text += f". The worst task is {name}: {worst['excess']:.4f} nats{kept}."
    return text if bench["provenance"]["config"]["tasks"] else text + _OWN_ANSWERS


def answered(bench: Json) -> str:
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
    # Wilson's interval (https://doi.org/10.2307/2276774).
    share, more = right["pack"] / len(rows), 1.96**2 / len(rows)
    half = 1.96 * math.sqrt(share * (1 - share) / len(rows) + more / (4 * len(rows)))
    low, high = ((share + more / 2 + side) / (1 + more) for side in (-half, half))
    text = (
        f"Of {len(rows)} answers to held-out rows {right['individual']} of the adapters are as"
        f" expected, {right['pack']} of the pack (95% interval {percent(low)} to {percent(high)}),"
        f" {right['base']} of the base model"
    )
    if 2 * right["individual"] < len(rows):
        chrf = {name: bench["metrics"][name]["chrf"] for name in right}
        text += f"; chrF {chrf['individual']:.1f}, {chrf['pack']:.1f}, {chrf['base']:.1f}"
    return text + (". So few answers tell little." if len(rows) < _FEW_ANSWERS else ".")


def questions(bench: Json, n: int = 3) -> list[str]:
    """Held-out questions with the answers of base, task adapter and pack, in lines; [] without any.

    At most one of a task: a question that its adapter answers as expected and the base does not.

    Args:
        bench: content of `bench.json`.
        n: most questions.
    """
    telling = []
    for task, rows in bench.get("answers", {}).items():
        for row in rows:
            expected = normalize_text(row["expected"])
            if normalize_text(row["individual"]) == expected != normalize_text(row["base"]):
                telling.append((task, row))
                break
    lines, n = [], min(n, len(telling))
    # Spread over the tasks, which are sorted by name and so by kind.
    for task, row in (telling[i * len(telling) // n] for i in range(n)):
        lines.append(f"{task}: {row['prompt']}")
        for label, name in (("base", "base"), ("adapter", "individual"), ("pack", "pack")):
            answer = " ".join(row[name].split())
            lines.append(f"  {label:<8} {answer if len(answer) <= 88 else answer[:85] + '...'}")
    return lines


def next_commands(output: str, bench: Json, compact: bool) -> list[str]:
    """Three commands that use the pack of a run.

    Args:
        output: the run directory.
        bench: content of `bench.json`.
        compact: the pack is one file, which other programs cannot load.
    """
    config, task = bench["provenance"]["config"], next(iter(bench["methods"]["pack"]["tasks"]))
    model = f" --model {shlex.quote(config['model'])}" if config["model"] else ""
    run, to = shlex.quote(output), "mlx" if compact else "peft"
    return [
        f'd2c-mlx generate {run} --task {shlex.quote(task)}{model} "..."',
        f"d2c-mlx export {run} --to {to} --output {run}/{to}",
        f"d2c-mlx serve {run}{model}",
    ]


def refined(facts: Iterable[Json], planned: bool) -> str:
    """How many merges, or adapters of a plan, training changed; "" for a run that does not refine.

    Args:
        facts: content of `refines.json`.
        planned: they are of a plan, else merges.
    """
    # A merge of one is the task adapter itself, which is not trained.
    changed = [bool(fact["refined"]) for fact in facts if planned or len(fact["members"]) > 1]
    if not changed:
        return ""
    noun, row = ("adapters", "plan") if planned else ("merges", "d2c")
    return (
        f"Refined {noun}: {sum(changed)} of {len(changed)}, trained to predict what the task"
        f" adapters predict. The row {row} is the same without that."
    )
