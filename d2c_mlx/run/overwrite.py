"""What a command reads must not lie where it writes, and what it replaces must be its own."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS
from d2c_mlx.packs.manifest import COMPACT, FORMAT, MANIFEST
from d2c_mlx.run.records import has_record
from d2c_mlx.utils.errors import ConfigError, InputError
from d2c_mlx.utils.files import visible_files
from d2c_mlx.utils.parsing import json_or_none, read_yaml

if TYPE_CHECKING:
    from d2c_mlx.adapters.sources import Source
    from d2c_mlx.run.config import RunConfig

__all__ = ["RUN_WRITES", "check_output", "check_run", "local_model"]

# An option, and a path that it names.
Input = tuple[str, Path]

# What a run replaces in its directory; a test compares.
RUN_WRITES = (
    "adapters", "planned", "merged", "refined", "refining", "pack", ".stages", ".lock",
    "config.yaml", "losses.json", "plan.json", "clusters.json", "merges.json", "refines.json",
    "bench.json", "report.md", "report.html",
)  # fmt: skip
# Adapters in a marked output: a directory, or an exported GGUF at its top.
_ENTRY = re.compile(r"cluster-\d+(\.gguf)?")
_ADAPTER = (WEIGHTS, "adapter_model.safetensors", CONFIG)
# What a push writes beside the adapters.
_PUSHED = (MANIFEST, "README.md", COMPACT, "router.safetensors")
# Keys of the adapter_config.json that we write; those of PEFT and mlx-lm themselves have more. A
# test compares.
_MLX_KEYS = frozenset(
    ("base_model_name_or_path", "fine_tune_type", "num_layers", "lora_parameters")
)
_PEFT_KEYS = frozenset(
    "base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights lora_alpha"
    " lora_dropout peft_type r rank_pattern alpha_pattern target_modules task_type use_dora"
    " use_rslora".split()
)


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
        ConfigError: the run would replace an input or what no earlier run wrote, or be taken for
            one of its adapters.
    """
    output, tasks = Path(config.output), Path(config.tasks)
    rows = [tasks / one.name / f"{kind}.jsonl" for one in sources for kind in ("probe", "test")]
    inputs = _adapters(sources) + [("tasks", path) for path in (tasks, *rows)]
    if config.unlabelled:
        inputs.append(("unlabelled", Path(config.unlabelled)))
    inputs += local_model(config.model)
    replaced = _replaced(inputs, [output / name for name in RUN_WRITES])
    problems = [line for _, line in replaced] + _among(sources, output)
    problems += _of_the_user(config, output, [target for target, _ in replaced])
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
            holds what no earlier output had: one of `unpack`, `export` or `push`, known by its
            tasks.json, or of `convert` and the same adapters.
    """
    replaced = _replaced([*inputs, *_adapters(sources)], [output])
    problems = [line for _, line in replaced] + _among(sources, output)
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


def _replaced(inputs: Iterable[Input], targets: Iterable[Path]) -> list[tuple[Path, str]]:
    """A target and a line, for every target and option of which something lies in it."""
    places = {identity: path for path in targets if (identity := _identity(path))}
    found: dict[tuple[str, Path], Path] = {}
    for option, path in inputs:
        for identity in _around(path) & places.keys():
            found.setdefault((option, places[identity]), path)
    return [
        (target, f"output: {target} is made anew, which would replace the {option} {path}; give"
         " another --output")
        for (option, target), path in found.items()
    ]  # fmt: skip


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


def _of_the_user(config: RunConfig, output: Path, known: Collection[Path]) -> list[str]:
    """A line about all that would be replaced and that no run wrote.

    Args:
        config: of the run.
        output: its directory.
        known: what is refused already.
    """
    if _is_run(config, output):
        found = _added(config, output)
    else:
        found = [output / name for name in RUN_WRITES if name != ".lock" and _holds(output / name)]
    mine = [str(path) for path in found if not set(known) & {path, *path.parents}]
    if not mine:
        return []
    return [
        f"output: a run in {output} would replace your {', '.join(mine)}, which no earlier run"
        " wrote; give another --output, or move what is yours"
    ]


def _is_run(config: RunConfig, output: Path) -> bool:
    """Whether a run was at work there."""
    if has_record(output):
        return True
    # One that was killed early has no record of a stage yet, but has written every option.
    try:
        return config.to_dict().keys() <= read_yaml(output / "config.yaml").keys()
    except ConfigError:
        return False


def _added(config: RunConfig, output: Path) -> list[Path]:
    """What somebody put beside a run's own adapters, in the folders that it replaces."""
    folders = ["adapters"]
    if not config.planned:
        folders += ["merged", *(["refined", "refining"] if config.refine else [])]
    found: dict[Path, None] = {}
    for path in (file for name in folders for file in visible_files(output / name)):
        folder, *inside = path.relative_to(output).parts
        ours = path.name == "refine.json" and folder == "refining"
        # A config that is damaged is made anew with its adapter.
        ours |= path.name in (WEIGHTS, CONFIG) and _config_keys(path.parent) in (None, _MLX_KEYS)
        if not ours:
            found[output / folder / inside[0]] = None
    return list(found)


def _foreign(directory: Path, names: Collection[str]) -> Path | None:
    """A file that is none of an earlier output, if there is one.

    Args:
        directory: that would be replaced.
        names: of adapters that are written again; what we converted needs no mark.
    """
    marked = _marked(directory)
    for path in _files(directory):
        top, *below = path.relative_to(directory).parts
        known = top in marked
        if below:
            known |= top in names and _config_keys(path.parent) in (_MLX_KEYS, _PEFT_KEYS)
            known &= len(below) == 1 and path.name in _ADAPTER
        if not known:
            return path
    return None


def _marked(directory: Path) -> set[str]:
    """Names at the top of an output of `unpack`, `export` or `push`; none in any other folder."""
    tasks = json_or_none(directory / "tasks.json")
    entries = list(tasks.values()) if isinstance(tasks, dict) else []
    ours = (one is None or (isinstance(one, str) and _ENTRY.fullmatch(one)) for one in entries)
    if not entries or not all(ours):
        return set()
    manifest = json_or_none(directory / MANIFEST)
    pushed = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    return {"tasks.json", *(one for one in entries if one), *(_PUSHED if pushed else ())}


def _config_keys(directory: Path) -> frozenset[str] | None:
    """What the config of the adapter there says something of, if it can be read."""
    config = json_or_none(directory / CONFIG)
    return frozenset(config) if isinstance(config, dict) else None


def _holds(path: Path) -> bool:
    """Whether something would be lost with it: empty folders are not."""
    links = (Path(at) / name for at, folders, _ in os.walk(path) for name in folders)
    return path.is_file() or any(_files(path)) or any(one.is_symlink() for one in links)


def _files(directory: Path) -> Iterator[Path]:
    """All files below a directory, in order, but for those that a Mac leaves by itself."""
    for folder, folders, files in os.walk(directory):
        folders.sort()
        for name in sorted(files):
            path = Path(folder) / name
            # One in a folder, the other beside a file on a drive of another system.
            beside = name[:2] == "._" and path.with_name(name[2:]).exists()
            if name != ".DS_Store" and not beside:
                yield path
