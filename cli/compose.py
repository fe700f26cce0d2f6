"""The command that makes an adapter for a new task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .help import Command
from .paths import UserPath
from .say import say, say_json

_PATH = UserPath(path_type=Path)


@click.command(cls=Command)
@click.option("--from", "source", required=True, metavar="PACK|DIR", help="a pack, or adapters as"
              " for --adapters of run")  # fmt: skip
@click.option("--task", required=True, type=_PATH, metavar="DIR", help="probe.jsonl of the new"
              " task: about ten rows")  # fmt: skip
@click.option("--output", required=True, type=_PATH, metavar="ADAPTER", help="replaced as a whole;"
              " its name becomes the task's")  # fmt: skip
@click.option("--method", default="auto", show_default=True, metavar="NAME", help="auto"
              " compares several; best, uniform, retrieve, top, continual, fresh, fresh-scaled,"
              " fresh-library, best-trained, lorahub: docs/how-to/new-task.md")  # fmt: skip
@click.option("--tasks", type=_PATH, metavar="DIR", help="<adapter>/probe.jsonl of the"
              " adapters, whose prompts tell which are near  [default: the pack's"
              " router]")  # fmt: skip
@click.option("--probe-examples", type=click.IntRange(2), default=10, show_default=True,
              help="rows of probe.jsonl, the first ones")  # fmt: skip
@click.option("--model", metavar="M", help="the base model  [default: the embedded one]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def compose(
    source: str,
    task: Path,
    output: Path,
    as_json: bool,
    **options: Any,  # noqa: ANN401  click's
) -> None:
    """Make an adapter for a new task of those that there are.

    Adapters are mixed, or a LoRA is trained on the rows, or both; five-fold cross-validation on the
    rows chooses. ADAPTER is in mlx-lm's layout, and compose.json beside it says how it was made and
    whether the base model, the best single adapter or a LoRA trained on the rows is as good. The
    same command goes on where it stopped.

    Examples:
      d2c-mlx compose --from runs/first/pack --task tasks/gec-nl --output loras/gec-nl
      d2c-mlx compose --from loras --tasks tasks --task new/gec-nl --output made/gec-nl
      d2c-mlx add runs/first/pack made/gec-nl
    """
    from d2c_mlx.compose.compose import ComposeOptions
    from d2c_mlx.compose.compose import compose as make

    options["n_probe"] = options.pop("probe_examples")
    found = make(source, task, output, ComposeOptions(**options), not sys.stderr.isatty())
    if as_json:
        say_json(found)
        return
    chosen = found["method"]
    say(f"{'method':<16} {'loss':>7}   {chosen} is ahead by (nats per token, on rows not seen)")
    for name, one in found["candidates"].items():
        ahead = "" if name == chosen else f"{one['ahead']:+.3f} +- {one['error']:.3f}"
        say(f"{name:<16} {one['loss']:>7.3f}   {ahead}")
    picked = f" ({found['choice']})" if found["choice"] != 1 else ""
    say(f"{found['task']}: {chosen}{picked}, of {found['rows']} rows, {found['seconds']:.0f} s")
    for name in found["as_good"]:
        say(f"{_REFERENCES[name]} {_how_good(**found['candidates'][name])}")
    say(f"wrote {output}")


_REFERENCES = {
    "base": "the base model without an adapter",
    "best": "the best single adapter",
    "fresh": "a LoRA trained on the same rows alone",
}


def _how_good(ahead: float, error: float, **_: float) -> str:
    # A difference below 0.0005 would be printed as 0.000.
    if -ahead > max(error, 0.0005):
        return f"is better: by {-ahead:.3f} +- {error:.3f} nats per token"
    return "is as good: within one standard error"
