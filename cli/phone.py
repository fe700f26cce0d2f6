"""The command that measures a pack on a quantized model, as on a phone."""

import sys
from typing import Any

import click

from .help import JSON, Command, PackPath, Printed, UserPath

_PATH = UserPath(path_type=str)


# Defaults and ranges are in `d2c_mlx/phone/config.py`.
@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=str))
@click.option(
    "--device",
    metavar="PROFILE",
    required=True,
    help="iphone-6gb, iphone-8gb, iphone-12gb, mac-8gb, mac-16gb, android-8gb, or a .yaml file of"
    " your own",
)
@click.option(
    "--model",
    metavar="M",
    help="mlx-lm directory, Hugging Face id or .gguf file  [default: the embedded"
    " SmolLM2-135M-Instruct]",
)
@click.option("--bits", type=int, help="4 or 8, if M is not quantized yet  [default: M as it is]")
@click.option(
    "--adapters", type=_PATH, metavar="A", help="the individual adapters, to measure them too"
)
@click.option("--tasks", type=_PATH, help="rows as a run has them, to measure quality too")
@click.option(
    "--test-examples", type=int, help="rows that judge and are answered, 0 is all  [default: 10]"
)
@click.option("--contexts", metavar="LIST", help="tokens of the prompts  [default: 128,512,1024]")
@click.option("--decode", type=int, help="tokens generated after each  [default: 32]")
@click.option("--runs", type=int, help="timed runs of each  [default: 3]")
@JSON
def phone(**options: Any) -> Printed:  # noqa: ANN401
    """Measure a pack on a quantized model, as on a phone.

    Memory, speed, change of adapter, held-out loss and answers of PACK, and whether it fits a
    device.

    Examples:
      d2c-mlx phone runs/first/pack --device iphone-6gb
      d2c-mlx phone pack --model M --bits 4 --device iphone-8gb --tasks tasks --adapters loras
      d2c-mlx phone pack --device phone.yaml --json > result.json
    """
    from d2c_mlx.phone.config import PhoneConfig

    config = PhoneConfig(**{name: value for name, value in options.items() if value is not None})

    from d2c_mlx.phone.benchmark import bench_phone
    from d2c_mlx.phone.tables import render_phone

    result = bench_phone(config, quiet=not sys.stderr.isatty())
    return result, [render_phone(result)]
