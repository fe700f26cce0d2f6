"""The result of a run in words: what came out, what it costs, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from d2c_mlx.utils.templates import percent, size

__all__ = ["next_commands", "verdict"]


def verdict(bench: Mapping[str, Any]) -> str:
    """What came out, what it costs on held-out rows, and the worst task, in three sentences.

    Args:
        bench: content of `bench.json`.
    """
    pack, inputs = bench["methods"]["pack"], bench["methods"]["individual"]
    n, share = len(pack["tasks"]), pack["nbytes"] / inputs["nbytes"]
    said = (
        f"{n} adapters of {size(inputs['nbytes'])} take {size(pack['nbytes'])} ({percent(share)})"
    )
    unpacked = bench.get("unpacked_nbytes", pack["nbytes"])
    if unpacked != pack["nbytes"]:
        said += f", unpacked for other programs {size(unpacked)}"
    cost = "nothing" if pack["excess"] <= 0 else f"{pack['excess']:.4f} nats per target token"
    said += f". On held-out rows that costs {cost}"
    if pack["retention"] is not None:
        said += f"; {percent(pack['retention'])} of what the adapters gain is kept"
    name, worst = max(pack["tasks"].items(), key=lambda one: one[1]["excess"])
    kept = "" if worst["retention"] is None else f", {percent(worst['retention'])} kept"
    return f"{said}. The worst task is {name}: {worst['excess']:.4f} nats{kept}."


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
