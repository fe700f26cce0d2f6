"""What a stage of a run left behind: enough to know whether it must run again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2c_mlx.packs.manifest import check_format
from d2c_mlx.packs.pack import MANIFEST, load_pack
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import InputError, PackError
from d2c_mlx.utils.files import fingerprint, hash_tree, visible_files, write_json
from d2c_mlx.utils.parsing import json_or_none, parse_json

__all__ = [
    "Record",
    "check_pack",
    "expect_pack",
    "has_record",
    "keep_pack",
    "outputs_hold",
    "read_finish",
    "write_finish",
]

# Beside the records of the stages.
_FINISH = "finish.json"

# Files of the packs that a run makes; a router is put in later.
_PACKED = re.compile(
    r"manifest\.json|compact\.safetensors|cluster-\d+/adapter(s\.safetensors|_config\.json)"
)


class Record:
    """`.stages/<name>.json` of a run directory."""

    def __init__(self, output: Path, name: str, options: object, reads: Sequence[str]) -> None:
        """Of one stage and what it is about to work on, see `Session.stage`."""
        self._output = output
        self._path = output / ".stages" / f"{name}.json"
        read = [hash_tree(output / file) for file in reads]
        self._inputs = fingerprint([VERSION, options, read])

    def holds(self, writes: Sequence[str]) -> bool:
        """Whether the stage ran on the same inputs and its outputs `writes` are untouched."""
        old = _read(self._path)
        return (
            old["inputs"] == self._inputs
            and old["outputs"].keys() == set(writes)
            and _untouched(self._output, old["outputs"])
        )

    def write(self, writes: Sequence[str], measured: dict[str, object]) -> None:
        """Remember the artifacts `writes` as they are now, and what the stage measured."""
        outputs = {file: hash_tree(self._output / file) for file in writes}
        write_json(self._path, {"inputs": self._inputs, "outputs": outputs, **measured})


def _untouched(output: Path, outputs: Mapping[str, str]) -> bool:
    return all(
        (output / file).exists() and hash_tree(output / file) == digest
        for file, digest in outputs.items()
    )


def outputs_hold(output: Path, stages: Iterable[str]) -> bool:
    """Whether every one of these stages left outputs, and all are untouched."""
    records = [_read(output / ".stages" / f"{name}.json") for name in stages]
    return all(one["outputs"] and _untouched(output, one["outputs"]) for one in records)


def read_finish(output: Path) -> dict[str, Any] | None:
    """What `write_finish` kept; None if there is nothing, or it is damaged."""
    found = json_or_none(output / ".stages" / _FINISH)
    good = isinstance(found, dict) and isinstance(found.get("stages"), list)
    return found if good and isinstance(found.get("inputs"), str) else None


def write_finish(output: Path, finish: dict[str, Any]) -> None:
    """Keep which stages ended on which inputs, so that the next look needs no model."""
    if read_finish(output) != finish:
        write_json(output / ".stages" / _FINISH, finish)


def has_record(output: Path) -> bool:
    """Whether a stage of a run ended in this directory."""
    return any(_read(path)["outputs"] for path in (output / ".stages").glob("*.json"))


def check_pack(output: Path) -> None:
    """Look whether `pack/` may be replaced: it is missing, or the one that the run made.

    That one may be damaged, which making it anew repairs.

    Raises:
        PackError: it is a pack of another making or version, or holds files of the user's, which
            would be lost.
    """
    path, record = output / "pack", _read(output / ".stages" / "pack.json")
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
    """Whether a manifest that can be read is of another format or version than ours."""
    if json_or_none(pack / MANIFEST) is None:
        return False
    try:
        check_format(pack / MANIFEST)
    except PackError:
        return True
    return False


def expect_pack(output: Path, directory: Path) -> None:
    """Record what replaces `pack/` next: a kill may come before the stage is recorded."""
    path = output / ".stages" / "pack.json"
    write_json(path, {**_read(path), "expected": hash_tree(directory)})


def keep_pack(pack: Path, before: str) -> None:
    """Let a run keep its pack as it is now, which serves the same adapters as before.

    Args:
        pack: its directory; one that no run made is left alone.
        before: its `hash_tree` before it was changed.
    """
    path = pack.parent / ".stages" / "pack.json"
    record = _read(path)
    if record["outputs"].get(pack.name) == before:
        write_json(path, {**record, "outputs": {pack.name: hash_tree(pack)}})
        # The stages after it read the pack, so the run is not finished.
        (pack.parent / ".stages" / _FINISH).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """A record; one that is missing or damaged is of nothing that was done."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if isinstance(found, dict) and "inputs" in found and isinstance(found.get("outputs"), dict):
        return found
    return {"inputs": None, "outputs": {}}
