"""What a command reads must not lie where it writes, and what it replaces must be its own."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2c_mlx.errors import ConfigError, InputError
from d2c_mlx.strict import read_yaml

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
# What only our commands write at the top of an output; a user's adapters have the same files.
_MARKS = ("tasks.json", "manifest.json")
# Files of an adapter, and what else a marked output holds; an exported GGUF lies at its top.
_ADAPTER = {"adapters.safetensors", "adapter_model.safetensors", "adapter_config.json"}
_OURS = {*_ADAPTER, *_MARKS, "compact.safetensors", "router.safetensors"}
_GGUF = re.compile(r"cluster-\d+\.gguf")


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
            holds what no earlier output had: one of `unpack`, `export` or `push`, or of the same
            adapters.
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
    if foreign := _foreign(output, [one.name for one in sources]):
        raise ConfigError(
            f"output: {output} is replaced as a whole, and {foreign} in it is of no earlier output"
            " of this kind; name another directory, or empty this one"
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
        if _identity(folder) in around and not _hidden(folder, output)
    ]


def _hidden(folder: Path, path: Path) -> bool:
    """Whether who lists the folder passes over what the path lies in."""
    inside = Path(os.path.realpath(path)).parts[len(Path(os.path.realpath(folder)).parts) :]
    return bool(inside) and inside[0][0] == "."


def _own_config(config: RunConfig, output: Path) -> list[str]:
    """A run keeps its options in config.yaml, where a user's own file may lie."""
    path = output / "config.yaml"
    if (output / ".stages").is_dir() or not path.exists():
        return []
    # A run that was killed early has no record of a stage yet, but has written every option.
    try:
        if config.to_dict().keys() <= read_yaml(path).keys():
            return []
    except ConfigError:
        pass
    return [
        f"output: a run in {output} keeps its options in config.yaml, which would replace your"
        f" {path}; give another --output, or rename that file"
    ]


def _foreign(directory: Path, names: Collection[str]) -> Path | None:
    """A file that is none of an earlier output, if there is one.

    Args:
        directory: that would be replaced.
        names: of adapters that are written again; their folders need no mark.
    """
    marked = any((directory / mark).is_file() for mark in _MARKS)
    for folder, folders, files in os.walk(directory):
        folders.sort()
        for name in sorted(files):
            path = Path(folder) / name
            top, *below = path.relative_to(directory).parts
            alone = top in names and len(below) == 1 and name in _ADAPTER
            known = name in _OURS if marked else alone
            # Only a push writes a README, beside the manifest.
            known |= marked and not below and (name == "README.md" or bool(_GGUF.fullmatch(name)))
            # A Mac leaves one in a folder, the other beside a file on a drive of another system.
            known |= name == ".DS_Store" or (name[:2] == "._" and path.with_name(name[2:]).exists())
            if not known:
                return path
    return None
