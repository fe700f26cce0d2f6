"""Commands that show a pack, change it and route prompts to its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .help import JSON, MODEL, Command, PackPath, UserPath
from .say import say, say_json

_PATH = UserPath(path_type=Path)


@click.command("list", cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@JSON
def list_(pack: Path, as_json: bool) -> None:
    """Show the adapters of a pack and the tasks they serve.

    A line for each adapter of PACK, with its rank and bytes and how many adapters were merged.

    Example:
      d2c-mlx list runs/first/pack
    """
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.packs.write import list_pack

    rows = list_pack(load_pack(pack))
    if as_json:
        say_json(rows)
        return
    for row in rows:
        name = "base model" if row["adapter"] is None else str(row["adapter"])
        about = f"rank {row['rank']:<4} {row['nbytes']:>12,} bytes" if row["rank"] else " " * 28
        more = row["merged"] - len(row["tasks"])
        gone = f" (and {more} removed)" if row["adapter"] is not None and more > 0 else ""
        say(f"{name:<12} {about}  {', '.join(row['tasks'])}{gone}")


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("adapter")
@click.option("--tasks", type=_PATH, help="<task>/probe.jsonl of the new and of other tasks")
@click.option(
    "--probe-examples", "n_probe", type=click.IntRange(1), default=10, help="rows that decide"
)
@MODEL
@click.option("--budget", help='another budget: bytes such as "20MB", or a number of adapters')
@JSON
def add(
    pack: Path,
    adapter: str,
    tasks: Path | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401  click's
) -> None:
    """Add an adapter to a pack, within its budget.

    ADAPTER becomes a new task of PACK, called like it. It is a directory (PEFT or MLX), a .gguf or
    a Hugging Face id; NAME=ADAPTER gives the task another name.

    A plain pack gives it a slot of its own while there is one, else merges it into the slot that
    is most alike or, with --tasks, whose losses on the rows that are there suffer least. A compact
    pack stores it in an equal share of the bytes and drops what the other adapters need least. A
    router is dropped. For the full search put ADAPTER beside the others, move the changed pack
    elsewhere and run d2c-mlx run again: losses that it measured before are in the cache.

    Examples:
      d2c-mlx add runs/first/pack loras/gec-nl
      d2c-mlx add runs/first/pack gec-nl=org/lora@v1 --model org/base
      d2c-mlx add runs/first/pack loras/gec-nl --tasks tasks --budget 8
    """
    from d2c_mlx.packs.add import add_from_path

    routed = _routed(pack)
    added = add_from_path(pack, adapter, tasks=tasks, **options)
    if as_json:
        names = ("task", "adapter", "joined", "similarity", "dropped", "dropped_energy")
        say_json({name: getattr(added, name) for name in names} | {"nbytes": added.pack.nbytes})
        return
    where = f"an adapter of its own ({added.adapter})"
    if added.joined:
        where = f"merged into {added.adapter} with {', '.join(added.joined)}"
    if added.dropped:
        where += (
            f"; {added.dropped} components of others made room, at most"
            f" {added.dropped_energy:.1%} of an adapter's energy"
        )
    say(f"{added.task}: {where}")
    say(f"{pack}: {len(added.pack.tasks)} tasks, {added.pack.nbytes:,} bytes{routed}")


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("tasks", nargs=-1, required=True)
@JSON
def remove(pack: Path, tasks: tuple[str, ...], as_json: bool) -> None:
    """Remove tasks from a pack.

    Adapters of PACK that serve none but TASKS go too. A merge that serves others stays as it is.

    Example:
      d2c-mlx remove runs/first/pack gec-de gec-fr
    """
    from d2c_mlx.packs.write import opened, remove_tasks

    routed = _routed(pack)
    with opened(pack) as before:
        left = remove_tasks(before, tasks)
    if as_json:
        say_json({"tasks": sorted(left.tasks), "n_adapters": len(left.adapters),
                  "nbytes": left.nbytes})  # fmt: skip
        return
    say(f"{pack}: {len(left.tasks)} tasks, {len(left.adapters)} adapters, {left.nbytes:,} bytes"
        f"{routed}")  # fmt: skip


def _routed(pack: Path) -> str:
    """The note after a change of the tasks, which drops a router; "" if there was none."""
    from d2c_mlx.serve.router import ROUTER

    again = f"; its router is gone, fit another with d2c-mlx route {pack} --tasks DIR"
    return again if (pack / ROUTER).is_file() else ""


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("prompts", nargs=-1)
@click.option("--tasks", type=_PATH, help="<task>/probe.jsonl of the pack's tasks")
@click.option(
    "--probe-examples", "n_probe", type=click.IntRange(2), default=10, help="rows to fit on"
)
@MODEL
@click.option("--top", type=click.IntRange(1), default=3, help="tasks shown")
@click.option(
    "--budget", metavar="B", help="bytes for the pack with its router  [default: the pack's budget]"
)
@JSON
def route(
    pack: Path,
    prompts: tuple[str, ...],
    tasks: Path | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401  click's
) -> None:
    """Tell which task of a pack each prompt is of.

    The base model's hidden states decide; a PROMPT that is of no task of PACK is left to the base
    model.

    With --tasks the router is fitted on the prompts of the calibration rows first and kept in the
    pack, where its bytes count: a pack that fills a budget in bytes needs another --budget. add and
    remove drop it.

    Examples:
      d2c-mlx route runs/first/pack --tasks tasks
      d2c-mlx route runs/first/pack "Write this number in German words: 896"
    """
    from d2c_mlx.serve.router import route_prompts

    rows = route_prompts(pack, prompts, tasks=tasks, **options)
    if as_json:
        say_json(rows)
        return
    if tasks:
        say(f"{pack}: router fitted")
    for row in rows:
        near = ", ".join(f"{match['task']} {match['similarity']:.3f}" for match in row["matches"])
        say(f"{row['task'] or 'base model':<16} ({near})  {row['prompt']}")
