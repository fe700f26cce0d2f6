"""The result of a run in words: what came out, what it costs, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from d2c_mlx.utils.templates import percent, size

__all__ = ["next_commands", "verdict"]

# Fewer held-out rows than this cannot tell adapters apart that are nearly alike.
_FEW = 20


def verdict(bench: Mapping[str, Any]) -> str:
    """What came out, what it costs on held-out rows, and the worst task, in some sentences.

    Args:
        bench: content of `bench.json`.
    """
    pack, inputs = bench["methods"]["pack"], bench["methods"]["individual"]
    share = percent(pack["nbytes"] / inputs["nbytes"])
    said = f"{len(pack['tasks'])} adapters, {size(inputs['nbytes'])} in all, take"
    said += f" {size(pack['nbytes'])} ({share})"
    unpacked = bench.get("unpacked_nbytes", pack["nbytes"])
    if unpacked != pack["nbytes"]:
        said += f", unpacked for other programs {size(unpacked)}"
    cost = "nothing" if pack["excess"] <= 0 else f"{pack['excess']:.4f} nats per target token"
    said += f". On held-out rows that costs {cost}"
    if pack["retention"] is not None:
        said += f"; {percent(pack['retention'])} of what the adapters gain is kept"
    name, worst = max(pack["tasks"].items(), key=lambda one: one[1]["excess"])
    kept = "" if worst["retention"] is None else f", {percent(worst['retention'])} kept"
    said += f". The worst task is {name}: {worst['excess']:.4f} nats{kept}."
    n = bench["provenance"]["config"]["test_examples"]
    return f"{said} {n} held-out rows per task are few to judge by." if 0 < n < _FEW else said


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
    plain = f"d2c-mlx unpack {run} --output {run}/plain" if compact else (
        f"d2c-mlx export {run} --to peft --output {run}/peft")  # fmt: skip
    ask = f'd2c-mlx generate {run} --task {shlex.quote(task)}{model} "..."'
    return [ask, plain, f"d2c-mlx serve {run}{model}"]
