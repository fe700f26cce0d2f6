"""Reading adapters: `read_adapter` is the one place where formats part.

A format has a file name in `weights_file` and a function that makes an `Adapter` of that file, in a
module of its own: PEFT, MLX and GGUF. An AdapterBias is small enough to be read here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter, LoRA
from d2c_mlx.adapters.checks import (
    BaseWeights,
    OtherBaseError,
    base_key,
    check_adapter,
    check_base,
    read_config,
    stated_base,
)
from d2c_mlx.adapters.gguf_format import read_gguf
from d2c_mlx.adapters.mlx_format import read_mlx
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS, PICKLE, read_peft
from d2c_mlx.adapters.sources import ADAPTER_BIAS, Source
from d2c_mlx.adapters.tensor_file import MLX_NAMES, PEFT_NAMES, in_file, read_tensors
from d2c_mlx.utils.errors import AdapterError, InputError, warn

__all__ = ["left_in_file", "read_adapter", "read_adapters", "weights_file"]

# Files of weights that are not read, and what to do.
_OTHER_FILES = {
    PICKLE: "a pickle can run code and is never loaded; save it again with PEFT's"
    " save_pretrained(..., safe_serialization=True)",
    "adapter_model.pt": "a pickle in torchtune's own names is never loaded; its Hugging Face"
    " checkpointer writes adapter_model.safetensors beside it, but not for Phi-3 and vision models",
    "adapters.npz": "has no scale; train it again, or save it as adapters.safetensors with the"
    " adapter_config.json of mlx-lm",
}


def read_adapter(
    path: str | Path,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    config: Mapping[str, Any] | None = None,
    base: BaseWeights | None = None,
) -> Adapter:
    """Read an adapter, its format recognised by its files, and check it against the base.

    `read_adapters` reads all adapters that an option names.

    Args:
        path: the directory of one adapter, or a `.gguf`.
        shapes: module path -> (in, out) of the base model's linear modules. None compares nothing
            with a base, as for files that we wrote; a GGUF then cannot be read.
        config: the base model's config.json. A GGUF needs it, as its rows are ordered by heads; and
            without it a base whose weights mlx-lm changes is not refused.
        base: the base model's weights, see `read_peft`.

    Raises:
        AdapterError: it cannot be read, or not be converted exactly; every reason is listed.
    """
    path = Path(path)
    file = weights_file(path)
    if file.suffix.lower() == ".gguf":
        check_base(file, config)
        adapter = read_gguf(file, shapes or (), config)
        adapter = adapter if file == path else replace(adapter, name=path.name)
    elif file.name == PEFT_WEIGHTS:
        check_base(file, config)
        adapter = read_peft(path, base, shapes)
    elif file.name == ADAPTER_BIAS:
        adapter = _read_adapter_bias(file)
    else:
        adapter = read_mlx(path, base)
    if shapes is not None:
        check_adapter(adapter, shapes, file)
    return adapter


def weights_file(path: Path) -> Path:
    """The file that has the weights of an adapter: PEFT's, MLX's, of AdapterBias, or a `.gguf`.

    Args:
        path: the directory of one adapter, or a `.gguf`.

    Raises:
        AdapterError: there is none that is read, or more than one.
    """
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    names = [name for name in (PEFT_WEIGHTS, WEIGHTS, ADAPTER_BIAS) if (path / name).exists()]
    if len(names) > 1:
        raise AdapterError(f"{path}: holds {' and '.join(names)}; keep one of them")
    gguf = sorted(path.glob("*.[gG][gG][uU][fF]"))
    if names or len(gguf) == 1:
        return path / names[0] if names else gguf[0]
    for name, why in _OTHER_FILES.items():
        if (path / name).exists():
            raise AdapterError(f"{path / name}: {why}")
    raise AdapterError(
        f"{path}: no adapter weights; expected {PEFT_WEIGHTS} (PEFT), {WEIGHTS} (MLX),"
        f" {ADAPTER_BIAS} or one .gguf"
    )


def _read_adapter_bias(file: Path) -> Adapter:
    """Read an AdapterBias: `<layer>.adapter_vector`, v `(out,)`, and `.adapter_alpha.weight`, w.

    A layer adds `v (w . x)` to the output of its feed-forward part, x the input of down_proj, so
    the LoRA has a = w and b = v. The official code gives w a bias besides, which would add one
    vector to every token; no LoRA does that, so such a file is refused. Source:
    https://arxiv.org/abs/2205.00305; names are those of its code, github.com/Allen0307/AdapterBias.
    """
    vector, scorer = ".adapter_vector", ".adapter_alpha.weight"
    layers: dict[str, dict[str, mx.array]] = {}
    problems = []
    for name, x in read_tensors(file).items():
        leaf = next((leaf for leaf in (vector, scorer) if name.endswith(leaf)), None)
        if leaf and x.size == max(x.shape, default=0):
            layers.setdefault(name.removesuffix(leaf), {})[leaf] = x.reshape(-1)
        elif name.endswith(".adapter_alpha.bias"):
            problems.append(
                f"{file}: {name}: a bias of the scorer adds one vector to every token, which no"
                " LoRA does; train it without (nn.Linear(..., bias=False))"
            )
        else:
            problems.append(
                f"{file}: {name} has shape {tuple(x.shape)}; expected only <layer>{vector} (out,)"
                f" and <layer>{scorer} (1, in)"
            )
    modules = {}
    for layer, parts in sorted(layers.items()):
        for leaf in {vector, scorer} - parts.keys():
            problems.append(f"{file}: {layer}{leaf} is missing; save both tensors of every layer")
        if len(parts) == 2:
            modules[f"{layer}.down_proj"] = LoRA(parts[scorer][:, None], parts[vector][None])
    if problems:
        raise AdapterError(problems)
    return Adapter(file.parent.name, modules)


def read_adapters(
    sources: Sequence[Source],
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any],
    is_base: Callable[[Path], bool] = lambda _: False,
    base: BaseWeights | None = None,
    expected: Sequence[str] = (),
) -> list[Adapter]:
    """Read every adapter and check it against the base model; one at a time is in memory.

    What is returned is `left_in_file`. Adapters whose configs name different base models, or others
    than are expected, get an `InputWarning`.

    Args:
        sources: what `find_adapters` found.
        shapes: module path -> (in, out) of the base model's linear modules.
        config: the base model's config.json, see `read_adapter`.
        is_base: True for a directory with a copy of the base model.
        base: the base model's weights, see `read_peft`.
        expected: names of the base model, as a pack has them.

    Raises:
        InputError: the problems of all adapters, one line each; one line for all those of another
            base model, if it has another name too.
    """
    adapters: list[Adapter] = []
    failed: dict[str, InputError] = {}
    for source in sources:
        try:
            adapter = read_adapter(source.path, shapes, config, base)
            adapter = left_in_file(adapter, source.path)
            adapters.append(replace(adapter, name=source.name, origin=source.origin))
        except InputError as error:
            failed[source.name] = error
    if failed:
        raise AdapterError(_problems(adapters, failed))
    _warn_of_bases(adapters, sources, is_base, expected)
    return adapters


def left_in_file(adapter: Adapter, path: Path) -> Adapter:
    """The same adapter with its numbers in the files that it was read from, not in memory.

    Args:
        adapter: what `read_adapter` read from `path`.
        path: its directory; an adapter in a GGUF, made of a DoRA, or whose modules have other names
            there stays in memory.
    """
    if adapter.dora_error is not None:
        return adapter
    for file, names in ((path / WEIGHTS, MLX_NAMES), (path / PEFT_WEIGHTS, PEFT_NAMES)):
        if file.is_file():
            return in_file(adapter, file, names)
    return adapter


def _problems(adapters: Sequence[Adapter], failed: Mapping[str, InputError]) -> list[str]:
    """One line for every other base model, with its adapters, and all other problems."""
    fitting = {base_key(adapter.base) for adapter in adapters} - {None}
    others: dict[str | None, list[str]] = {}
    lines: list[str] = []
    n = len(adapters) + len(failed)
    for name, error in failed.items():
        if n > 1 and isinstance(error, OtherBaseError) and base_key(error.base) not in fitting:
            others.setdefault(error.base, []).append(name)
        else:
            lines += error.problems
    alone = "run them by themselves with it as --model, or leave them out (--skip-bad)"
    for base, names in others.items():
        remedy = "give it as --model" if base and len(names) == n else alone
        lines.append(
            f"adapters: {_few(names)} ({len(names)} of {n}) do not fit the base model and name"
            f" {f'{base!r}' if base else 'none'}; {remedy}; first: {failed[names[0]].problems[0]}"
        )
    if adapters and others:
        bases = sorted({repr(adapter.base) for adapter in adapters if adapter.base})
        lines.append(
            f"adapters: {_few([adapter.name for adapter in adapters])} ({len(adapters)} of {n}) fit"
            f" the base model and name {', '.join(bases) or 'none'}; give these alone, or"
            " --skip-bad"
        )
    return lines


def _warn_of_bases(
    adapters: Sequence[Adapter],
    sources: Sequence[Source],
    is_base: Callable[[Path], bool],
    expected: Sequence[str],
) -> None:
    """Warn if configs name other bases: shapes do not tell a base model from its fine-tunes."""
    # The first name stands where one model comes in two precisions, such as 4 bit for training.
    expected = list(dict.fromkeys(expected))
    keys = {base_key(name): name for name in reversed(expected)}
    groups: dict[str, list[str]] = {}
    for adapter in adapters:
        if adapter.base:
            base = keys.setdefault(base_key(adapter.base), adapter.base)
            groups.setdefault(base, []).append(adapter.name)
    others = groups.keys() - set(expected)
    if len(others) > (not expected):
        # A path says more than a name: mlx-lm trains on a local copy in float32, say.
        copies = {
            source.name
            for source in sources
            if (source.path / CONFIG).is_file()
            and is_base(Path(stated_base(read_config(source.path))))
        }
        groups = {base: names for base, names in groups.items() if not set(names) <= copies}
    if len(groups.keys() - set(expected)) > (not expected):
        # A local path and an id may be the same model, so it is no error.
        listed = (f"{base!r} ({len(names)}: {_few(names)})" for base, names in groups.items())
        warn(
            f"adapters: found {len(groups)} names of base models, expected"
            f" {' or '.join(map(repr, expected)) or 'one'}: {', '.join(listed)}; unless all are the"
            " same model, leave out what was trained on another"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:20], "..."] if len(names) > 20 else names)
