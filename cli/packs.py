"""Commands on a pack: show, change, route, check, write for other programs, upload."""

from pathlib import Path
from typing import Any

import click

from .help import JSON, MODEL, PATH, Command, PackPath, Printed

# The keys of `READERS`, repeated here so that help imports no model code.
READERS = ("mlx-swift", "mlx-lm", "PEFT", "llama.cpp", "vllm-metal", "ExecuTorch", "MNN")


@click.command("list", cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@JSON
def list_(pack: Path) -> Printed:
    """Show the adapters of a pack and the tasks they serve.

    A line for each adapter of PACK, with its rank and bytes and how many adapters were merged.

    Example:
      d2c-mlx list runs/first/pack
    """
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.packs.write import list_pack

    rows, lines = list_pack(load_pack(pack)), []
    for row in rows:
        name = "base model" if row["adapter"] is None else str(row["adapter"])
        about = f"rank {row['rank']:<4} {row['nbytes']:>12,} bytes" if row["rank"] else " " * 28
        more = row["merged"] - len(row["tasks"])
        gone = f" (and {more} removed)" if row["adapter"] is not None and more > 0 else ""
        lines.append(f"{name:<12} {about}  {', '.join(row['tasks'])}{gone}")
    return rows, lines


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("adapter")
@click.option("--tasks", type=PATH, help="<task>/probe.jsonl of the new and of other tasks")
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
    **options: Any,  # noqa: ANN401  click's
) -> Printed:
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
    where = f"an adapter of its own ({added.adapter})"
    if added.joined:
        where = f"merged into {added.adapter} with {', '.join(added.joined)}"
    if added.dropped:
        where += (
            f"; {added.dropped} components of others made room, at most"
            f" {added.dropped_energy:.1%} of an adapter's energy"
        )
    size = f"{len(added.pack.tasks)} tasks, {added.pack.nbytes:,} bytes"
    names = ("task", "adapter", "joined", "similarity", "dropped", "dropped_energy")
    content = {name: getattr(added, name) for name in names} | {"nbytes": added.pack.nbytes}
    return content, [f"{added.task}: {where}", f"{pack}: {size}{routed}"]


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("tasks", nargs=-1, required=True)
@JSON
def remove(pack: Path, tasks: tuple[str, ...]) -> Printed:
    """Remove tasks from a pack.

    Adapters of PACK that serve none but TASKS go too. A merge that serves others stays as it is.

    Example:
      d2c-mlx remove runs/first/pack gec-de gec-fr
    """
    from d2c_mlx.packs.write import opened, remove_tasks

    routed = _routed(pack)
    with opened(pack) as before:
        left = remove_tasks(before, tasks)
    n, nbytes = len(left.adapters), left.nbytes
    line = f"{pack}: {len(left.tasks)} tasks, {n} adapters, {nbytes:,} bytes{routed}"
    return {"tasks": sorted(left.tasks), "n_adapters": n, "nbytes": nbytes}, [line]


def _routed(pack: Path) -> str:
    """The note after a change of the tasks, which drops a router; "" if there was none."""
    from d2c_mlx.serve.router import ROUTER

    again = f"; its router is gone, fit another with d2c-mlx route {pack} --tasks DIR"
    return again if (pack / ROUTER).is_file() else ""


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("prompts", nargs=-1)
@click.option("--tasks", type=PATH, help="<task>/probe.jsonl of the pack's tasks")
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
    **options: Any,  # noqa: ANN401  click's
) -> Printed:
    """Say which task of a pack each prompt belongs to.

    The base model's hidden states decide; a PROMPT that fits no task of PACK is left to the base
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
    lines = [f"{pack}: router fitted"] if tasks else []
    for row in rows:
        near = ", ".join(f"{match['task']} {match['similarity']:.3f}" for match in row["matches"])
        lines.append(f"{row['task'] or 'base model':<16} ({near})  {row['prompt']}")
    return rows, lines


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.option(
    "--for",
    "runtime",
    metavar="NAME",
    type=click.Choice(READERS),
    help=f"{', '.join(READERS)}: check what it reads",
)
@click.option("--model", metavar="M", help="the pack's base model; only llama.cpp needs it")
@JSON
def verify(pack: Path, runtime: str | None, model: str | None) -> Printed:
    """Check a pack against its manifest.

    Every file, every adapter's values and, with --for, what another program asks for. All problems
    are told at once; then the exit code is 2.

    Examples:
      d2c-mlx verify runs/first/pack
      d2c-mlx verify runs/first/pack --for mlx-swift
    """
    from d2c_mlx.packs.export import verify as verify_pack

    verified = verify_pack(pack, runtime, model)
    n_adapters, n_tasks = len(verified.adapters), len(verified.tasks)
    facts = {"pack": str(pack), "storage": verified.storage, "nbytes": verified.nbytes}
    what = f"{n_adapters} adapters for {n_tasks} tasks, {verified.nbytes:,} bytes"
    line = f"{pack}: {verified.storage}, {what}: verified{f' for {runtime}' if runtime else ''}"
    return {**facts, "adapters": n_adapters, "tasks": n_tasks, "for": runtime}, [line]


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["mlx", "mlx-swift", "peft", "gguf"]))
@click.option("--output", required=True, type=PATH, help="replaced as a whole")
@click.option("--model", metavar="M", help="the pack's base model, which gguf needs")
@JSON
def export(pack: Path, to: str, output: Path, model: str | None) -> Printed:
    """Write the adapters of a pack for other programs.

    Beside them is tasks.json: task -> file or directory, or null for the base model.

    mlx: directories for mlx-lm and mlx-swift. mlx-swift: smaller ones that mlx-lm refuses, each
    module in its own rank. peft: directories for PEFT. gguf: files for llama.cpp, of the model
    families that the documents list.

    Examples:
      d2c-mlx export runs/first/pack --to mlx --output adapters
      d2c-mlx export runs/first/pack --to peft --output peft-loras
      d2c-mlx export runs/first/pack --to gguf --model M --output gguf-loras
    """
    from d2c_mlx.packs.export import export as export_pack
    from d2c_mlx.packs.pack import load_pack

    source = load_pack(pack)
    tasks = export_pack(source, to, output, model)
    lines = [f"{task:<24} {name or 'the base model'}" for task, name in tasks.items()]
    files = [file for file in output.rglob("*") if file.is_file()]
    others = ("tasks.json", ".d2c-mlx.json")
    nbytes = sum(file.stat().st_size for file in files if file.name not in others)
    lines.append(f"wrote {len({name for name in tasks.values() if name})} adapters to {output}")
    return tasks, [*lines, f"{nbytes:,} bytes, of {source.nbytes:,} in the pack"]


@click.command(cls=Command)
@click.argument("pack", required=False, type=PackPath(path_type=Path))
@click.option("--output", type=PATH, help="replaced as a whole")
@click.option("--task", default="", show_default=False, metavar="T", help="[default: the only one]")
@click.option("--bits", type=click.Choice([2, 3, 4, 5, 6, 8, 16]), default=16)
@click.option("--max-bytes", "most", type=click.IntRange(0), default=0, help="0 is no limit")
@click.option("--tasks", type=PATH, help="<task>/probe.jsonl and test.jsonl, to measure it")
@click.option("--model", "--base", metavar="B", help="the base model  [default: the embedded one]")
@click.option("--check", metavar="MODEL", help="does this model contain --adapter?")
@click.option("--adapter", type=PATH, metavar="A", help="a directory or .gguf")
@JSON
def fuse(check: str | None, adapter: Path | None, model: str | None, **options: Any) -> Any:  # noqa: ANN401  click's
    """Bake one task of a pack into the base model.

    The result is an mlx-lm directory for programs that load no adapters. If --bits lose over 2 % of
    the adapter's gain, errors are compensated; then modules get 8 bits, up to --max-bytes.
    --check only looks; its exit code is 1 if less than half of the adapter's update is there.

    Examples:
      d2c-mlx fuse runs/first --task gec-de --tasks tasks --bits 4 --output fused
      d2c-mlx fuse --check fused --adapter loras/gec-de
    """
    from d2c_mlx.packs.fuse import check_fused, fuse_task

    if check and adapter and not options["pack"]:
        present = check_fused(check, adapter, model)
        return present, [present["sentence"]], int(present["share"] < 0.5)
    if not (options["pack"] and options["output"]) or check or adapter:
        raise click.UsageError("give PACK and --output, or --check and --adapter")
    result = fuse_task(**options, model=model)
    text, losses = "{}: loss {:.4f}, {:.1%} of the gain is kept", result["losses"]
    lines = [text.format(how, losses[how], share) for how, share in result["kept"].items()]
    lines = [*(lines or ["not measured: give --tasks"]), result["present"]["sentence"]]
    wrote = "wrote {how}, {nbytes:,} bytes, to {output}".format(**result, **options)
    return result, [*lines, wrote]


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="make a new repository private; refuse a public one")
@click.option("--revision", metavar="BRANCH", help="made if need be  [default: main]")
@click.option("--base", metavar="ID", help="base model on the hub  [default: the pack's]")
@click.option("--license", default="other", metavar="ID", help="as the hub names it")
@click.option("--output", type=PATH, help="write the folder there, upload nothing")
@JSON
def push(
    pack: Path,
    repo: str,
    output: Path | None,
    **about: Any,  # noqa: ANN401  click's
) -> Printed:
    """Upload a pack with a model card to the Hugging Face hub.

    The pack, plain adapters that mlx-lm loads, tasks.json and README.md go up in one commit.

    Examples:
      d2c-mlx push runs/first/pack org/name --private
      d2c-mlx push runs/first/pack org/name --output folder      # to look at; no upload
    """
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.packs.push import push as push_pack
    from d2c_mlx.utils.files import visible_files

    url = push_pack(load_pack(pack), repo, output=output, **about)
    if not output:
        return {"repo": repo, "commit": url}, [f"pushed: {url}"]
    files = [path.relative_to(output).as_posix() for path in visible_files(output)]
    content = {"repo": repo, "folder": str(output), "files": files}
    return content, [f"wrote {len(files)} files to {output}; nothing was sent"]
