"""The command that serves a pack."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import click

from .help import Command
from .paths import PackPath
from .say import say


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.option("--model", metavar="M", help="the pack's base model  [default: the embedded one, if"
              " it is that]")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="other than this machine's own"
              " address it needs --token")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 is"
              " any that is free")  # fmt: skip
@click.option("--token", envvar="D2C_MLX_TOKEN", metavar="T", help="that clients must give as their"
              " API key  [env: D2C_MLX_TOKEN]")  # fmt: skip
@click.option("--allow-origin", "origins", multiple=True, metavar="URL", help="a web page that may"
              " ask, such as http://localhost:3000; others are refused")  # fmt: skip
@click.option("--allowed-host", "hosts", multiple=True, metavar="NAME", help="by which clients may"
              " ask, beside localhost and --host")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="requests"
              " that run at a time")  # fmt: skip
@click.option("--queue", type=click.IntRange(0), default=64, show_default=True, help="requests that"
              " wait; more are refused with 503")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="most"
              " that a request may ask for")  # fmt: skip
@click.option("--no-ui", is_flag=True, help="without the chat page at /")
def serve(
    pack: Path,
    model: str | None,
    host: str,
    port: int,
    token: str | None,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    batch: int,
    queue: int,
    max_tokens: int,
    no_ui: bool,
) -> None:
    """Serve a pack behind OpenAI's API.

    Chat and text completions, streaming or not. The field `model` of a request names a task of
    PACK; the base model's own name asks the base, `auto` lets the pack's router choose (d2c-mlx
    route PACK --tasks DIR fits one). Requests of all tasks run in one batch. /v1/models lists the
    names, /health and /metrics say how it is. / is a chat page for browsers.

    Examples:
      d2c-mlx serve runs/first/pack
      d2c-mlx serve runs/first/pack --model org/base --host 0.0.0.0 --token SECRET
    """
    if not token and not _loopback(host):
        raise click.UsageError(
            f"--host {host} lets other machines in; give --token, or use 127.0.0.1"
        )
    if token and not re.fullmatch("[!-~]+", token):
        raise click.UsageError(
            "--token: found characters that clients cannot send alike, expected ASCII without"
            " spaces; give another token"
        )
    from d2c_mlx.utils.environment import require_extra

    require_extra("serve", "serve")
    from d2c_mlx.models.base_model import BaseModel
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.serve.front import LOOPBACK, Access
    from d2c_mlx.serve.mixed_batch import MixedModel
    from d2c_mlx.serve.router import load_router
    from d2c_mlx.serve.server import PackServer
    from d2c_mlx.serve.service import Limits, PackService

    found = load_pack(pack)
    base = BaseModel(str(found.base_directory(model)))
    mixed, router = MixedModel(base, found), load_router(found)
    limits = Limits(batch=batch, queue=queue, max_tokens=max_tokens)
    known = (*LOOPBACK, host.lower(), *(name.lower() for name in hosts))
    # A page has a name to lead here; an address in digits is the machine's own.
    if host in ("0.0.0.0", "::"):
        known += ("*",)
    access = Access(token or None, origins, known, not no_ui)
    service = PackService(found, mixed, router, limits)
    try:
        opened = PackServer((host, port), service, access)
    except OSError as error:
        raise click.ClickException(
            f"--host {host} --port {port}: {error.strerror}; give another --port"
        ) from None
    _stop_by_signal(opened.stop)
    say(
        f"{opened.url}: {len(found.tasks)} tasks{' and auto' if router else ''} of {pack},"
        f" {mixed.nbytes / 1e6:,.0f} MB of adapters in memory; stop with Ctrl-C"
    )
    opened.run()


def _stop_by_signal(stop: Callable[[], None]) -> None:
    """Have Ctrl-C and SIGTERM stop the server, and a second one the process."""

    def by_signal(*_: object) -> None:
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, signal.default_int_handler)
        say("stopping")
        stop()

    # The word of `interrupt` is for runs.
    signal.set_wakeup_fd(-1)
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, by_signal)


def _loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
