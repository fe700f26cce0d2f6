"""The command that measures packs on a quantized model, as on a phone."""

import sys
from pathlib import Path
from typing import Any

import click

from .help import JSON, PATH, Command, PackPath, Printed, UserPath

_PATH = UserPath(path_type=str)


# Defaults and ranges are in `d2c_mlx/phone/config.py`.
@click.command(cls=Command)
@click.argument("packs", metavar="PACK...", nargs=-1, required=True, type=PackPath(path_type=str))
@click.option(
    "--device",
    metavar="PROFILE",
    help="one device alone: a name such as iphone-6gb, or a .yaml file of your own  [default: all]",
)
@click.option(
    "--model",
    metavar="M",
    help="mlx-lm directory, Hugging Face id or .gguf file  [default: the embedded"
    " SmolLM2-135M-Instruct]",
)
@click.option(
    "--bits",
    metavar="LIST",
    help="of 16, 8, 6, 5, 4, 3, 2 and mlx-lm's mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, made of"
    " M in 16 bit  [default: M as it is]",
)
@click.option("--adapters", type=_PATH, metavar="A", help="the task adapters, to measure them too")
@click.option("--tasks", type=_PATH, help="rows as a run has them, to measure quality too")
@click.option("--test-examples", type=int, help="rows that judge, 0 is all  [default: 10]")
@click.option("--answers", type=int, help="of them, rows that are answered  [default: 10]")
@click.option("--contexts", metavar="LIST", help="tokens in all  [default: 1024,4096,8192]")
@click.option("--decode", type=int, help="tokens of the answer  [default: 32]")
@click.option("--runs", type=int, help="timed runs at the first context  [default: 3]")
@click.option("--csv", type=PATH, metavar="FILE", help="write every combination as CSV")
@JSON
def phone(csv: Path | None, **options: Any) -> Printed:  # noqa: ANN401
    """Measure packs on a quantized model, as on a phone.

    What quantizing costs with and without a PACK, memory, speed, change of adapter, and the best
    PACK that fits each device.

    Examples:
      d2c-mlx phone runs/first --device iphone-6gb
      d2c-mlx phone runs/k3 runs/k6 --bits 16,8,4 --tasks tasks --adapters loras --csv sweep.csv
      d2c-mlx phone pack --device phone.yaml --json > result.json
    """
    from d2c_mlx.phone.config import PhoneConfig

    config = PhoneConfig(**{name: value for name, value in options.items() if value is not None})

    from d2c_mlx.phone.benchmark import bench_phone
    from d2c_mlx.phone.sweep import csv_text
    from d2c_mlx.phone.tables import render_phone
    from d2c_mlx.utils.files import write_text

    result = bench_phone(config, quiet=not sys.stderr.isatty())
    if csv:
        write_text(csv, csv_text(result))
    return result, [render_phone(result)]
