"""The command that measures a pack as on a phone, and two of its results side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .paths import UserPath

_DIR = UserPath(path_type=str)
_FILE = UserPath(path_type=Path)


@click.command(
    help="Memory, speed, change of adapter, held-out loss and answers of PACK on a quantized base"
    " model, and whether it fits a device.\n\n\b\nExamples:\n"
    "  d2c-mlx phone runs/first/pack --device iphone-6gb\n"
    "  d2c-mlx phone pack --model M --bits 4 --device iphone-8gb --tasks tasks --adapters loras\n"
    "  d2c-mlx phone pack --device phone.yaml --json --history runs.jsonl > here.json"
)
@click.argument("pack", type=_DIR)
@click.option(
    "--device",
    required=True,
    metavar="PROFILE",
    help="iphone-6gb, iphone-8gb, iphone-12gb, mac-8gb, mac-16gb,"
    " android-8gb, or a .yaml file of your own",
)
@click.option(
    "--model",
    metavar="M",
    help="mlx-lm directory, Hugging Face id or .gguf file"
    "  [default: the embedded SmolLM2-135M-Instruct]",
)
@click.option("--bits", type=int, help="4 or 8, if M is not quantized yet  [default: M as it is]")
@click.option(
    "--adapters", type=_DIR, metavar="A", help="the individual adapters, to measure them too"
)
@click.option("--tasks", type=_DIR, metavar="DIR", help="<task>/test.jsonl, to measure quality too")
@click.option(
    "--contexts",
    metavar="LIST",
    help="tokens of the prompts  [default: 128,512,1024, if the model has room]",
)
@click.option("--decode", type=int, help="tokens generated after each  [default: 32]")
@click.option("--runs", type=int, help="timed runs of each  [default: 3]")
@click.option("--test-examples", type=int, help="rows that judge, 0 is all  [default: 10]")
@click.option(
    "--answers",
    type=int,
    help="how many of them are answered and compared, 0 is none  [default: all of them]",
)
@click.option("--history", type=_DIR, metavar="FILE", help="add the result as a line of JSON")
@click.option("--quiet", is_flag=True, help="no progress bars")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def phone(
    contexts: str | None,
    quiet: bool,
    as_json: bool,
    **options: Any,  # noqa: ANN401
) -> None:
    """Measure, print and keep the result."""
    from d2c_mlx.phone.benchmark import bench_phone
    from d2c_mlx.phone.config import PhoneConfig, read_contexts
    from d2c_mlx.phone.tables import render_phone

    given = {name: value for name, value in options.items() if value is not None}
    result = bench_phone(PhoneConfig(**given, contexts=read_contexts(contexts)), quiet)
    click.echo(
        json.dumps(result, indent=2, ensure_ascii=False) if as_json else render_phone(result)
    )


@click.command(
    help="Two results of `phone PACK --json`, or the last lines of two histories, side by side."
    "\n\n\b\nExample:\n  d2c-mlx bench compare here.json there.json"
)
@click.argument("first", type=_FILE)
@click.argument("second", type=_FILE)
def compare(first: Path, second: Path) -> None:
    """Print the table, or say why they cannot be compared."""
    from d2c_mlx.phone.compare import compare_phones
    from d2c_mlx.phone.result import read_phone

    click.echo(compare_phones(read_phone(first), read_phone(second)))
