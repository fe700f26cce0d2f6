"""The fields of a pack's manifest; `checks.py` reads one and says whether it is true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
from pydantic import ConfigDict, Field, field_validator

from d2c_mlx.compress.file_layout import BLOCK, COMPACT
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.validation import Checked

__all__ = [
    "COMPACT",
    "FORMAT",
    "MANIFEST",
    "VERSIONS",
    "Base",
    "CompactBase",
    "CompactManifest",
    "GgufManifest",
    "GgufPlaces",
    "Manifest",
    "PackBudget",
    "PackFile",
    "PackInfo",
    "PlainManifest",
]

MANIFEST, FORMAT = "manifest.json", "d2c-mlx-pack"
# Storage -> version of the format. Plain packs are still version 1: their manifests from before
# there were compact packs do not name a storage.
VERSIONS = {"plain": 1, "compact": 2, "gguf": 3}


def _expected(words: str, above: int | None = None) -> Any:  # noqa: ANN401  as pydantic has it
    return Field(json_schema_extra={"expected": words}, gt=above)


class _Part(Checked):
    """Unknown keys are passed over: a later version may say more."""

    model_config = ConfigDict(extra="ignore")
    error = PackError


class Base(_Part):
    """The base model that a pack was made for.

    Attributes:
        model: its name or hub id.
        config_sha256: hex SHA-256 of its config.json in canonical form; of its bytes in packs of
            earlier versions.
        weights_sha256: hex SHA-256 of its weights, see `weights_digest`; None in packs of earlier
            versions.
    """

    model: str = _expected("a string")
    config_sha256: str = _expected("a string")
    weights_sha256: str | None = Field(None, json_schema_extra={"expected": "a string"})


class CompactBase(Base):
    """The base model of a compact pack.

    Attributes:
        n_layers: number of transformer blocks, which adapters in mlx-lm's layout state.
    """

    n_layers: int = _expected("a whole number above 0", above=0)


class PackBudget(_Part):
    """The budget that a pack was made within.

    Attributes:
        text: as the user wrote it, such as "25%"; it is parsed when the pack is changed.
        nbytes: the most bytes that all adapter files may take, or None.
    """

    text: str = _expected("a string")
    nbytes: int | None = _expected("a whole number above 0 or null", above=0)


class PackFile(_Part):
    """One file of a pack.

    Attributes:
        nbytes: its size.
        sha256: hex digest of its content.
    """

    nbytes: int
    sha256: str


class Manifest(_Part):
    """The fields that manifests of all storages have; `read_manifest` gives one of those below.

    `check_format` has looked at format and version.

    Attributes:
        base: the base model.
        budget: the budget, in bytes or adapters.
        origins: task -> `owner/name@commit` of adapters from the hub; empty if none is.
        systems: task -> system message of all its calibration rows; without tasks that have none.
        tasks: task -> adapter.
        merged: adapter -> number of adapters in it, where that is not the number of its tasks.
        files: path relative to the pack -> size and hash.
        nbytes: bytes of all files.
    """

    storage: str
    base: Base
    budget: PackBudget
    origins: Mapping[str, str] = {}
    systems: Mapping[str, str] = {}
    tasks: Mapping[str, str | int | None]
    merged: Mapping[str, int] = {}
    files: Mapping[str, PackFile]
    nbytes: int

    # None of them decides what a pack serves, so none makes it unreadable.
    @field_validator("origins", "systems", mode="before")
    @classmethod
    def _strings(cls, value: object) -> object:
        return _only(value, str)

    @field_validator("merged", mode="before")
    @classmethod
    def _counts(cls, value: object) -> object:
        return _only(value, int)


class PlainManifest(Manifest):
    """The manifest of a pack of directories.

    Attributes:
        tasks: task -> directory relative to the pack.
    """

    storage: Literal["plain"] = "plain"
    tasks: Mapping[str, str]


class CompactManifest(Manifest):
    """The manifest of a pack in one file.

    Attributes:
        base: the base model, with its number of blocks.
        dtype: of the base's activations.
        tasks: task -> position of its adapter in the file; None is the base model.
    """

    storage: Literal["compact"]
    base: CompactBase
    dtype: Literal["float16", "bfloat16", "float32"]
    tasks: Mapping[str, int | None]


class GgufPlaces(_Part):
    """What of a base model says where the tensors of a GGUF belong, see `read_gguf`.

    Attributes:
        model_type: of the base's config.json, as are the next three.
        num_hidden_layers: its blocks.
        num_attention_heads: heads of q.
        num_key_value_heads: heads of k; None is as many.
        modules: paths of modules, `*` for the block: `model.layers.*.self_attn.q_proj`.
    """

    model_type: str = _expected("a string")
    num_hidden_layers: int = _expected("a whole number above 0", above=0)
    num_attention_heads: int = _expected("a whole number above 0", above=0)
    num_key_value_heads: int | None = Field(
        None, json_schema_extra={"expected": "a whole number above 0 or null"}, gt=0
    )
    modules: Sequence[str] = _expected("a list of strings")

    @classmethod
    def of(cls, config: Mapping[str, Any], paths: Sequence[str]) -> GgufPlaces:
        """The places of a base model's modules, by its config.json and their paths."""
        known: dict[str, Any] = {
            key: config.get(key) for key in cls.model_fields if key != "modules"
        }
        return cls(**known, modules=sorted({BLOCK.sub(".*.", path, count=1) for path in paths}))

    def paths(self) -> list[str]:
        """The paths of all modules that files of the pack may have."""
        blocks = range(self.num_hidden_layers)
        return [path.replace("*", str(block)) for path in self.modules for block in blocks]


class GgufManifest(Manifest):
    """The manifest of a pack of files that llama.cpp reads.

    Attributes:
        base: the base model, with its number of blocks.
        dtype: of the base's activations.
        tasks: task -> file; None is the base model.
        gguf: where tensors belong.
    """

    storage: Literal["gguf"]
    base: CompactBase
    dtype: Literal["float16", "bfloat16", "float32"]
    tasks: Mapping[str, str | None]
    gguf: GgufPlaces


@dataclass(frozen=True)
class PackInfo:
    """The facts in a manifest besides adapters, tasks and files.

    Attributes:
        model: name or hub id of the base model.
        config_hash: `config_digest` of the base model.
        weights_hash: `weights_digest` of the base model; None in packs of earlier versions.
        n_layers: number of transformer blocks of the base model. A plain pack does not store it:
            its adapters do, and `Pack.info` says 0.
        budget: as the user wrote it.
        max_bytes: the most bytes that all adapter files may take, or None.
        origins: task -> `owner/name@commit` of the adapter that was made for it, where it came
            from the hub.
        systems: task -> system message of all its calibration rows; without tasks that have none.
        merged: adapter, as in `Pack.tasks` -> number of adapters in it; one for each task that it
            serves where it is not named.
        dtype: of the base's activations, in which adapters of a compact pack are read.
        gguf: where tensors of a pack of GGUF files belong.
    """

    model: str
    config_hash: str
    weights_hash: str | None = None
    n_layers: int = 0
    budget: str = "-"
    max_bytes: int | None = None
    origins: Mapping[str, str] = field(default_factory=dict)
    systems: Mapping[str, str] = field(default_factory=dict)
    merged: Mapping[str | int, int] = field(default_factory=dict)
    dtype: mx.Dtype = mx.float16
    gguf: GgufPlaces | None = None


def _only(value: object, kind: type) -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else ()
    return {key: one for key, one in items if type(one) is kind}
