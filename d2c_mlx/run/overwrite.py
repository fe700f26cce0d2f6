"""Checks before a run writes: it replaces nothing that it reads, and only what a run wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d2c_mlx.adapters.adapter import CONFIG
from d2c_mlx.adapters.sources import Source
from d2c_mlx.models.tasks import probe_file
from d2c_mlx.packs.overwrite import (
    MARKER,
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
        rows = [file for source in sources for file in (probe_file(tasks / source.name),
                tasks / source.name / "test.jsonl")]  # fmt: skip
        inputs += [("tasks", path) for path in (tasks, *rows)]
    inputs += local_model(config.model)
    replaced = replaced_inputs(inputs, [output / name for name in RUN_WRITES])
    problems = [line for _, line in replaced] + within_adapters(sources, output)
    refused = {target for target, _ in replaced}
    mine = [path for path in _of_the_user(config, output) if not refused & {path, *path.parents}]
    if mine:
        problems.append(
            f"output: a run in {output} would replace your {', '.join(map(str, mine))}, which no"
            " earlier run wrote; give another --output, or move what is yours"
        )
    if problems:
        raise ConfigError(problems)


def _of_the_user(config: RunConfig, output: Path) -> list[Path]:
    """Everything that a run would replace and that no run wrote; empty folders do not count."""
    written, paths = _written(output), dict[Path, None]()
    for name in RUN_WRITES:
        path = output / name
        if name not in (".lock", *written):
            if path.is_file() or any(all_files(path)):
                paths[path] = None
        elif name in _replaced_folders(config):
            for file in all_files(path):
                inside = file.relative_to(path).parts
                # Each refined merge is a directory with a marker of its own.
                marked = path / inside[0] if name == "refining" else path
                if not any(part.startswith(".") for part in inside) and not _is_ours(marked, file):
                    paths[path / inside[0]] = None
    return list(paths)


def _replaced_folders(config: RunConfig) -> set[str]:
    """Folders of a run directory that a run with these options writes anew."""
    folders = {"adapters", "answered", "planned" if config.budget.in_bytes else "merged"}
    # A plan with room for all adapters copies them to `merged`; how many MB they are is not known.
    if config.budget.percent is None or config.budget.percent >= 100:
        folders.add("merged")
    return folders | ({"refined", "refining"} if config.refine else set())


def _written(output: Path) -> set[str]:
    """Names that the marker of a run directory lists; empty where no run was at work."""
    marker = read_marker(output)
    return set(marker.files) if marker and marker.kind == "run" else set()


def _is_ours(directory: Path, file: Path) -> bool:
    """True if a run wrote a file of a marked folder, even a damaged one: the run repairs it.

    A readable config that differs from the written one belongs to another adapter, which the user
    put in the place of the run's.
    """
    marker, config = read_marker(directory), file.parent / CONFIG
    if marker is None or marker.kind != "run":
        return False
    listed = file.relative_to(directory).as_posix() in marker.files
    return listed and (json_or_none(config) is None or marker.wrote(directory, config))
