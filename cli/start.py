"""The commands of a first run: look at the machine and at adapters."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from .help import JSON, PATH, Command, Printed, UserPath


@click.command(cls=Command)
@click.argument("directory", metavar="DIR", type=UserPath(path_type=str))
@click.option("--tasks", type=PATH, help="folder of rows  [default: beside the adapters]")
@click.option(
    "--output", type=PATH, default="d2c-mlx.yaml", metavar="FILE", help="YAML file of options"
)
@JSON
def init(directory: str, tasks: Path | None, output: Path) -> Printed:
    """Look at a folder of adapters and write what a first run needs.

    Base model, ranks, modules and bytes of the adapters in DIR, what each budget would be in bytes
    and what is missing are told. Written are a commented YAML file and, for adapters without rows,
    empty files to fill. What is there already stays as it is.

    Example:
      d2c-mlx init loras
    """
    from d2c_mlx.run.survey import describe, scaffold, survey
    from d2c_mlx.utils.environment import program

    seen = survey(directory, tasks, output.parent / "tasks")
    written = [str(path) for path in scaffold(seen, output)]
    rows = [name for name in written if name.endswith(".jsonl")]
    lines = [describe(seen), *(f"wrote        {name}" for name in written if name not in rows)]
    if rows:
        lines.append(f"wrote        {len(rows)} empty files of rows in {seen.tasks}")
    if seen.without_rows:
        lines.append(f"next: fill the rows (see {seen.tasks / 'README.md'}); then")
    how = "# how long it takes; without --dry-run it does it"
    lines.append(f"{program()} run {output} --dry-run    {how}")
    if len(seen.without_rows) == len(seen.adapters):
        without = f"{program()} run --adapters {directory} --output runs/first"
        lines.append(f"no rows to be had? {without} goes by weights alone, and measures nothing")
    adapters = [dataclasses.asdict(adapter) for adapter in seen.adapters]
    return {"adapters": adapters, "budgets": seen.budgets, "written": written}, lines


@click.command(cls=Command)
@JSON
def doctor() -> tuple[Any, list[str], int]:
    """Show what this machine has and what is missing.

    With what to do about it; the exit code is 1 if something is missing.

    Example:
      d2c-mlx doctor --json
    """
    from d2c_mlx.run.doctor import diagnose

    findings = diagnose()
    lines = []
    for finding in findings:
        lines.append(f"{'ok ' if finding.ok else '!! '} {finding.name:<12} {finding.value}")
        if finding.advice:
            lines.append(f"    {'':<12} -> {finding.advice}")
    content = [{**finding._asdict(), "ok": finding.ok} for finding in findings]
    return content, lines, int(not all(finding.ok for finding in findings))
