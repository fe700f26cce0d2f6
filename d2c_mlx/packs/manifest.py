"""The manifest of a pack: its facts, as JSON, and whether they are true of the files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS
from d2c_mlx.compress.compact_file import BLOCK, COMPACT
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file, read_text
from d2c_mlx.utils.parsing import parse_json

__all__ = [
    "COMPACT",
    "MANIFEST",
    "GgufPlaces",
    "Manifest",
    "PackFile",
    "Storage",
    "check_format",
    "read_manifest",
]

MANIFEST = "manifest.json"
Storage = Literal["plain", "compact", "gguf"]
_FORMAT = "d2c-mlx-pack"
_VERSIONS = {"plain": 1, "compact": 2, "gguf": 3}
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
_MOST_MODULES = 1 << 16
# Characters of a value that a message repeats.
_MOST_SHOWN = 60


class _Part(BaseModel):
    """Nothing is converted, and unknown keys are passed over: a later version may say more."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        strict=True,
        populate_by_name=True,
        arbitrary_types_allowed=True,
    )


class PackFile(_Part):
    """One file of a pack.

    Attributes:
        nbytes: its size.
        sha256: hex digest of its content.
    """

    nbytes: int
    sha256: str


class GgufPlaces(_Part):
    """What of a base model says where the tensors of a GGUF belong, see `read_gguf`.

    Attributes:
        model_type: of the base's config.json, as are the next three.
        num_hidden_layers: its blocks.
        num_attention_heads: heads of q.
        num_key_value_heads: heads of k; None is as many.
        modules: paths of modules, `*` for the block: `model.layers.*.self_attn.q_proj`.
    """

    model_type: str
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    modules: Sequence[str]

    @classmethod
    def of(cls, config: Mapping[str, Any], paths: Sequence[str]) -> GgufPlaces:
        """The places of a base model's modules, by its config.json and their paths."""
        values = {key: config.get(key) for key in cls.model_fields if key != "modules"}
        modules = sorted({BLOCK.sub(".*.", path, count=1) for path in paths})
        return cls.model_validate({**values, "modules": modules})

    def paths(self) -> list[str]:
        """The paths of all modules that files of the pack may have."""
        blocks = range(self.num_hidden_layers)
        return [path.replace("*", str(block)) for path in self.modules for block in blocks]


def _dtype(value: object) -> object:
    good = isinstance(value, mx.Dtype) or (isinstance(value, str) and value in _DTYPES)
    if not good:
        raise ValueError(f"expected one of {', '.join(_DTYPES)}")
    return _DTYPES[value] if isinstance(value, str) else value


def _only(kind: type) -> BeforeValidator:
    """Keep the values of a type: none of these decides what a pack serves."""

    def keep(value: object) -> dict[str, Any]:
        items = value.items() if isinstance(value, Mapping) else ()
        return {str(key): entry for key, entry in items if type(entry) is kind}

    return BeforeValidator(keep)


class Manifest(_Part):
    """The facts of a pack.

    `read_manifest` gives a whole one; what writes a pack takes one without `tasks` and `files`.

    Attributes:
        storage: `plain` (a directory per adapter), `compact` (one file) or `gguf` (a file per
            adapter, which llama.cpp reads).
        model: name or hub id of the base model.
        config_hash: `config_digest` of the base model.
        weights_hash: `weights_digest` of the base model; None is not compared.
        n_layers: number of transformer blocks of the base model. A plain pack does not store it:
            its adapters do, and it is 0 here.
        dtype: of the base's activations, in which adapters of a compact pack are read.
        gguf: where tensors of a pack of GGUF files belong.
        budget: as the user wrote it, such as "25%"; it is parsed when the pack is changed.
        max_bytes: the most bytes that all adapter files may take, or None.
        origins: task -> `owner/name@commit` of the adapter that was made for it, where it came
            from the hub; removed ones stay while they may be in a merge.
        systems: task -> system message of all its calibration rows; without tasks that have none.
        merged: adapter -> number of adapters in it, where that is not the number of its tasks.
        tasks: task -> adapter: a directory or a .gguf relative to the pack, in a compact pack the
            position in its file; None, not in plain packs, is the base model as it is.
        files: path relative to the pack -> size and hash.
    """

    storage: Storage = "plain"
    model: str = Field(validation_alias=AliasPath("base", "model"))
    config_hash: str = Field(validation_alias=AliasPath("base", "config_sha256"))
    weights_hash: str | None = Field(None, validation_alias=AliasPath("base", "weights_sha256"))
    n_layers: int = Field(0, ge=0, validation_alias=AliasPath("base", "n_layers"))
    dtype: Annotated[mx.Dtype, BeforeValidator(_dtype)] = mx.float16
    gguf: GgufPlaces | None = None
    budget: str = Field("-", validation_alias=AliasPath("budget", "text"))
    max_bytes: int | None = Field(None, gt=0, validation_alias=AliasPath("budget", "nbytes"))
    origins: Annotated[Mapping[str, str], _only(str)] = {}
    systems: Annotated[Mapping[str, str], _only(str)] = {}
    merged: Annotated[Mapping[str, int], _only(int)] = {}
    tasks: Mapping[str, str | int | None] = {}
    files: Mapping[str, PackFile] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files.values())

    @property
    def base(self) -> dict[str, Any]:
        """What is stored of the base model."""
        base: dict[str, Any] = {"model": self.model, "config_sha256": self.config_hash}
        if self.weights_hash is not None:
            base["weights_sha256"] = self.weights_hash
        return base if self.storage == "plain" else {**base, "n_layers": self.n_layers}

    def to_json(self, by_name: bool = False) -> dict[str, Any]:
        """The content of `manifest.json`; most packs lack `origins`, `systems` and `merged`.

        Args:
            by_name: sort the facts before `tasks` by their keys, as packs with a router always
                had them: the order is part of the bytes, so of the pack's hash.
        """
        about: dict[str, Any] = {"base": self.base}
        if self.storage != "plain":
            about["dtype"] = str(self.dtype).split(".")[-1]
        if self.storage == "gguf" and self.gguf:
            about["gguf"] = self.gguf.model_dump(mode="json")
        about["budget"] = {"text": self.budget, "nbytes": self.max_bytes}
        content = {
            "format": _FORMAT,
            "format_version": _VERSIONS[self.storage],
            "storage": self.storage,
            **({key: about[key] for key in sorted(about)} if by_name else about),
            "origins": dict(self.origins),
            "tasks": dict(self.tasks),
            "systems": dict(self.systems),
            "merged": dict(self.merged),
            "files": {name: file.model_dump() for name, file in self.files.items()},
            "nbytes": self.nbytes,
        }
        rare = [key for key in ("origins", "systems", "merged") if not content[key]]
        return {key: value for key, value in content.items() if key not in rare}


def check_format(path: Path) -> dict[str, Any]:
    """Read a manifest of a format and version that we know; its other fields may be anything.

    Raises:
        PackError: no pack, not JSON, or another format, storage or version.
    """
    try:
        content = parse_json(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        raise PackError(f"{path}: missing; is this a pack?") from None
    except OSError as error:
        raise PackError(
            f"{path}: found no file that can be read ({error.strerror}), expected the manifest of a"
            " pack; name the directory of a pack"
        ) from None
    except ValueError as error:
        raise PackError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise PackError(f"{path}: expected a JSON object, found {type(content).__name__}")
    storage = content.get("storage")
    version = _VERSIONS.get(storage) if isinstance(storage, str) else None
    if version is None:
        raise PackError(f"{path}: storage {storage!r}, expected one of {list(_VERSIONS)}")
    if content.get("format") != _FORMAT or content.get("format_version") != version:
        raise PackError(
            f"{path}: format {content.get('format')!r} version {content.get('format_version')!r},"
            f" expected {_FORMAT!r} version {version}"
        )
    return content


def read_manifest(path: Path) -> Manifest:
    """Read a manifest, and check it against the files beside it.

    Use it through `load_pack`, which also looks into the files.

    Raises:
        PackError: what `check_format` raises, or every field that is missing or wrong and every
            file that is missing or differs, one line each.
    """
    content = check_format(path)
    manifest, wrong = _parse(content)
    tasks, files = (
        content[key] if isinstance(content.get(key), dict) else {} for key in ("tasks", "files")
    )
    for task, adapter in tasks.items():
        problem = _target_problem(content["storage"], adapter, files) if files else None
        if not task.isprintable():
            wrong["tasks", task] = "the name has characters that are not printable"
        elif problem:
            wrong["tasks", task] = f"points to {_shown(adapter)}, {problem}"
    damaged = [
        problem
        for name, entry in files.items()
        if ("files", name) not in wrong and (problem := _file_problem(path.parent, name, entry))
    ]
    nbytes, total = content.get("nbytes"), None
    if files and not damaged and not any(place[0] == "files" for place in wrong):
        total = sum(entry["nbytes"] for entry in files.values())
    if type(nbytes) is not int or total not in (None, nbytes):
        wrong["nbytes",] = f"found {_shown(nbytes)}, expected the bytes of its files"
    problems = [
        f"{path}: {'.'.join(ascii(part)[1:-1] for part in place)}: {words}; write the pack again"
        for place, words in wrong.items()
    ]
    if problems or damaged or manifest is None:
        raise PackError([*problems, *damaged])
    return manifest


def _parse(content: Mapping[str, Any]) -> tuple[Manifest | None, dict[tuple[str, ...], str]]:
    """The manifest, if all its fields are of their types, and what is wrong with which field."""
    storage = content["storage"]
    wrong: dict[tuple[str, ...], str] = {}
    manifest = None
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            # Deeper parts are alternatives of a type, or fields of one file.
            place = tuple(map(str, details["loc"][: 1 if details["loc"][0] == "gguf" else 2]))
            value = "missing" if details["type"] == "missing" else _shown(details["input"])
            words = details["msg"].removeprefix("Value error, ")
            wrong.setdefault(place, f"found {value}: {words}")
    needed = {"plain": [], "compact": ["dtype"], "gguf": ["dtype", "gguf"]}[storage]
    for key in (*needed, "tasks", "files"):
        if content.get(key) in (None, {}):
            wrong.setdefault((key,), "missing")
    if needed and (manifest is None or not manifest.n_layers):
        base = content.get("base")
        if not isinstance(base, dict) or base.get("n_layers") in (None, 0):
            wrong["base", "n_layers"] = "missing, expected a number of blocks above 0"
    files = content.get("files")
    if storage == "compact" and files and isinstance(files, dict) and COMPACT not in files:
        wrong.setdefault(("files", COMPACT), "missing")
    places = manifest.gguf if manifest else None
    if places and places.num_hidden_layers * max(1, len(places.modules)) > _MOST_MODULES:
        wrong["gguf",] = (
            f"{places.num_hidden_layers} blocks of {len(places.modules)} modules, at most"
            f" {_MOST_MODULES:,} in all are read"
        )
    return manifest, wrong


def _target_problem(storage: Storage, adapter: object, files: Mapping[str, Any]) -> str | None:
    """What is wrong with the adapter that a task names; whether a compact file has it is not asked.

    "../x" would lead out of the pack, and an export would write there.
    """
    if storage == "compact":
        good = adapter is None or type(adapter) is int
        return None if good else "expected the position of an adapter or null"
    if storage == "gguf":
        listed = isinstance(adapter, str) and adapter in files and adapter.endswith(".gguf")
        good = adapter is None or listed
        return None if good else "expected a .gguf among its files or null"
    if not isinstance(adapter, str) or not _is_inside(adapter, 1):
        return "no directory of a pack"
    missing = [file for file in (WEIGHTS, CONFIG) if f"{adapter}/{file}" not in files]
    return f"of whose files the manifest does not list {', '.join(missing)}" if missing else None


def _is_inside(name: str, depth: int) -> bool:
    """True if a name is a relative path of at most `depth` parts that stays in the pack."""
    parts = name.split("/")
    # The file system raises an error of its own for a longer name.
    short = name.isprintable() and all(len(part.encode()) <= 255 for part in parts)
    return short and len(parts) <= depth and not {"", ".", ".."} & set(parts)


def _file_problem(directory: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    file = directory / name
    if not _is_inside(name, 2):
        return f"{directory / MANIFEST}: files: {ascii(name)} is no file of a pack"
    if not file.is_file() or not file.resolve().is_relative_to(directory.resolve()):
        return f"{file}: missing, but the manifest lists it"
    if file.stat().st_size != entry["nbytes"] or hash_file(file) != entry["sha256"]:
        return f"{file}: differs from the manifest's size or sha256; copy it again"
    return None


def _shown(value: object) -> str:
    """How a message repeats a value that may be anything."""
    return ascii(value)[:_MOST_SHOWN]
