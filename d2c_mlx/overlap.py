"""What a command reads must not lie where it writes, and what it replaces must be its own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from d2c_mlx.errors import ConfigError, InputError

if TYPE_CHECKING:
    from d2c_mlx.config import RunConfig
    from d2c_mlx.sources import Source

__all__ = ["RUN_WRITES", "check_output", "check_run", "local_model"]

# An option, and a path that it names.
Input = tuple[str, Path]

# What a run replaces in its directory; a test compares.
RUN_WRITES = (
    "adapters", "merged", "refined", "refining", "pack", ".stages", ".lock", "config.yaml",
    "losses.json", "plan.json", "clusters.json", "merges.json", "refines.json", "bench.json",
    "report.md", "report.html",
)  # fmt: skip
# Characters that are read of a file that a run may have written; it is far shorter.
_MOST_YAML = 20_000
# Files of adapters and packs in every layout, and what a Mac leaves in a folder.
_OURS = {
    "adapters.safetensors", "adapter_model.safetensors", "adapter_config.json", "tasks.json",
    "manifest.json", "compact.safetensors", "router.safetensors", ".DS_Store",
}  # fmt: skip


def local_model(spec: str | None) -> list[Input]:
    """The base model as an input, if `--model` names a directory or a file."""
    path = Path(os.path.expanduser(spec or ""))
    return [("model", path)] if spec and path.exists() else []


def check_run(config: RunConfig, sources: Sequence[Source]) -> None:
    """Look at all that a run reads before it writes anything.

    Args:
        config: of the run.
        sources: what its `adapters` name.

    Raises:
        ConfigError: the run would replace an input or a config.yaml that is not a run's, or be
            taken for one of its adapters.
    """
    output, tasks = Path(config.output), Path(config.tasks)
    rows = [tasks / one.name / f"{kind}.jsonl" for one in sources for kind in ("probe", "test")]
    inputs = _adapters(sources) + [("tasks", path) for path in (tasks, *rows)]
    if config.unlabelled:
        inputs.append(("unlabelled", Path(config.unlabelled)))
    inputs += local_model(config.model)
    problems = _replaced(inputs, [output / name for name in RUN_WRITES])
    problems += _among(sources, output) + _own_config(config, output)
    if problems:
        raise ConfigError(problems)


def check_output(
    output: Path,
    inputs: Sequence[Input],
    sources: Sequence[Source] = (),
    error: type[InputError] = ConfigError,
) -> None:
    """Look at a directory that is replaced as a whole.

    Args:
        output: the directory, which may not exist.
        inputs: what is read while it is written.
        sources: adapters that are read as well.
        error: raised for an input.

    Raises:
        InputError: an input lies there; it is a file, the working directory or one around that, or
            holds what is neither of an adapter nor of a pack.
    """
    problems = _replaced([*inputs, *_adapters(sources)], [output]) + _among(sources, output)
    if problems:
        raise error(problems)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file, expected a directory or a new name")
    if Path(os.path.realpath(output)) in (here := Path.cwd().resolve(), *here.parents):
        raise ConfigError(
            f"output: {output} is replaced as a whole, and you are in it; name another directory"
        )
    if foreign := _foreign(output):
        raise ConfigError(
            f"output: {output} is replaced as a whole, and {foreign} in it is of no adapter or"
            " pack; name another directory, or empty this one"
        )


def _adapters(sources: Sequence[Source]) -> list[Input]:
    """Folders first: one of them says more than the many adapters in it."""
    folders = dict.fromkeys(one.folder for one in sources if one.folder)
    return [("adapters", path) for path in (*folders, *(one.path for one in sources))]


def _identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of one directory: links, and capitals on a Mac."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino


def _around(path: Path) -> set[tuple[int, int]]:
    """Identities of a path and of all that it lies in; a link lies in two places."""
    ways = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    found = {_identity(one) for way in ways for one in (way, *way.parents)}
    return {identity for identity in found if identity}


def _replaced(inputs: Iterable[Input], targets: Iterable[Path]) -> list[str]:
    """A line for every target and option of which something lies in it."""
    places = {identity: path for path in targets if (identity := _identity(path))}
    found: dict[tuple[str, Path], Path] = {}
    for option, path in inputs:
        for identity in _around(path) & places.keys():
            found.setdefault((option, places[identity]), path)
    return [
        f"output: {target} is made anew, which would replace the {option} {path}; give another"
        " --output"
        for (option, target), path in found.items()
    ]


def _among(sources: Sequence[Source], output: Path) -> list[str]:
    """A folder of adapters would have one more, the output."""
    around = _around(output)
    folders = dict.fromkeys(one.folder for one in sources if one.folder)
    return [
        f"output: {output} is in the adapters' folder {folder}, where the next command would take"
        " it for an adapter; give another --output"
        for folder in folders
        if _identity(folder) in around
    ]


def _own_config(config: RunConfig, output: Path) -> list[str]:
    """A run keeps its options in config.yaml, where a user's own file may lie."""
    path = output / "config.yaml"
    if (output / ".stages").is_dir() or not path.exists():
        return []
    # A run that was killed early has no record of a stage yet, but has written every option.
    try:
        text = path.read_text(encoding="utf-8")[:_MOST_YAML]
        if config.to_dict().keys() <= yaml.safe_load(text).keys():
            return []
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        pass
    return [
        f"output: a run in {output} keeps its options in config.yaml, which would replace your"
        f" {path}; give another --output, or rename that file"
    ]


def _foreign(directory: Path) -> Path | None:
    """A file that no conversion, export or push wrote, if there is one."""
    # Only a push writes a README, beside the manifest.
    pushed = (directory / "manifest.json").is_file()
    for folder, _, names in os.walk(directory):
        for name in sorted(names):
            path = Path(folder) / name
            card = pushed and path.parent == directory and name == "README.md"
            if name not in _OURS and path.suffix != ".gguf" and not card:
                return path
    return None
