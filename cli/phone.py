"""The command that measures a pack on a quantized model, as on a phone."""

from __future__ import annotations

from typing import Any

import click

from .help import Command
from .options import PHONE_OPTIONS
from .paths import PackPath
from .say import say, say_json


def _options(command: Any) -> Any:  # noqa: ANN401  click's decorators take any function
    for option in reversed(PHONE_OPTIONS):
        command = option(command)
    return command


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=str))
@_options
@click.option("-q", "--quiet", is_flag=True, help="no progress bars")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def phone(quiet: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
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

    result = bench_phone(config, quiet)
    if as_json:
        say_json(result)
    else:
        say(render_phone(result))
