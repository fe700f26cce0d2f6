"""Commands that check a pack, write it for other programs, and upload it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .help import JSON, Command, PackPath, UserPath
from .say import say, say_json

_PATH = UserPath(path_type=Path)
# The keys of `READERS`, repeated here so that help imports no model code.
READERS = ("mlx-swift", "mlx-lm", "PEFT", "llama.cpp", "vllm-metal", "ExecuTorch", "MNN", "oMLX")


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
def verify(pack: Path, runtime: str | None, model: str | None, as_json: bool) -> None:
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
    if as_json:
        say_json({"pack": str(pack), "storage": verified.storage, "nbytes": verified.nbytes,
                  "adapters": n_adapters, "tasks": n_tasks, "for": runtime})  # fmt: skip
        return
    say(f"{pack}: {verified.storage}, {n_adapters} adapters for {n_tasks} tasks,"
        f" {verified.nbytes:,} bytes: verified{f' for {runtime}' if runtime else ''}")  # fmt: skip


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["mlx", "mlx-swift", "peft", "gguf"]))
@click.option("--output", required=True, type=_PATH, help="replaced as a whole")
@click.option("--model", metavar="M", help="the pack's base model, which gguf needs")
@JSON
def export(pack: Path, to: str, output: Path, model: str | None, as_json: bool) -> None:
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
    if as_json:
        say_json(tasks)
        return
    for task, name in tasks.items():
        say(f"{task:<24} {name or 'the base model'}")
    files = (file for file in output.rglob("*") if file.is_file())
    nbytes = sum(file.stat().st_size for file in files
                 if file.name not in ("tasks.json", ".d2c-mlx.json"))  # fmt: skip
    say(f"wrote {len({name for name in tasks.values() if name})} adapters to {output}")
    say(f"{nbytes:,} bytes, of {source.nbytes:,} in the pack")


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="make a new repository private; refuse a public one")
@click.option("--revision", metavar="BRANCH", help="made if need be  [default: main]")
@click.option("--base", metavar="ID", help="base model on the hub  [default: the pack's]")
@click.option("--license", default="other", metavar="ID", help="as the hub names it")
@click.option("--output", type=_PATH, help="write the folder there, upload nothing")
@JSON
def push(
    pack: Path,
    repo: str,
    private: bool,
    output: Path | None,
    as_json: bool,
    **about: Any,  # noqa: ANN401  click's
) -> None:
    """Upload a pack with a model card to the Hugging Face hub.

    The pack, plain adapters that mlx-lm loads, tasks.json and README.md go up in one commit.

    Examples:
      d2c-mlx push runs/first/pack org/name --private
      d2c-mlx push runs/first/pack org/name --output folder      # to look at; no upload
    """
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.packs.push import push as push_pack
    from d2c_mlx.packs.push import write_repository
    from d2c_mlx.utils.files import visible_files

    source = load_pack(pack)
    if output is None:
        url = push_pack(source, repo, private=private, **about)
        facts: dict[str, Any] = {"repo": repo, "commit": url}
        text = f"pushed: {url}"
    else:
        write_repository(source, repo, output, **about)
        files = [path.relative_to(output).as_posix() for path in visible_files(output)]
        facts = {"repo": repo, "folder": str(output), "files": files}
        text = f"wrote {len(files)} files to {output}; nothing was sent"
    if as_json:
        say_json(facts)
    else:
        say(text)
