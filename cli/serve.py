"""The command that serves a pack."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .help import Command
from .paths import PackPath, UserPath
from .say import say

if TYPE_CHECKING:
    from d2c_mlx.serve.service import PackService
    from d2c_mlx.web.front import Access


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
@click.option("--adapter-memory", metavar="SIZE", help="most memory of adapters, such as 500MB;"
              " those used longest ago give way  [default: all of the pack stay]")  # fmt: skip
@click.option("--prefix-memory", metavar="SIZE", default="500MB", show_default=True, help="most"
              " memory of beginnings that prompts of a task share; 0 keeps none")  # fmt: skip
@click.option(
    "--adapter-dir",
    "directory",
    type=UserPath(path_type=Path),
    metavar="DIR",
    help="further adapters (PEFT, MLX, GGUF); a request that names one loads it",
)
@click.option("--allow-changes", is_flag=True, help="let clients load and unload adapters of"
              " --adapter-dir, scale them, and reload the pack; needs --token")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="most"
              " that a request may ask for")  # fmt: skip
@click.option("--no-ui", is_flag=True, help="without the chat page at /")
@click.option("--log-file", type=UserPath(path_type=Path), metavar="FILE", help="append a line of"
              " JSON for every request: numbers and names, nothing of what was said")  # fmt: skip
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
    adapter_memory: str | None,
    prefix_memory: str,
    directory: Path | None,
    allow_changes: bool,
    max_tokens: int,
    no_ui: bool,
    log_file: Path | None,
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
    if allow_changes and not token:
        raise click.UsageError("--allow-changes lets clients change what others get; give --token")
    if directory and not directory.is_dir():
        raise click.UsageError(f"--adapter-dir: {directory} is no directory")
    memory = _bytes("--adapter-memory", adapter_memory) if adapter_memory else None
    kept = 0 if prefix_memory == "0" else _bytes("--prefix-memory", prefix_memory)
    from d2c_mlx.utils.environment import require_extra

    require_extra("serve", "serve")
    from d2c_mlx.models.base_model import BaseModel
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.serve.adapters import Adapters
    from d2c_mlx.serve.jobs import Limits
    from d2c_mlx.serve.router import load_router
    from d2c_mlx.serve.service import PackService
    from d2c_mlx.web.front import LOOPBACK, Access

    found = load_pack(pack)
    adapters = Adapters(BaseModel(str(found.base_directory(model))), found, memory)
    known = (*LOOPBACK, host.lower(), *(name.lower() for name in hosts))
    # A page has a name to lead here; an address in digits is the machine's own.
    if host in ("0.0.0.0", "::"):
        known += ("*",)
    access = Access(token or None, origins, known, not no_ui, allow_changes)
    limits = Limits(batch=batch, queue=queue, max_tokens=max_tokens, prefix_nbytes=kept)
    _log_to(log_file)
    _run(PackService(found, adapters, load_router(found), limits, directory), host, port, access)


def _bytes(option: str, size: str) -> int:
    from d2c_mlx.compress.budget import bytes_of

    nbytes = bytes_of(size)
    if not nbytes:
        raise click.UsageError(f"{option}: found {size!r}, expected a size such as 500MB")
    return nbytes


def _log_to(file: Path | None) -> None:
    from d2c_mlx.serve.metrics import log_requests_to

    try:
        if file:
            log_requests_to(file)
    except OSError as error:
        raise click.ClickException(f"--log-file {file}: {error.strerror}") from None


def _run(service: PackService, host: str, port: int, access: Access) -> None:
    """Listen, and serve until a signal."""
    from d2c_mlx.web.server import PackServer

    try:
        opened = PackServer((host, port), service, access)
    except (OSError, UnicodeError) as error:
        words = getattr(error, "strerror", None) or "no name of a host"
        of_port = getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        raise click.ClickException(
            f"--host {host[:80]} --port {port}: {words}; give another"
            f" {'--port' if of_port else '--host'}"
        ) from None
    _stop_by_signal(opened.stop)
    say(
        f"{opened.url}: {len(service.pack.tasks)} tasks{' and auto' if service.router else ''} of"
        f" {service.pack.path}, {service.adapters.model.nbytes / 1e6:,.0f} MB of adapters in"
        " memory; stop with Ctrl-C"
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
