"""Records of the stages of a run, which tell whether a stage must run again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2c_mlx.packs.manifest import MANIFEST, check_format
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import InputError, PackError
from d2c_mlx.utils.files import fingerprint, hash_tree, read_text, visible_files, write_json
from d2c_mlx.utils.parsing import json_or_none, parse_json

__all__ = [
    "Record",
    "check_pack",
    "expect_pack",
    "has_record",
    "keep_pack",
    "outputs_hold",
    "peaks",
    "read_finish",
    "write_finish",
]

# File beside the records: which stages ended on which inputs.
_FINISH = "finish.json"

# Files of the packs that a run makes. A router is not among them, since it is added later.
_PACKED = re.compile(
    r"manifest\.json|compact\.safetensors|cluster-\d+\.gguf"
    r"|cluster-\d+/adapter(s\.safetensors|_config\.json)"
)


class Record:
    """The record of one stage, `.stages/<name>.json` of a run directory."""

    def __init__(self, output: Path, name: str, options: object, reads: Sequence[str]) -> None:
        """Hash the inputs that a stage is about to work on; arguments as in `Session.stage`."""
        self._output = output
        self._path = _stages(output) / f"{name}.json"
        self._read = {file: hash_tree(output / file) for file in reads}
        self._inputs = fingerprint([VERSION, options, [*self._read.values()]])

    def holds(self, writes: Sequence[str]) -> bool:
        """True if the stage ran on the same inputs and its outputs `writes` are untouched."""
        old = _read(self._path)
        return (
            old["inputs"] == self._inputs
            and old["outputs"].keys() == set(writes)
            and _untouched(self._output, old["outputs"])
        )

    def write(self, writes: Sequence[str], measured: dict[str, object]) -> None:
        """Record the artifacts `writes` as they are now, and what the stage measured."""
        outputs = {file: hash_tree(self._output / file) for file in writes}
        content = {"inputs": self._inputs, "read": self._read, "outputs": outputs}
        write_json(self._path, {**content, **measured})


def _untouched(output: Path, outputs: Mapping[str, str]) -> bool:
    return all(
        (output / file).exists() and hash_tree(output / file) == digest
        for file, digest in outputs.items()
    )


def outputs_hold(output: Path, stages: Iterable[str]) -> bool:
    """True if each of these stages left outputs and all of them are untouched."""
    records = [_read(_stages(output) / f"{name}.json") for name in stages]
    return all(one["outputs"] and _untouched(output, one["outputs"]) for one in records)


def read_finish(output: Path) -> dict[str, Any] | None:
    """Read what `write_finish` wrote; None if it is missing or damaged."""
    found = json_or_none(_stages(output) / _FINISH)
    good = isinstance(found, dict) and isinstance(found.get("stages"), list)
    return found if good and isinstance(found.get("inputs"), str) else None


def write_finish(output: Path, finish: dict[str, Any]) -> None:
    """Record which stages ended on which inputs, so that the next check needs no model."""
    if read_finish(output) != finish:
        write_json(_stages(output) / _FINISH, finish)


def has_record(output: Path) -> bool:
    """True if a stage of a run ended in this directory."""
    return any(_read(path)["outputs"] for path in _stages(output).glob("*.json"))


def check_pack(output: Path) -> None:
    """Check that a run may replace `pack/`: it is missing, or the run made it.

    A pack of the run's may be damaged; making it anew repairs it.

    Raises:
        PackError: the pack was made or changed otherwise, is of another version, or holds files
            of the user's, which would be lost.
    """
    path, record = output / "pack", _read(_stages(output) / "pack.json")
    made = [one for one in (record["outputs"].get("pack"), record.get("expected")) if one]
    there = [file.relative_to(path).as_posix() for file in visible_files(path)]
    if not there or hash_tree(path) in made:
        return
    try:
        load_pack(path)
        damaged = False
    except InputError:
        damaged = bool(made) and all(map(_PACKED.fullmatch, there)) and not _other_version(path)
    if not damaged:
        raise PackError(
            f"{path}: is not the pack that this run made, as after d2c-mlx add or remove, and"
            " would be made anew; move it elsewhere or delete it, then run again"
        )


def _other_version(pack: Path) -> bool:
    """True if the manifest is readable JSON, but of a format or version that we do not know."""
    if json_or_none(pack / MANIFEST) is None:
        return False
    try:
        check_format(pack / MANIFEST)
    except PackError:
        return True
    return False


def expect_pack(output: Path, directory: Path) -> None:
    """Record the pack in `directory`, which is about to replace `pack/`.

    The run may be killed between the replacement and the record of the stage.
    """
    path = _stages(output) / "pack.json"
    write_json(path, {**_read(path), "expected": hash_tree(directory)})


def peaks(output: Path) -> dict[str, int]:
    """Most bytes in any stage of a run: `mlx`, which its evaluations held, and the `process`."""
    records = [_read(path) for path in _stages(output).glob("*.json")]
    keys = {"mlx": "peak_nbytes", "process": "process_peak_nbytes"}
    return {name: max((one.get(key, 0) for one in records), default=0)
            for name, key in keys.items()}  # fmt: skip


def keep_pack(pack: Path, before: str) -> None:
    """Record a changed pack as the run's own, so that the run does not refuse it.

    Use it for changes that leave the adapters as they were, such as a new router.

    Args:
        pack: directory of the pack; nothing is recorded for a pack that no run made.
        before: its `hash_tree` before it was changed.
    """
    path = _stages(pack.parent) / "pack.json"
    record = _read(path)
    if record["outputs"].get(pack.name) == before:
        write_json(path, {**record, "outputs": {pack.name: hash_tree(pack)}})
        # Later stages read the pack, so the run is not finished.
        (_stages(pack.parent) / _FINISH).unlink(missing_ok=True)


def _stages(output: Path) -> Path:
    """The directory of the records; a link would lead writes out of a run that somebody sent."""
    path = output / ".stages"
    if path.is_symlink():
        raise PackError(f"{path}: is a link, expected a directory; remove it")
    return path


def _read(path: Path) -> dict[str, Any]:
    """A record; a missing or damaged one counts as nothing done."""
    try:
        found = parse_json(read_text(path))
    except (FileNotFoundError, ValueError):
        found = None
    if isinstance(found, dict) and "inputs" in found and isinstance(found.get("outputs"), dict):
        return found
    return {"inputs": None, "outputs": {}}
