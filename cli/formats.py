"""Commands that convert adapters and packs to other layouts, and verify packs."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from .help import Command
from .paths import PackPath, UserPath
from .say import say, say_json

_DIR = UserPath(path_type=str)
# The keys of `READERS`, repeated here so that help imports no model code.
_READERS = ("mlx-swift", "mlx-lm", "PEFT", "llama.cpp", "vllm-metal", "ExecuTorch", "MNN", "oMLX")
_JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")


@click.command(cls=Command)
@click.option("--model", metavar="M", help="the base model, to check every tensor against")
@click.option("--adapters", required=True, type=_DIR, metavar="A", help="folder of them, or a list"
              " with commas: directories, .gguf files, owner/name[@revision]")  # fmt: skip
@click.option("--output", required=True, type=_DIR, metavar="DIR", help="replaced as a whole")
@click.option("--to", type=click.Choice(["mlx", "peft"]), default="mlx", show_default=True)
@click.option("--accept-dora", type=click.IntRange(1), metavar="RANK", help="take DoRAs in as the"
              " closest LoRAs of this rank, and show the error")  # fmt: skip
@_JSON
def convert(
    model: str | None, adapters: str, output: str, to: str, accept_dora: int | None, as_json: bool
) -> None:
    """Convert adapters to MLX or PEFT, exactly.

    Adapters may be PEFT, MLX or GGUF. One that cannot be converted exactly is refused, with the
    reason.

    Examples:
      d2c-mlx convert --adapters loras --output mlx-loras
      d2c-mlx convert --adapters mlx-loras --output peft-loras --to peft
      d2c-mlx convert --adapters org/name@v1,lora.gguf --output mlx-loras
    """
    from d2c_mlx.adapters.checks import BaseWeights
    from d2c_mlx.adapters.peft_format import save_peft
    from d2c_mlx.adapters.reading import read_adapters
    from d2c_mlx.adapters.sources import find_adapters
    from d2c_mlx.models.base_model import BaseModel
    from d2c_mlx.packs.overwrite import check_output, local_model, mark
    from d2c_mlx.utils.files import write_dir

    sources = find_adapters(adapters)
    check = partial(check_output, Path(output), local_model(model), sources)
    check()
    base = BaseModel(model)
    weights = BaseWeights(base.weight, accept_dora)
    found = read_adapters(sources, base.module_shapes, base.config, base=weights)
    with write_dir(Path(output), lambda _: check()) as directory:
        for adapter in found:
            if to == "peft":
                save_peft(adapter, directory / adapter.name, base.config, base.n_layers)
            else:
                adapter.save(directory / adapter.name, base.n_layers)
        mark(directory, "convert")
    rows = [
        {"name": a.name, "rank": a.rank, "modules": len(a.modules), "base": a.base,
         **({"origin": a.origin} if a.origin else {}),
         **({} if a.dora_error is None else {"dora_error": a.dora_error})}
        for a in found
    ]  # fmt: skip
    if as_json:
        say_json(rows)
        return
    for row in rows:
        lost = row.get("dora_error")
        said = "" if lost is None else f", a DoRA: relative error of dW {lost:.3f}"
        say(f"{row['name']:<24} rank {row['rank']:<4} {row['modules']} modules{said}")
    say(f"wrote {len(rows)} adapters to {output}")


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["mlx", "mlx-swift", "peft", "gguf"]))
@click.option("--output", required=True, type=_DIR, metavar="DIR", help="replaced as a whole")
@click.option("--model", metavar="M", help="the pack's base model; only gguf needs it, for its"
              " heads")  # fmt: skip
@_JSON
def export(pack: Path, to: str, output: str, model: str | None, as_json: bool) -> None:
    """Write the adapters of a pack for other programs.

    Beside them is tasks.json: task -> file or directory, or null for the base model.

    mlx: directories for mlx-lm and mlx-swift. mlx-swift: smaller ones that mlx-lm refuses, each
    module in its own rank. peft: directories for PEFT. gguf: files for
    llama.cpp, of the model families that the documents list.

    Examples:
      d2c-mlx export runs/first/pack --to mlx --output adapters
      d2c-mlx export runs/first/pack --to peft --output peft-loras
      d2c-mlx export runs/first/pack --to gguf --model M --output gguf-loras
    """
    from d2c_mlx.packs.export import export as write_export
    from d2c_mlx.packs.pack import load_pack

    found = load_pack(pack)
    _show_tasks(write_export(found, to, Path(output), model), output, as_json)
    if not as_json:
        say(f"{_nbytes(output):,} bytes, of {found.nbytes:,} in the pack")


def _nbytes(output: str) -> int:
    """Bytes of the adapters in a directory."""
    return sum(file.stat().st_size for file in Path(output).rglob("*") if file.is_file()
               and file.name not in ("tasks.json", ".d2c-mlx.json"))  # fmt: skip


def _show_tasks(tasks: dict[str, str | None], output: str, as_json: bool) -> None:
    if as_json:
        say_json(tasks)
        return
    for task, name in tasks.items():
        say(f"{task:<24} {name or 'the base model'}")
    say(f"wrote {len({name for name in tasks.values() if name})} adapters to {output}")


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.option("--for", "runtime", metavar="NAME", type=click.Choice(_READERS),
              help=f"{', '.join(_READERS)}: check what it reads")  # fmt: skip
@click.option("--model", metavar="M", help="the pack's base model; only llama.cpp needs it")
@_JSON
def verify(pack: Path, runtime: str | None, model: str | None, as_json: bool) -> None:
    """Check a pack against its manifest.

    Every file, every adapter's values and, with --for, what another program asks for. All problems
    are told at once; then the exit code is 2.

    Examples:
      d2c-mlx verify runs/first/pack
      d2c-mlx verify runs/first/pack --for mlx-swift
    """
    from d2c_mlx.packs.verify import verify as verify_pack

    found = verify_pack(pack, runtime, model)
    row = {
        "pack": str(pack),
        "storage": found.storage,
        "nbytes": found.nbytes,
        "adapters": len(found.adapters),
        "tasks": len(found.tasks),
        "for": runtime,
    }
    if as_json:
        say_json(row)
        return
    say(f"{pack}: {found.storage}, {len(found.adapters)} adapters for {len(found.tasks)}"
               f" tasks, {found.nbytes:,} bytes: verified"
               f"{f' for {runtime}' if runtime else ''}")  # fmt: skip
