"""Checks before a run writes: it replaces nothing that it reads, and only what a run wrote."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from d2c_mlx.adapters.adapter import CONFIG
from d2c_mlx.adapters.sources import Source
from d2c_mlx.models.tasks import probe_file
from d2c_mlx.packs.overwrite import (
    MARKER,
    Marker,
    adapter_inputs,
    all_files,
    local_model,
    read_marker,
    replaced_inputs,
    within_adapters,
    write_marker,
)
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.parsing import json_or_none

__all__ = ["RUN_WRITES", "check_run", "mark_run"]

# The names that a run may replace in its directory; a test compares them with a run.
RUN_WRITES = (
    "adapters", "answered", "planned", "merged", "refined", "refining", "pack", ".stages", ".lock",
    MARKER, "config.yaml", "losses.json", "plan.json", "clusters.json", "merges.json",
    "refines.json", "bench.json", "weights.json", "report.md", "report.html",
)  # fmt: skip


def mark_run(output: Path) -> None:
    """Mark a directory as a run's, once `check_run` found nothing of the user's in it.

    Call it before the run writes anything else, so that a run that is killed early can continue.
    """
    if _written(output) != set(RUN_WRITES):
        write_marker(output, "run", dict.fromkeys(RUN_WRITES))


def check_run(config: RunConfig, sources: Sequence[Source]) -> None:
    """Check that a run replaces only what an earlier run wrote; call it before anything is written.

    Args:
        config: options of the run.
        sources: the adapters that its `adapters` names.

    Raises:
        ConfigError: the run would replace an input, or files that no earlier run wrote, or its
            directory would be taken for one of its adapters.
    """
    output, inputs = Path(config.output), adapter_inputs(sources)
    if config.tasks:
        tasks = Path(config.tasks)
        rows = [file for one in sources for file in (probe_file(tasks / one.name),
                tasks / one.name / "test.jsonl")]  # fmt: skip
        inputs += [("tasks", path) for path in (tasks, *rows)]
    inputs += local_model(config.model)
    replaced = replaced_inputs(inputs, [output / name for name in RUN_WRITES])
    problems = [line for _, line in replaced] + within_adapters(sources, output)
    problems += _of_the_user(config, output, [target for target, _ in replaced])
    if problems:
        raise ConfigError(problems)


def _of_the_user(config: RunConfig, output: Path, known: Collection[Path]) -> list[str]:
    """A line about everything that would be replaced and that no run wrote.

    Args:
        config: options of the run.
        output: its directory.
        known: paths that are refused already.
    """
    written = _written(output)
    found = [
        output / name for name in RUN_WRITES
        if name not in (".lock", *written) and _holds(output / name)
    ]  # fmt: skip
    folders = {"adapters", "planned" if config.budget.in_bytes else "merged"}
    # A plan with room for all adapters copies them to `merged`; how many MB they are is not known.
    percent = config.budget.percent
    if percent is None or percent >= 100:
        folders.add("merged")
    if config.refine:
        folders |= {"refined", "refining"}
    for folder in written & folders:
        found += _added(output / folder)
    found.sort(key=lambda path: RUN_WRITES.index(path.relative_to(output).parts[0]))
    mine = [str(path) for path in found if not set(known) & {path, *path.parents}]
    if not mine:
        return []
    return [
        f"output: a run in {output} would replace your {', '.join(mine)}, which no earlier run"
        " wrote; give another --output, or move what is yours"
    ]


def _holds(path: Path) -> bool:
    """True if something would be lost with a path; empty folders do not count."""
    return path.is_file() or any(all_files(path))


def _written(output: Path) -> set[str]:
    """Names that the marker of a run directory lists; empty where no run was at work."""
    marker = read_marker(output)
    return set(marker.files) if marker and marker.kind == "run" else set()


def _added(folder: Path) -> list[Path]:
    """Entries of a run's folder that hold something the run did not write."""
    found: dict[Path, None] = {}
    for path in all_files(folder):
        inside = path.relative_to(folder).parts
        if any(part.startswith(".") for part in inside):
            continue
        entry = folder / inside[0]
        # Each refined merge is a directory with a marker of its own.
        marked = entry if folder.name == "refining" else folder
        marker = read_marker(marked)
        if marker is None or marker.kind != "run" or not _run_wrote(marker, marked, path):
            found[entry] = None
    return list(found)


def _run_wrote(marker: Marker, directory: Path, path: Path) -> bool:
    """True if a file belongs to an adapter of the run, even a damaged one: the run repairs it.

    A readable config that differs from the written one belongs to another adapter, which the user
    put in the place of the run's.
    """
    config = path.parent / CONFIG
    listed = path.relative_to(directory).as_posix() in marker.files
    return listed and (json_or_none(config) is None or marker.wrote(directory, config))
