"""The manifest of a pack: its facts, as JSON, and whether they are true of the files beside it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import mlx.core as mx
from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS
from d2c_mlx.compress.compact_file import BLOCK, COMPACT
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import file_state, hash_file, read_text
from d2c_mlx.utils.parsing import parse_json
from d2c_mlx.utils.validation import found_text, problems_of

MANIFEST = "manifest.json"
Storage = Literal["plain", "compact", "gguf"]
_FORMAT = "d2c-mlx-pack"
_VERSIONS = {"plain": 1, "compact": 2, "gguf": 3}
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
# Fields that each storage needs.
_FILES = ("tasks", "files")
_NEEDED = {"plain": _FILES, "compact": (*_FILES, "dtype"), "gguf": (*_FILES, "dtype", "gguf")}


class _Part(BaseModel):
    """Nothing is converted, and unknown keys are passed over: a later version may say more."""

    model_config = ConfigDict(
        frozen=True, strict=True, populate_by_name=True, arbitrary_types_allowed=True
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
    num_hidden_layers: int = Field(gt=0, le=1 << 10)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    modules: Sequence[str] = Field(max_length=1 << 6)

    @classmethod
    def of(cls, config: Mapping[str, Any], paths: Sequence[str]) -> Self:
        """The places of a base model's modules, by its config.json and their paths."""
        values = {key: config.get(key) for key in cls.model_fields if key != "modules"}
        modules = sorted({BLOCK.sub(".*.", path, count=1) for path in paths})
        return cls.model_validate({**values, "modules": modules})

    def paths(self) -> list[str]:
        """The paths of all modules that files of the pack may have."""
        blocks = range(self.num_hidden_layers)
        return [path.replace("*", str(block)) for path in self.modules for block in blocks]


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
    dtype: Annotated[
        mx.Dtype, BeforeValidator(lambda x: _DTYPES.get(x, x) if isinstance(x, str) else x)
    ] = mx.float16
    gguf: GgufPlaces | None = None
    budget: str = Field("-", validation_alias=AliasPath("budget", "text"))
    max_bytes: int | None = Field(None, gt=0, validation_alias=AliasPath("budget", "nbytes"))
    origins: Mapping[str, str] = {}
    systems: Mapping[str, str] = {}
    merged: Mapping[str, int] = {}
    tasks: Mapping[str, str | int | None] = {}
    files: Mapping[str, PackFile] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The content of `manifest.json`; most packs lack `origins`, `systems` and `merged`.

        The order of the keys is part of the bytes, so of the pack's hash.
        """
        plain = self.storage == "plain"
        base = {
            "model": self.model,
            "config_sha256": self.config_hash,
            "weights_sha256": self.weights_hash,
            "n_layers": None if plain else self.n_layers,
        }
        content = {
            "format": _FORMAT,
            "format_version": _VERSIONS[self.storage],
            "storage": self.storage,
            "base": {key: value for key, value in base.items() if value is not None},
            "dtype": None if plain else str(self.dtype).split(".")[-1],
            "gguf": self.gguf and self.gguf.model_dump(mode="json"),
            "budget": {"text": self.budget, "nbytes": self.max_bytes},
            "origins": dict(self.origins),
            "tasks": dict(self.tasks),
            "systems": dict(self.systems),
            "merged": dict(self.merged),
            "files": {name: file.model_dump() for name, file in self.files.items()},
            "nbytes": self.nbytes,
        }
        return {key: value for key, value in content.items() if value not in (None, {})}


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check that its fields go together; `check_files` checks the files.

    Use it through `load_pack`, which also looks into the files.

    Raises:
        PackError: no pack, not JSON, or another format, storage or version; or every field that is
            missing, wrong or not true of the others, one line each.
    """
    try:
        content = parse_json(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        packs = [*path.parent.glob(f"*/{MANIFEST}"), *path.parent.glob(f"*/pack/{MANIFEST}")]
        near = f" {min(packs).parent} is one" if packs else ""
        raise PackError(f"{path}: missing; is this a pack?{near}") from None
    except (OSError, ValueError) as error:
        raise PackError(f"{path}: not readable as the JSON of a manifest ({error})") from None
    content = content if isinstance(content, dict) else {}
    about = form, version, storage = [*map(content.get, ("format", "format_version", "storage"))]
    if form != _FORMAT or version is None or version != _VERSIONS.get(str(storage)):
        form, version, storage = map(found_text, about)
        raise PackError(
            f"{path}: format {form} version {version} storage {storage}, expected {_FORMAT!r} and a"
            f" version and storage of {_VERSIONS}"
        )
    needed = [key for key in _NEEDED[str(storage)] if content.get(key) in (None, {})]
    problems = [f"{path}: {key}: missing" for key in needed]
    try:
        manifest = Manifest.model_validate(content)
        if not problems:
            problems = [f"{path}: {line}" for line in _untrue(manifest, content)]
    except ValidationError as error:
        problems += problems_of(error, Manifest, content, str(path))
    if problems:
        raise PackError(f"{line}; write the pack again" for line in dict.fromkeys(problems))
    return manifest


def _untrue(manifest: Manifest, content: Mapping[str, Any]) -> Iterator[str]:
    """Fields that do not go together, and what is wrong with them."""
    files, storage = manifest.files, manifest.storage
    if content.get("nbytes") != manifest.nbytes:
        nbytes = found_text(content.get("nbytes"))
        yield f"nbytes: found {nbytes}, expected {manifest.nbytes}, the bytes of its files"
    if storage != "plain" and not manifest.n_layers:
        yield "base.n_layers: expected a number of blocks above 0"
    if storage == "compact" and COMPACT not in files:
        yield f"files.{COMPACT}: missing"
    for task, adapter in manifest.tasks.items():
        name, bare = adapter if isinstance(adapter, str) else "", adapter is None
        good, expected = {
            "plain": (
                {f"{name}/{WEIGHTS}", f"{name}/{CONFIG}"} <= files.keys(),
                f"a directory with {WEIGHTS} and {CONFIG} among its files",
            ),
            "compact": (bare or isinstance(adapter, int), "the position of an adapter or null"),
            "gguf": (
                bare or (name.endswith(".gguf") and name in files),
                "a .gguf among its files or null",
            ),
        }[storage]
        if not task.isprintable():
            yield f"tasks.{task}: the name has characters that are not printable"
        elif not good:
            yield f"tasks.{task}: points to {found_text(adapter)}, expected {expected}"


def check_files(directory: Path, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Check the files of a pack against its manifest.

    Returns:
        File -> its `file_state` before it was read.

    Raises:
        PackError: every file that is missing or differs, or is none that a pack may have.
    """
    problems, states = [], {}
    for name, entry in manifest.files.items():
        file, parts = directory / name, name.split("/")
        # The file system raises an error of its own for a longer name. "../x" would lead out of
        # the pack, and exports with it.
        short = name.isprintable() and all(len(part.encode()) <= 255 for part in parts)
        if not short or len(parts) > 2 or {"", ".", ".."} & set(parts):
            problems.append(f"{directory / MANIFEST}: files: {name!r} is no file of a pack")
        elif not file.is_file() or not file.resolve().is_relative_to(directory.resolve()):
            problems.append(f"{file}: missing, but the manifest lists it")
        else:
            states[name] = state = file_state(file)
            if state[2] != entry.nbytes or hash_file(file) != entry.sha256:
                problems.append(
                    f"{file}: differs from the manifest's size or sha256; copy it again"
                )
    if problems:
        raise PackError(problems)
    return states
