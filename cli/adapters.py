"""Commands that convert adapters, and make one for a new task."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from .help import JSON, PATH, Command, Printed, UserPath
from .say import minutes


@click.command(cls=Command)
@click.option("--model", metavar="M", help="the base model, to check every tensor against")
@click.option(
    "--adapters", required=True, type=UserPath(path_type=str), metavar="A", help="as for run"
)
@click.option("--output", required=True, type=PATH, help="replaced as a whole")
@click.option("--to", type=click.Choice(["mlx", "peft"]), default="mlx")
@click.option(
    "--accept-dora",
    type=click.IntRange(1),
    metavar="RANK",
    help="take DoRAs in as LoRAs of this rank",
)
@JSON
def convert(
    model: str | None, adapters: str, output: Path, to: str, accept_dora: int | None
) -> Printed:
    """Convert adapters to MLX or PEFT, exactly.

    Adapters may be PEFT, MLX or GGUF. One that cannot be converted exactly is refused, with the
    reason.

    Examples:
      d2c-mlx convert --adapters loras --output mlx-loras
      d2c-mlx convert --adapters mlx-loras --output peft-loras --to peft
      d2c-mlx convert --adapters org/name@v1,lora.gguf --output mlx-loras
    """
    from d2c_mlx.adapters.checks import DoraBase
    from d2c_mlx.adapters.peft_format import save_peft
    from d2c_mlx.adapters.reading import find_adapters, read_adapters
    from d2c_mlx.models.model import Model
    from d2c_mlx.packs.overwrite import check_output, mark
    from d2c_mlx.utils.files import write_dir

    sources = find_adapters(adapters)
    check = partial(check_output, output, "convert", (), sources, model)
    check()
    base = Model(model)
    dora = DoraBase(base.weight, accept_dora) if accept_dora else None
    converted = read_adapters(sources, base.module_shapes, base.config, dora)
    with write_dir(output, lambda _: check()) as directory:
        for adapter in converted:
            if to == "peft":
                save_peft(adapter, directory / adapter.name, base.config, base.n_layers)
            else:
                adapter.save(directory / adapter.name, base.n_layers)
        mark(directory, "convert")
    rows, lines = [], []
    for adapter in converted:
        row = {"name": adapter.name, "rank": adapter.rank, "modules": len(adapter.modules)}
        more = {"origin": adapter.origin, "dora_error": adapter.dora_error}
        optional = {key: value for key, value in more.items() if value is not None}
        rows.append({**row, "base": adapter.base, **optional})
        error = adapter.dora_error
        note = "" if error is None else f", a DoRA: relative error of dW {error:.3f}"
        lines.append(f"{adapter.name:<24} rank {adapter.rank:<4} {row['modules']} modules{note}")
    return rows, [*lines, f"wrote {len(rows)} adapters to {output}"]


@click.command(cls=Command)
@click.option(
    "--from", "source", required=True, metavar="PACK|DIR", help="a pack, or adapters as for run"
)
@click.option("--task", required=True, type=PATH, help="has probe.jsonl of the new task")
@click.option("--output", required=True, type=PATH, metavar="ADAPTER", help="replaced as a whole")
@click.option(
    "--method",
    default="auto",
    metavar="NAME",
    help="auto compares best, uniform, retrieve, top, fresh, fresh-scaled, fresh-library and"
    " best-trained; or one of them, or of a plug-in: docs/how-to/new-task.md",
)
@click.option(
    "--tasks",
    type=PATH,
    help="<adapter>/probe.jsonl of the adapters  [default: the pack's router]",
)
@click.option("--probe-examples", "n_probe", type=click.IntRange(2), default=10, help="rows to use")
@click.option("--model", metavar="M", help="the base model  [default: the embedded one]")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--dry-run", is_flag=True, help="say how long it takes, and stop")
@click.option("--anyway", is_flag=True, help="write it also if the base model alone is better")
@JSON
def compose(source: str, task: Path, output: Path, **options: Any) -> Printed:  # noqa: ANN401  click's
    """Make an adapter for a new task from adapters you have.

    Adapters are mixed, or a LoRA is trained on the rows, or both; five-fold cross-validation on the
    rows chooses. ADAPTER is in mlx-lm's layout, and compose.json beside it says how it was made and
    whether the base model, the best single adapter or a LoRA trained on the rows is as good. If the
    base model is better, nothing is written, with exit code 1.

    Examples:
      d2c-mlx compose --from runs/first/pack --task tasks/gec-nl --output loras/gec-nl
      d2c-mlx compose --from loras --tasks tasks --task new/gec-nl --output made/gec-nl
      d2c-mlx add runs/first/pack made/gec-nl
    """
    from d2c_mlx.compose.compose import compose as make

    result = make(source, task, output, **options, quiet=not sys.stderr.isatty())
    if options["dry_run"]:
        work = f"{result['tokens']:,} tokens, about {minutes(result['seconds'])} here"
        return result, [f"compares {', '.join(result['methods'])}: {work}. Nothing was written."]
    chosen = result["method"]
    lines = [
        f"{'method':<16} {'loss':>7}   {chosen} is ahead by (nats per token, on rows not seen)"
    ]
    for name, row in result["candidates"].items():
        ahead = "" if name == chosen else f"{row['ahead']:+.3f} +- {row['error']:.3f}"
        ahead += ", which is as good" if name in result["as_good"] else ""
        lines.append(f"{name:<16} {row['loss']:>7.3f}   {ahead}")
    choice = f" ({result['choice']})" if result["choice"] != 1 else ""
    rows = f"{result['rows']} rows, {result['seconds']:.0f} s"
    return result, [*lines, f"{result['task']}: {chosen}{choice}, of {rows}", f"wrote {output}"]
