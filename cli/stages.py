"""The commands of a run and its stages. They import the library late, so that --help is instant."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .help import Command
from .options import RUN_OPTIONS
from .paths import UserPath
from .say import say, say_json

if TYPE_CHECKING:
    from d2c_mlx.run.config import RunConfig
    from d2c_mlx.run.directory import RunDirectory

_JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
_DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="say what would be done and how long it takes, and stop"
)
_QUIET = click.option("-q", "--quiet", is_flag=True, help="no progress")
_LOG = click.option("--log-file", type=UserPath(path_type=str), metavar="FILE", help="append what"
                    " happens to it, with times")  # fmt: skip
_CONFIG = click.argument("config", required=False, type=UserPath(path_type=Path))
_INPUTS = "Adapters and tasks"
# Groups of options that the help of a stage shows; it takes the others, too.
_GROUPS = {
    "probe": (_INPUTS, "Evaluation"),
    "plan": (_INPUTS, "Budget", "Evaluation"),
    "cluster": (_INPUTS, "Budget", "Search", "Merge"),
    "merge": (_INPUTS, "Merge"),
    "refine": (_INPUTS, "Refine"),
    "pack": (_INPUTS, "Budget"),
    "bench": (_INPUTS, "Evaluation"),
    "report": (_INPUTS,),
}
_RESUMES = (
    "All other options of d2c-mlx run are taken, too."
    " Stages before it that are not done run first. With --output, and neither CONFIG nor"
    " --adapters, options that are not given are those of that run directory."
)


def _execute(
    until: str,
    config: Path | None,
    quiet: bool,
    as_json: bool,
    dry_run: bool = False,
    **options: Any,  # noqa: ANN401
) -> None:
    """Load the config (the run directory's own if no file is given), run and print.

    Under `mlx.launch`, ranks other than 0 work for rank 0 instead; they read only the base model.
    """
    from d2c_mlx.run.config_file import load_config
    from d2c_mlx.utils.environment import RANK_VARIABLES
    from d2c_mlx.utils.errors import ConfigError

    if any(name in os.environ for name in RANK_VARIABLES):
        from d2c_mlx.evaluate.distributed import launched_group, run_worker

        group = launched_group()
        if group and group.rank() > 0:
            run_worker(group)
            return
    given = {name: value for name, value in options.items() if value is not None}
    if until == "refine":
        given["refine"] = True
    if until == "plan":
        given["plan"] = "auto"
    if config and config.is_dir():
        instead = f"adapters are --adapters {config}"
        if "adapters" in given:
            instead = (f"a pattern such as --adapters {config.parent}/* is many words: give the"
                       f" folder, --adapters {config.parent}")  # fmt: skip
        elif (config / "config.yaml").is_file():
            instead = f"a run goes on with --output {config}"
        raise ConfigError(f"{config}: a directory, expected a YAML file of options; {instead}")
    saved = Path(given.get("output", "")) / "config.yaml"
    resumed = config is None and "output" in given and "adapters" not in given
    if resumed and saved.is_file():
        config = saved

    merged = until in ("cluster", "merge", "refine")
    checked = load_config(config, given, saved=resumed, merged=merged)
    if until == "probe" and not checked.has_rows:
        raise ConfigError(
            "tasks: not given, and d2c-mlx probe measures on rows: pass --tasks DIR, or prompts as"
            " --unlabelled FILE"
        )
    if until == "plan" and not checked.planned:
        raise ConfigError(
            f"budget: found {checked.budget!r} adapters, expected bytes, such as 12.5% or 40MB, to"
            " plan for; pass the number as --max-adapters"
        )

    if dry_run:
        _foretell(checked, until, as_json)
        return

    from d2c_mlx.run.config import stages_of
    from d2c_mlx.run.directory import RunDirectory

    directory = RunDirectory(Path(checked.output))
    # The pipeline checks this too, but takes seconds to import.
    if not directory.is_finished(checked, stages_of(checked, until)):
        from d2c_mlx.pipeline import run as run_pipeline

        session = run_pipeline(checked, until, quiet)
        if until == "plan" and not session.config.planned:
            until = "merge"  # all adapters fit, and were copied
    artifact = _ARTIFACTS[until]
    if not checked.has_rows:
        artifact = artifact.replace("bench.json", "weights.json")
    _show(directory, until, as_json, artifact)


def _log_to(path: str) -> None:
    import logging

    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("d2c_mlx")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


_ARTIFACTS = {
    "probe": "losses.json",
    "plan": "plan.json",
    "cluster": "clusters.json",
    "merge": "merges.json",
    "refine": "refines.json",
    "pack": "pack/manifest.json",
    "bench": "bench.json",
    "report": "bench.json",
}


def _show(directory: RunDirectory, stage: str, as_json: bool, artifact: str) -> None:
    from d2c_mlx.report.report import render_table
    from d2c_mlx.report.words import answered, verdict

    content, output = directory.read(artifact), directory.root
    if as_json:
        say_json(content)
    elif stage in ("bench", "report"):
        said = f"{verdict(content)} {answered(content)}"
        say(f"{render_table(content)}\n\n{said.rstrip()}")
        if stage == "report":
            _show_next(output, content)
    else:
        say(f"wrote {output / artifact}")


def _foretell(config: RunConfig, until: str, as_json: bool) -> None:
    from dataclasses import asdict

    from d2c_mlx.forecast import forecast

    found = forecast(config, until)
    if as_json:
        say_json({**asdict(found), "seconds": round(found.seconds)})
        return
    for one in found.stages:
        what = "done" if one.done else f"{one.tokens:>12,} tokens {minutes(one.seconds):>10}"
        say(f"{one.name:<8} {what}")
    pack = f"{found.adapters} adapters" if found.adapters else "adapters as the plan chooses"
    work = "No rows, so nothing is measured, which takes seconds" if not config.has_rows else (
        f"About {found.evaluations:,} evaluations, {minutes(found.seconds)} at"
        f" {found.tokens_per_second:,.0f} tokens/s here")  # fmt: skip
    say(
        f"{work}; the pack: {pack}, at most"
        f" {found.nbytes / 1e6:,.2f} MB in {config.output}. Nothing was written."
    )


def minutes(seconds: float) -> str:
    """A time for people: seconds up to 90, then minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _show_next(output: Path, bench: dict[str, Any]) -> None:
    from d2c_mlx.report.words import next_commands

    compact = not any((output / "pack").glob("cluster-*"))
    say("\nNext:")
    for line in next_commands(str(output), bench, compact):
        say(f"  {line}")
    for name in ("pack", "report.html"):
        say(f"{name:<12} {output / name}")


def _stage(about: Callable[[], None]) -> click.Command:
    """Make the command of a stage from a function without a body, by its name and docstring.

    The command takes the options of RunConfig, and an optional YAML file that they override.
    """
    name = about.__name__

    def command(
        config: Path | None,
        quiet: bool,
        as_json: bool,
        log_file: str | None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        if log_file:
            _log_to(log_file)
        _execute("report" if name == "run" else name, config, quiet, as_json, **options)

    for option in reversed((_CONFIG, *RUN_OPTIONS, _DRY_RUN, _QUIET, _LOG, _JSON)):
        command = option(command)
    epilog = None if name == "run" else _RESUMES
    made = click.command(name, cls=Command, help=about.__doc__, epilog=epilog)(command)
    if isinstance(made, Command):
        made.shown = _GROUPS.get(name)
    return made


@_stage
def run() -> None:
    """Convert, probe, cluster, merge, pack, bench and report in one go.

    CONFIG is a YAML file of options; an option on the command line goes before it.

    Examples:
      d2c-mlx run --adapters loras --tasks tasks --budget 25% --output runs/first
      d2c-mlx run config.yaml --budget 20MB
      d2c-mlx run --output runs/first          # continue, or repeat what changed
    """


@_stage
def probe() -> None:
    """Measure every adapter on the tasks' calibration rows.

    The losses go to losses.json.

    Example:
      d2c-mlx probe --adapters loras --tasks tasks --output runs/first
    """


@_stage
def plan() -> None:
    """Choose what to store for a budget in bytes.

    Clusters, rank and bits are chosen by measuring, into plan.json. From then on the options of the
    run directory include --plan auto.

    Example:
      d2c-mlx plan --output runs/first --budget 3%
    """


@_stage
def cluster() -> None:
    """Choose which adapters to merge.

    The clusters of D2C and of the baselines go to clusters.json. A budget in bytes is not planned
    then, but merged: from then on the options of the run directory include --plan d2c.

    Example:
      d2c-mlx cluster --output runs/first --budget 4 --json
    """


@_stage
def merge() -> None:
    """Merge each cluster into one adapter.

    The adapters go to merged/<k>/.

    Example:
      d2c-mlx merge --output runs/first --merge-method ties
    """


@_stage
def refine() -> None:
    """Train each merge to match its members.

    The adapters go to refined/<k>/. From then on the options of the run directory include --refine.

    Example:
      d2c-mlx refine --output runs/first --refine-steps 50
    """


@_stage
def pack() -> None:
    """Write what ships: adapters and a manifest.

    They go to pack/.

    Example:
      d2c-mlx pack --output runs/first --json
    """


@_stage
def bench() -> None:
    """Measure every method on held-out rows.

    The losses go to bench.json; without rows the errors of dW go to weights.json.

    A pack as on a phone is measured by d2c-mlx phone PACK.

    Example:
      d2c-mlx bench --output runs/first --test-examples 0
    """


@_stage
def report() -> None:
    """Write the results for people.

    They go to report.md and report.html.

    Example:
      d2c-mlx report --output runs/first
    """
