"""The command that answers a prompt with a pack."""

from __future__ import annotations

from pathlib import Path

import click

from .help import Command
from .paths import PackPath
from .say import say, say_json


@click.command(cls=Command)
@click.argument("pack", type=PackPath(path_type=Path))
@click.argument("prompt")
@click.option("--task", required=True, metavar="T", help="task of PACK whose adapter answers")
@click.option("--model", metavar="M", help="the pack's base model  [default: the embedded one, if"
              " it is that]")  # fmt: skip
@click.option("--system", metavar="TEXT", help="system message  [default: that of the task's rows,"
              " else the chat template's own]")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="only the answer")
@click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
def generate(
    pack: Path,
    prompt: str,
    task: str,
    model: str | None,
    system: str | None,
    max_tokens: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Answer a prompt with the adapter of a task.

    The answer goes to standard output, the model's path and the command of stock mlx-lm that
    answers the same go to standard error.

    Example:
      d2c-mlx generate runs/first --task num-de "Write this number in German words: 896"
    """
    from d2c_mlx.packs.pack import load_pack
    from d2c_mlx.serve.load import Question, answer, stock_command

    found = load_pack(pack)
    directory = str(found.base_directory(model))
    question = Question(task, prompt, system, max_tokens)
    pieces = answer(found, question, directory)
    if as_json:
        row = {"task": task, "model": directory, "answer": "".join(pieces)}
        say_json(row)
        return
    first = next(pieces, "")
    if not quiet:
        say(f"model: {directory}\n{stock_command(found, question, directory)}", err=True)
    say(first, nl=False)
    for piece in pieces:
        say(piece, nl=False)
    say("")
