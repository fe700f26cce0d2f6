"""`d2c-mlx help`: the help of a command, or a page on what belongs to no single one."""

from __future__ import annotations

import click

from .help import Command

TOPICS = {
    "environment": """\
D2C_MLX_CACHE      folder of converted models, losses and what compose trained
                   [~/.cache/d2c-mlx]
D2C_MLX_DEBUG      1: show the traceback of an error that nobody expected
D2C_MLX_DEVICE     cpu: compute on the CPU, in float32
D2C_MLX_BLAS       off, or the path of a BLAS to load before MLX (Linux)
D2C_MLX_TOKEN      the API key of d2c-mlx serve
MLX_ENABLE_TF32    1: let GPUs round float32 products  [0]
HF_HUB_OFFLINE     1: take what is downloaded, ask no network
HF_HOME            folder of the Hugging Face hub's downloads
NO_COLOR           any value: no colours
_D2C_MLX_COMPLETE  bash_source, zsh_source or fish_source: print the completion script
The network is used only for a hub id that you name, by push, and between ranks.""",
    "exit-codes": """\
0    done
1    failed: a full disk, a directory in use, something missing on this machine
2    bad input: options, files, adapters; each problem is a line, nothing was written
130  interrupted; the same command goes on where it stopped
Results go to standard output (--json: as JSON), all else to standard error; -q shows no
progress, --log-file FILE keeps it with times.""",
    "completion": """\
bash  eval "$(_D2C_MLX_COMPLETE=bash_source d2c-mlx)"           in ~/.bashrc
zsh   eval "$(_D2C_MLX_COMPLETE=zsh_source d2c-mlx)"            in ~/.zshrc
fish  _D2C_MLX_COMPLETE=fish_source d2c-mlx > ~/.config/fish/completions/d2c-mlx.fish""",
    "rows": """\
tasks/NAME/probe.jsonl  about 10 calibration rows, which decide; or mlx-lm's valid.jsonl
tasks/NAME/test.jsonl   30 to 100 held-out rows, which judge; no prompt may be in both
A row: {"prompt": ..., "completion": ...}, {"messages": [...]} or {"text": ...}
A file of rows: d2c-mlx tasks split FILE --output tasks/NAME makes both.
Only prompts: write 20 or more to tasks/NAME/prompts.txt, one a line, then d2c-mlx tasks
answer d2c-mlx.yaml makes the adapters' answers the rows. Read them, remove wrong ones.""",
}


@click.command("help", cls=Command)
@click.argument("topic", required=False)
@click.pass_context
def help_(ctx: click.Context, topic: str | None) -> None:
    """Show the help of a command, or of a topic.

    Topics: environment, exit-codes, completion, rows.

    Example:
      d2c-mlx help environment
    """
    parent = ctx.parent
    if parent is None or topic is None:
        click.echo(parent.get_help() if parent else ctx.get_help())
        return
    if topic in TOPICS:
        click.echo(TOPICS[topic])
        return
    group = parent.command
    command = group.get_command(parent, topic) if isinstance(group, click.Group) else None
    if command is None:
        raise click.UsageError(f"{topic}: no command and no topic; topics: {', '.join(TOPICS)}")
    with click.Context(command, info_name=topic, parent=parent) as of:
        click.echo(command.get_help(of))
