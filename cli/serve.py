"""The commands that answer with a pack: one prompt, or an API."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .help import JSON, MODEL, Command, PackPath, UserPath
from .say import say, say_json

if TYPE_CHECKING:
    from d2c_mlx.web.server import PackServer


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("prompt")
@click.option("--task", required=True, metavar="T", help="task of PACK whose adapter answers")
@MODEL
@click.option("--system", metavar="TEXT", help="system message  [default: as in the task's rows]")
@click.option("--max-tokens", type=click.IntRange(1), default=256)
@click.option("-q", "--quiet", is_flag=True, help="only the answer")
@JSON
def generate(
    pack: Path,
    prompt: str,
    model: str | None,
    quiet: bool,
    as_json: bool,
    **asked: Any,  # noqa: ANN401  click's
) -> None:
    """Answer a prompt with the adapter of a task.

    The answer goes to standard output, the model's path and the command of stock mlx-lm that
    answers the same go to standard error.

    Example:
      d2c-mlx generate runs/first --task num-de "Write this number in German words: 896"
    """
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.serve.load import answer, stock_command

    source = load_pack(pack)
    directory = str(source.base_directory(model))
    pieces = answer(source, prompt=prompt, model=directory, **asked)
    if as_json:
        say_json({"task": asked["task"], "model": directory, "answer": "".join(pieces)})
        return
    first = next(pieces, "")
    if not quiet:
        stock = stock_command(source, prompt=prompt, directory=directory, **asked)
        say(f"model: {directory}\n{stock}", err=True)
    say(first, nl=False)
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
    help="further adapters, which clients may load",
)
@click.option(
    "--allow-changes",
    is_flag=True,
    help="let clients load and unload adapters and reload the pack; needs --token",
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
    allow_changes: bool,
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
    from d2c_mlx.utils.environment import require_extra

    require_extra("serve", "serve")
    from d2c_mlx.models.model import Model
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.serve.router import load_router
    from d2c_mlx.serve.service import Limits, PackService
    from d2c_mlx.web.server import LOOPBACK, Access, PackServer

    problems = {
        f"--host {host[:80]} lets other machines in; give --token": (
            not token and host not in (*LOOPBACK, "::1")
        ),
        "--allow-changes lets clients change what others get; give --token": (
            allow_changes and not token
        ),
        "--adapter-dir: clients load from it with --allow-changes; give both": (
            directory and not allow_changes
        ),
    }
    if texts := [text for text, is_so in problems.items() if is_so]:
        raise click.UsageError("; ".join(texts))
    source = load_pack(pack)
    base = Model(str(source.base_directory(model)))
    # Whoever lets other machines in asks for a token, which pages of strangers do not have.
    names = ["*"] if host in ("0.0.0.0", "::") and not hosts else [*LOOPBACK, host, *hosts]
    access = Access(token or None, origins, names, allow_changes)
    log = log_file.open("a", encoding="utf-8") if log_file else None
    service = PackService(source, base, load_router(source), Limits(**limits), directory)
    try:
        server = PackServer((host, port), service, access, log)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no name of a host"
        raise click.ClickException(f"--host {host[:80]} --port {port}: {reason}") from None
    _run(server)


def _run(server: PackServer) -> None:
    """Say what is served, and serve it until Ctrl-C or SIGTERM; a second one ends the process."""
    service, adapters = server.service, server.service.adapters
    auto = " and auto" if service.router else ""
    memory = f"{adapters.model.nbytes / 1e6:,.0f} MB of adapters in memory"
    if not adapters.model.nbytes:
        memory = f"adapters are loaded at first use, into {adapters.memory / 1e6:,.0f} MB"
    tasks = f"{len(service.pack.tasks)} tasks{auto} of {service.pack.path}"
    say(f"{server.url}: {tasks}, {memory}; stop with Ctrl-C")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    say("stopped")
