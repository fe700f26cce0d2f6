"""Runs the stages that a command asks for, and prints the result.

The library is imported late, as in all of `cli`.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .say import minutes, say, say_json

if TYPE_CHECKING:
    from d2c_mlx.run.config import RunConfig
    from d2c_mlx.run.directory import RunDirectory

__all__ = ["execute", "log_to"]

# The file that `--json` prints after a stage.
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


def execute(
    until: str,
    config: Path | None,
    quiet: bool,
    as_json: bool,
    dry_run: bool = False,
    **options: Any,  # noqa: ANN401
) -> None:
    """Run the stages that a command asks for, or foretell them, and print what came of it."""
    if _worked_for_rank_0():
        return
    checked = _checked(until, config, options)
    if dry_run:
        _foretell(checked, until, as_json)
        return

    from d2c_mlx.run.config import stages_of
    from d2c_mlx.run.directory import RunDirectory

    directory = RunDirectory(Path(checked.output))
    # The pipeline checks this too, but takes seconds to import.
    if directory.is_finished(checked, stages_of(checked, until)):
        copied = directory.copied
    else:
        from d2c_mlx.pipeline import run as run_pipeline

        copied = run_pipeline(checked, until, quiet).copies
    if until == "plan" and copied:
        until = "merge"
    artifact = _ARTIFACTS[until]
    if not checked.has_rows:
        artifact = artifact.replace("bench.json", "weights.json")
    _show(directory, until, as_json, artifact)


def _worked_for_rank_0() -> bool:
    """True if `mlx.launch` made this another rank than 0, which then evaluated for rank 0."""
    from d2c_mlx.utils.environment import RANK_VARIABLES

    if not any(name in os.environ for name in RANK_VARIABLES):
        return False
    from d2c_mlx.evaluate.distributed import launched_group, run_worker

    group = launched_group()
    if not group or group.rank() == 0:
        return False
    run_worker(group)
    return True


def _checked(until: str, config: Path | None, options: dict[str, Any]) -> RunConfig:
    """The options: those given here, then those of the file or else of the run directory."""
    from d2c_mlx.run.config_file import load_config
    from d2c_mlx.utils.errors import ConfigError

    given = {name: value for name, value in options.items() if value is not None}
    if until == "refine":
        given["refine"] = True
    if until == "plan":
        given["plan"] = "auto"
    if config and config.is_dir():
        raise ConfigError(_not_a_file(config, "adapters" in given))
    saved = Path(given.get("output", "")) / "config.yaml"
    resumed = config is None and "output" in given and "adapters" not in given
    if resumed and not saved.is_file():
        raise ConfigError(
            f"output: {saved.parent}: no run is there (config.yaml missing); give the directory of"
            " an earlier run, or CONFIG or --adapters to start one"
        )
    if resumed:
        config = saved

    merged = until in ("cluster", "merge")
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
    return checked


def _not_a_file(config: Path, has_adapters: bool) -> str:
    """The error of a CONFIG that is a directory."""
    instead = f"adapters are --adapters {config}"
    if has_adapters:
        instead = (f"a pattern such as --adapters {config.parent}/* is many words: give the"
                   f" folder, --adapters {config.parent}")  # fmt: skip
    elif (config / "config.yaml").is_file():
        instead = f"a run goes on with --output {config}"
    return f"{config}: a directory, expected a YAML file of options; {instead}"


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
        if stage == "refine" and (output / "pack").exists():
            say(f"{output / 'pack'} is as before; d2c-mlx run --output {shlex.quote(str(output))}"
                " packs what was refined")  # fmt: skip


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


def _show_next(output: Path, bench: dict[str, Any]) -> None:
    from d2c_mlx.report.words import next_commands

    compact = not any((output / "pack").glob("cluster-*"))
    say("\nNext:")
    for line in next_commands(str(output), bench, compact):
        say(f"  {line}")
    for name in ("pack", "report.html"):
        say(f"{name:<12} {output / name}")


def log_to(path: str) -> None:
    """Append to a file what happens, with times."""
    import logging

    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("d2c_mlx")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
