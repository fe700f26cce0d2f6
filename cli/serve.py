"""The commands that answer with a pack: one prompt, or an API."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import click

from .help import MODEL, Command, PackPath, UserPath
from .say import say, say_json


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("prompt")
@click.option("--task", default="", metavar="T", help="task of PACK whose adapter answers")
@MODEL
@click.option("--system", metavar="TEXT", help="system message  [default: as in the task's rows]")
@click.option("--max-tokens", type=click.IntRange(1), default=256)
@click.option("--json", "whole", is_flag=True, help="print the result as JSON")
def generate(
    pack: Path,
    prompt: str,
    model: str | None,
    whole: bool,
    **asked: Any,  # noqa: ANN401  click's
) -> None:
    """Answer a prompt with the adapter of a task.

    Example:
      d2c-mlx generate runs/first --task num-de "Write this number in German words: 896"
    """
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.serve.load import answer

    source = load_pack(pack)
    directory = str(source.base_directory(model))
    pieces = answer(source, prompt=prompt, model=directory, **asked)
    if whole:
        say_json({"task": asked["task"], "model": directory, "answer": "".join(pieces)})
        return
    for piece in pieces:
        say(piece, nl=False)
    say("")


def _bytes(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Read bytes such as 500MB; "0" is none."""
    from d2c_mlx.utils.parsing import bytes_of

    nbytes = 0 if text in (None, "0") else bytes_of(str(text))
    if nbytes is None:
        raise click.BadParameter(f"found {text!r}, expected a size such as 500MB", ctx, param)
    return nbytes if text else None


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@MODEL
@click.option("--host", default="127.0.0.1", help="any but this machine's own needs --token")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="0 is any that is free")
@click.option("--token", envvar="D2C_MLX_TOKEN", help="the clients' API key  [env: D2C_MLX_TOKEN]")
@click.option("--allow-origin", "origins", multiple=True, help="web page that may ask")
@click.option("--allowed-host", "hosts", multiple=True, help="name to ask by, beside --host")
@click.option("--batch", type=click.IntRange(1), default=16, help="requests at a time")
@click.option("--queue", type=click.IntRange(0), default=64, help="requests that wait")
@click.option(
    "--adapter-memory",
    "adapter_nbytes",
    callback=_bytes,
    help="most memory of adapters, such as 500MB  [default: half of MLX's]",
)
@click.option(
    "--prefix-memory",
    "prefix_nbytes",
    callback=_bytes,
    default="500MB",
    help="most of shared beginnings of prompts",
)
@click.option(
    "--adapter-dir",
    "directory",
    type=UserPath(path_type=Path, exists=True, file_okay=False),
    help="let clients load adapters from here and unload any; needs --token",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=2048, help="most that a request may ask for"
)
@click.option(
    "--log-file", type=UserPath(path_type=Path), help="a line of JSON per request, without its text"
)
def serve(
    pack: Path,
    model: str | None,
    host: str,
    port: int,
    token: str | None,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    directory: Path | None,
    log_file: Path | None,
    **limits: Any,  # noqa: ANN401  click's
) -> None:
    """Serve a pack behind OpenAI's API.

    Chat and text completions, streaming or not. The field `model` of a request names a task of
    PACK; the base model's own name asks the base, `auto` lets the pack's router choose (d2c-mlx
    route PACK --tasks DIR fits one). Requests of all tasks run in one batch. /v1/models lists the
    names, /health says how it is. / is a chat page for browsers.

    Examples:
      d2c-mlx serve runs/first/pack
      d2c-mlx serve runs/first/pack --model org/base --host 0.0.0.0 --token SECRET
    """
    from d2c_mlx.models.model import Model
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.serve.router import load_router
    from d2c_mlx.serve.scheduler import Limits
    from d2c_mlx.serve.service import PackService
    from d2c_mlx.web.server import LOOPBACK, PackServer

    if not token and host not in (*LOOPBACK, "::1"):
        raise click.UsageError(f"--host {host[:80]} lets other machines in; give --token")
    if not token and directory:
        raise click.UsageError("--adapter-dir lets clients change what others get; give --token")
    source = load_pack(pack)
    base = Model(str(source.base_directory(model)))
    # Whoever lets other machines in asks for a token, which pages of strangers do not have.
    names = ["*"] if host in ("0.0.0.0", "::") and not hosts else [*LOOPBACK, host, *hosts]
    log = log_file.open("a", encoding="utf-8") if log_file else None
    service = PackService(source, base, load_router(source), Limits(**limits), directory)
    try:
        server = PackServer((host, port), service, token or None, origins, names, log)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name of a host"
        raise click.ClickException(f"--host {host[:80]} --port {port}: {reason}") from None
    auto = " and auto" if service.router else ""
    sizes = [x / 1e6 for x in (service.adapters.nbytes, service.adapters.memory)]
    memory = "{:,.0f} of at most {:,.0f} MB of adapters in memory".format(*sizes)
    tasks = f"{len(source.tasks)} tasks{auto} of {source.path}"
    say(f"{server.url}: {tasks}, {memory}; stop with Ctrl-C")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    say("stopped")
