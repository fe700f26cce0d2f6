"""The commands of a first run: look at adapters, write what a run needs, split rows."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .help import Command
from .paths import UserPath
from .say import say, say_json

_DIR = UserPath(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")


@click.command(cls=Command)
@click.argument("directory", metavar="DIR", type=UserPath(path_type=str))
@click.option("--tasks", type=_DIR, metavar="DIR", help="folder of rows  [default: the one beside"
              " the adapters that has them, or tasks]")  # fmt: skip
@click.option("--output", type=_DIR, default="d2c-mlx.yaml", show_default=True, metavar="FILE",
              help="the YAML file of options")  # fmt: skip
@_JSON
def init(directory: str, tasks: Path | None, output: Path, as_json: bool) -> None:
    """Look at a folder of adapters and write what a first run needs.

    Base model, ranks, modules and bytes of the adapters in DIR, what each budget would be in bytes
    and what is missing are told. Written are a commented YAML file and, for adapters without rows,
    empty files to fill. What is there already stays as it is.

    Example:
      d2c-mlx init loras
    """
    import dataclasses

    from d2c_mlx.run.survey import budgets, describe, scaffold, survey

    found = survey(directory, tasks)
    written = [str(path) for path in scaffold(found, output)]
    if as_json:
        row = {"adapters": [dataclasses.asdict(one) for one in found.found],
               "budgets": dict(budgets(found)), "written": written}  # fmt: skip
        say_json(row)
        return
    say(describe(found))
    rows = [name for name in written if name.endswith(".jsonl")]
    for name in [name for name in written if name not in rows]:
        say(f"wrote        {name}")
    if rows:
        say(f"wrote        {len(rows)} empty files of rows in {found.tasks}")
    if found.without_rows:
        say(f"next: fill the rows (see {found.tasks / 'README.md'}), or let the adapters answer"
            f" prompts: d2c-mlx tasks answer {output}; then")  # fmt: skip
    say(f"d2c-mlx run {output} --dry-run    # how long it takes; without --dry-run it does it")
    if len(found.without_rows) == len(found.found):
        say(f"no rows to be had? d2c-mlx run --adapters {directory} --output runs/first goes by"
            " weights alone, and measures nothing")  # fmt: skip


@click.group()
def tasks() -> None:
    """Make the rows of a task.

    Example:
      d2c-mlx tasks split data/valid.jsonl --output tasks/num-de
    """


@tasks.command("split", cls=Command)
@click.argument("file", type=_DIR)
@click.option("--output", required=True, type=_DIR, metavar="DIR", help="the task's folder, called"
              " like its adapter")  # fmt: skip
@click.option("--probe", type=click.IntRange(1), default=10, show_default=True, metavar="N",
              help="calibration rows")  # fmt: skip
@click.option("--test", type=click.IntRange(1), default=100, show_default=True, metavar="N",
              help="most held-out rows")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="of the shuffle")
@_JSON
def split(file: Path, output: Path, probe: int, test: int, seed: int, as_json: bool) -> None:
    """Split a file of rows into probe.jsonl and test.jsonl.

    FILE has rows in one of mlx-lm's formats. Take rows that the adapter was not trained on, where
    there are some: on its training rows it looks better than it is.

    Example:
      d2c-mlx tasks split data/valid.jsonl --output tasks/num-de --probe 10
    """
    from d2c_mlx.models.make_rows import split_rows

    rows = dict(zip(("probe", "test"), split_rows(file, output, probe, test, seed)))
    if as_json:
        say(json.dumps({"output": str(output), **rows}))
        return
    say(f"wrote {rows['probe']} calibration and {rows['test']} held-out rows to {output}")


@tasks.command("answer", cls=Command)
@click.argument("config", type=_DIR)
@click.option("--system", metavar="TEXT", help="system message before each prompt; \"\" is an empty"
              " one  [default: the chat template's own]")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, metavar="N",
              help="an answer that does not end by then is left out")  # fmt: skip
@_JSON
def answer(config: Path, system: str | None, max_tokens: int, as_json: bool) -> None:
    """Make rows of the adapters' own answers, where there are none.

    CONFIG is the YAML file that init writes. Write 20 or more prompts, one a line, to prompts.txt
    in an adapter's folder of rows; its answers become probe.jsonl and test.jsonl. Read them: a run
    then tells how far the pack is from the adapters, not from the truth.

    Example:
      d2c-mlx tasks answer d2c-mlx.yaml
    """
    import dataclasses

    from d2c_mlx.adapters.sources import find_adapters
    from d2c_mlx.models.base_model import BaseModel
    from d2c_mlx.models.make_rows import Asking, answer_tasks, read_prompts
    from d2c_mlx.run.config_file import load_config
    from d2c_mlx.utils.errors import ConfigError

    c = load_config(config, {})
    if not c.tasks:
        raise ConfigError(f"{config}: tasks: not given; name the folder that has the prompts")
    prompts = read_prompts(find_adapters(c.adapters), Path(c.tasks))
    asking = Asking(system, max_tokens, c.probe_examples, c.accept_dora)
    found = []
    for one in answer_tasks(BaseModel(c.model), prompts, Path(c.tasks), asking):
        found.append(dataclasses.asdict(one))
        if not as_json:
            left = f", {one.left_out} prompts left out" if one.left_out else ""
            say(f"{one.task}: {one.probe} calibration and {one.test} held-out rows{left};"
                f" the first: {one.prompt!r} -> {one.answer!r}")  # fmt: skip
    if as_json:
        say_json(found)
        return
    say(f"Read them in {c.tasks}, and remove wrong ones. Are most wrong? Many chat templates add a"
        " system message, which the adapters may not know: delete the files, and try --system"
        f' "".\nnext: d2c-mlx run {config}')  # fmt: skip
