"""The command `run`: its options, each with its help, and what it prints.

Defaults and ranges are in `d2c_mlx/run/config.py`; a default in click would override the YAML file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .help import Command, UserPath
from .say import minutes, say

if TYPE_CHECKING:
    from d2c_mlx.run.config import RunConfig

RUN_OPTIONS = (
    click.option(
        "--adapters",
        metavar="A",
        help="folder with one subdirectory per adapter (PEFT, MLX or GGUF), or a list with commas:"
        " directories, .gguf files, Hugging Face ids owner/name[@revision]",
    ),
    click.option(
        "--tasks",
        help="folder with <adapter>/probe.jsonl and <adapter>/test.jsonl; a row without an answer"
        " is a prompt that its adapter answers  [default: none, so weights alone decide]",
    ),
    click.option(
        "--model",
        metavar="M",
        help="base model: mlx-lm directory, Hugging Face id or .gguf file  [default: the embedded"
        " SmolLM2-135M-Instruct]",
    ),
    click.option("--output", help="run directory; the same command continues there"),
    click.option(
        "--skip-bad/--no-skip-bad",
        default=None,
        help="leave out adapters that cannot be read or have no rows, and list them  [default: no]",
    ),
    click.option(
        "--accept-dora",
        type=int,
        metavar="RANK",
        help="take DoRAs in as the closest LoRAs of this rank  [default: refuse them]",
    ),
    click.option(
        "--budget",
        metavar="B",
        help='bytes ("12.5%", "40MB"), for which rank and bits of every adapter are planned; or a'
        ' number of adapters ("5"), which are merged  [default: 12.5%]',
    ),
    click.option(
        "--format",
        metavar="NAME",
        help="files of a planned pack: compact, one for all adapters; gguf, one for each, which"
        " llama.cpp reads as it is  [default: compact]",
    ),
    click.option(
        "--merge-method",
        metavar="NAME",
        help="linear, ties, tsv, regmean, regmean++, layerwise, or that of a plug-in  [default:"
        " layerwise, or regmean++ where a model cannot be run by blocks; without rows tsv]",
    ),
    click.option("--merge-rank", type=int, help="largest rank of a merge  [default: the inputs']"),
    click.option(
        "--refine/--no-refine",
        default=None,
        help="train every merge, or low-bit adapter, for a while to predict what its members"
        " predict  [default: no]",
    ),
    click.option(
        "--search",
        metavar="NAME",
        help="estimates: measure the partitions that are estimated to be best; paper: the plain"
        " loop of D2C  [default: estimates]",
    ),
    click.option(
        "--clusters",
        help="merge these clusters in place of D2C's: clusters.json of a run, or a JSON list of"
        " lists of adapters",
    ),
    click.option("--seed", type=int, help="of all random choices  [default: 0]"),
    click.option("--probe-examples", type=int, help="calibration rows per task  [default: 10]"),
    click.option(
        "--test-examples", type=int, help="held-out rows per task; 0 is all  [default: 100]"
    ),
    click.option(
        "--baselines",
        metavar="LIST",
        help="partitions that bench merges too: merge-all, random, kmeans  [default: none]",
    ),
)


@click.command(cls=Command)
@click.argument("config", required=False, type=UserPath(path_type=Path))
@click.option(
    "--until",
    default="report",
    metavar="STAGE",
    help="the last stage: convert, answer, probe, plan, cluster, merge, refine, pack, bench or"
    " report",
)
@click.option(
    "--dry-run", is_flag=True, help="say what would be done and how long it takes, and stop"
)
def run(config: Path | None, until: str, dry_run: bool, **options: Any) -> None:  # noqa: ANN401
    """Convert, probe, cluster, merge, pack, bench and report in one go.

    CONFIG is a YAML file of options; an option on the command line overrides it. With --output, and
    neither CONFIG nor --adapters, options that are not given are those of that run directory.

    Examples:
      d2c-mlx run --adapters loras --tasks tasks --budget 25% --output runs/first
      d2c-mlx run config.yaml --budget 20MB
      d2c-mlx run --output runs/first          # continue, or repeat what changed
      d2c-mlx run --output runs/first --budget 4 --until cluster
    """
    from d2c_mlx.utils.environment import RANK_VARIABLES

    if any(name in os.environ for name in RANK_VARIABLES):
        from d2c_mlx.evaluate.distributed import launched_group, run_worker

        if (group := launched_group()) and group.rank():
            run_worker(group)
            return
    checked = _read_options(config, {k: v for k, v in options.items() if v is not None})
    if dry_run:
        from d2c_mlx.forecast import forecast

        expected = forecast(checked, until)
        for name, n in expected.stages.items():
            seconds = n / expected.tokens_per_second if n else 0
            say(f"{name:<8} {'done' if n is None else f'{n:>12,} tokens {minutes(seconds):>10}'}")
        n = expected.adapters
        pack = f"{n} adapters" if n else "adapters as the plan chooses"
        speed = f"{expected.tokens_per_second:,.0f} tokens/s"
        work = f"About {minutes(expected.seconds)} at {speed} here"
        if not checked.tasks:
            work = "No rows, so nothing is measured, which takes seconds"
        megabytes = f"at most {expected.nbytes / 1e6:,.2f} MB in {checked.output}"
        say(f"{work}; the pack: {pack}, {megabytes}. Nothing was written.")
        return
    from d2c_mlx.run.run import Run

    finished = Run(checked)
    # The pipeline asks this too, but takes seconds to import.
    if not finished.finished(until):
        from d2c_mlx.pipeline import run as run_pipeline

        run_pipeline(checked, until, quiet=not sys.stderr.isatty())
    if until not in ("bench", "report"):
        say(f"{finished.output}: done until {until}")
        return
    from d2c_mlx.report.report import answered, next_commands, questions, render_table, verdict

    bench = finished.read("bench.json" if checked.tasks else "weights.json")
    task = next(iter(bench["methods"]["pack"]["tasks"]))
    compact = not any((finished.output / "pack").glob("cluster-*"))
    say(f"{render_table(bench)}\n\n{verdict(bench)} {answered(bench)}".rstrip())
    for number, line in enumerate(questions(bench)):
        say(line if number else f"\n{line}")
    say("\nNext:")
    for line in next_commands(str(finished.output), task, checked.model, compact):
        say(f"  {line}")
    for name in ("pack", "report.html"):
        say(f"{name:<12} {finished.output / name}")


for _option in RUN_OPTIONS:
    _option(run)


def _read_options(config: Path | None, given: dict[str, Any]) -> RunConfig:
    """The options given here over those of the file, or else of the run directory."""
    from d2c_mlx.run.config import load_config
    from d2c_mlx.utils.errors import ConfigError

    if config and config.is_dir():
        raise ConfigError(
            f"{config}: a directory, expected a YAML file of options; a folder of adapters is"
            " --adapters FOLDER, an earlier run --output DIR"
        )
    if not config and "output" in given and "adapters" not in given:
        config = Path(given["output"]).expanduser() / "config.yaml"
        if not config.is_file():
            raise ConfigError(
                f"output: {config.parent}: no run is there (config.yaml missing); give the"
                " directory of an earlier run, or CONFIG or --adapters to start one"
            )
    return load_config(config, given)
