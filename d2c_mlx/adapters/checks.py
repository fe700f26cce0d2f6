"""Parts that all readers of adapters share: the config, checks, DoRAs as LoRAs.

A DoRA gives the rows of W + s B A learned lengths m. On a given base that is an addition,
dW = diag(m / |W + s B A|) (W + s B A) - W with the length of each row, but one of full rank.
Source: https://arxiv.org/abs/2402.09353, as in PEFT's `tuners/lora/dora.py` and mlx-lm's
`tuner/dora.py`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import CONFIG, Adapter, LoRA
from d2c_mlx.adapters.core_space import best_factors
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.parsing import parse_json

# How names of models end that hold another's weights in another precision or file.
_PRECISION = re.compile(
    r"[-_.](unsloth|bnb|mlx|gguf|gptq|awq|dwq|\d-?bits?|int[48]|fp8|b?fp?16|fp32|float(16|32)|"
    r"i?q\d(_\w+)?)$"
)
# Why a DoRA is refused, of PEFT or mlx-lm.
DORA = (
    "a DoRA scales each row of the merged weight, the base's own numbers too, by a learned"
    " magnitude: the update is no low-rank addition, so it cannot be merged or packed exactly;"
    " run and convert take it in as a LoRA, and show the error, with --accept-dora RANK"
)
# Norm of an update beyond which an adapter is refused. Weights have norms of a few hundred; and far
# above, merges and their scales would leave float16.
_MAX_NORM = 1e6


def read_config(directory: Path) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`; AdapterError if it is missing or no JSON object."""
    path = directory / CONFIG
    try:
        config = parse_json(read_text(path))
    except (ValueError, OSError) as error:
        what = "not readable as JSON" if path.exists() else "missing"
        raise AdapterError(f"{path}: {what} ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def base_name(config: Mapping[str, object]) -> str | None:
    """The base model's name as an `adapter_config.json` states it; None if it states none.

    Only the last part is kept of a path: the rest tells who trained the adapter, and a pack would
    carry it on.
    """
    name = str(config.get("base_model_name_or_path") or config.get("model") or "")
    # A path and no hub id: absolute, in a home directory, ./ or ../, an address, or of Windows.
    if name.startswith(("/", "~", ".")) or {":", "\\"} & set(name):
        parts = [part for part in re.split(r"[/\\:]", name) if part.strip(".")]
        name = parts[-1] if parts and parts[-1][0] != "~" else ""
    return name or None


def base_key(name: str) -> str:
    """The base model's name without owner and precision, in small letters.

    `unsloth/Llama-3.2-1B-bnb-4bit` and `mlx-community/Llama-3.2-1B-4bit` are one.
    """
    key = name.rpartition("/")[2].lower()
    while (shorter := _PRECISION.sub("", key)) not in ("", key):
        key = shorter
    return key


def check_base(where: Path, config: Mapping[str, Any] | None, name: str | None = None) -> None:
    """Refuse Falcon H1, whose weights mlx-lm multiplies as it loads them, by module.

    B A of the stored weights is then not dW of the loaded ones, so PEFT and GGUF mean another
    update than mlx-lm. Call it before a PEFT or GGUF adapter is read from, or written to, `where`.
    Without the base model's config.json its name decides.

    Raises:
        AdapterError: it is that base model.
    """
    base = (name or "") if config is None else str(config.get("model_type"))
    if re.search(r"falcon[-_ ]?h1", base, re.IGNORECASE):
        raise AdapterError(
            f"{where}: the base model is {base!r}: mlx-lm folds multipliers into its weights, so a"
            " LoRA means another dW in PEFT and GGUF; use adapters in MLX's format"
        )


def check_adapter(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], path: Path) -> None:
    """Check every module of an adapter from `path` against its base, and how large updates are.

    `shapes` are those of `read_adapter`.

    Raises:
        AdapterError: modules that the base has not, shapes of another base, or updates whose norm
            is beyond any use; a line for each of the three.
    """
    problems = []
    if unknown := [module for module in adapter.modules if module not in shapes]:
        problems.append(
            f"{path}: {len(unknown)} modules are no linear layer of a transformer block of the"
            f" base model (first: {unknown[0]}); embeddings, lm_head, experts and vision parts"
            " cannot carry a LoRA that every runtime loads; train it without them"
        )
    loras, bounds = adapter.modules.items(), []
    if wrong := {m: x.shape for m, x in loras if shapes.get(m, x.shape) != x.shape}:
        first = next(iter(wrong))
        problems.append(
            f"{path}: {len(wrong)} modules have the shape of another base model; first: {first}:"
            f" found in, out = {wrong[first]}, expected {shapes[first]} (the adapter names base"
            f" {adapter.base!r}); give its own base as --model"
        )
    for _, lora in loras:
        # The Frobenius norm of dW is at most the sum of the norms of its components.
        a, b = lora.a.astype(mx.float32), lora.b.astype(mx.float32)
        columns, rows = mx.sqrt(mx.square(a).sum(axis=0)), mx.sqrt(mx.square(b).sum(axis=1))
        bounds.append(lora.scale * (columns * rows).sum())
    norms: Any = mx.stack(bounds).tolist()  # a GPU is waited for once
    if large := {m: norm for m, norm in zip(adapter.modules, norms) if not norm <= _MAX_NORM}:
        first = next(iter(large))
        problems.append(
            f"{path}: {len(large)} modules change their weight beyond reason (first: {first}: norm"
            f" up to {large[first]:.1e}, at most {_MAX_NORM:.0e} is read); look at its scale"
            " (alpha), or train it again"
        )
    if problems:
        raise AdapterError(problems)


def pair_problems(
    path: Path,
    pairs: Mapping[str, Mapping[str, mx.array]],
    leaves: tuple[str, str],
    magnitudes: Mapping[str, mx.array] | None = None,
) -> list[str]:
    """Factors that are missing, empty or of two ranks, one line per module; and bad magnitudes.

    Args:
        path: the file to name in messages.
        pairs: module path -> leaf -> factor, `(in, r)` and `(r, out)`.
        leaves: names of the two factors in this format, such as `lora_A` and `lora_B`.
        magnitudes: module path -> m `(out,)` of a DoRA; None of a LoRA.
    """
    problems = []
    outputs = {module: x.shape for module, x in (magnitudes or {}).items()}
    for module in sorted(pairs.keys() | outputs.keys()):
        shapes = [getattr(pairs.get(module, {}).get(leaf), "shape", None) for leaf in leaves]
        a, b = shapes
        if a is None or b is None or 0 in (*a, *b) or a[1] != b[0]:
            problems.append(
                f"{path}: {module}: found {leaves[0]} of shape {a} and {leaves[1]} of shape {b},"
                " expected (in, r) and (r, out), neither of them empty"
            )
        elif magnitudes is not None and outputs.get(module) != b[1:]:
            problems.append(
                f"{path}: {module}: found magnitudes of shape {outputs.get(module)}, expected one"
                " for each output; save the DoRA again"
            )
    return problems


@dataclass(frozen=True)
class DoraBase:
    """The base model of DoRAs that are to become LoRAs.

    Attributes:
        weight: module path -> its weight in float32, dequantized, `(out, in)` of a linear module;
            None where the base has no such module.
        rank: of the LoRAs.
    """

    weight: Callable[[str], mx.array | None]
    rank: int

    def to_lora(self, dora: Adapter, magnitudes: Mapping[str, mx.array]) -> Adapter:
        """The LoRA of `rank` that is closest to a DoRA, in the dtype of its factors.

        Modules that the base has not, or has in another shape, stay as they are: `check_adapter`
        refuses them.

        Args:
            dora: its factors alone; the result has a `dora_error`.
            magnitudes: module path -> m `(out,)`.
        """
        modules, lost, total = dict(dora.modules), 0.0, 0.0
        for path, lora in dora.modules.items():
            stored = self.weight(path)
            if stored is None or stored.shape != lora.shape[::-1]:
                continue
            weight, magnitude = np.array(stored), np.array(magnitudes[path].astype(mx.float32))
            whole = weight + lora.delta()
            length = np.linalg.norm(whole, axis=1)
            # A row of zeros has no direction, and stays.
            delta = whole * (magnitude / np.where(length > 0, length, 1))[:, None] - weight
            a, b = best_factors(delta, self.rank)
            kind = lora.a.dtype
            modules[path] = LoRA(mx.array(a).astype(kind), mx.array(b).astype(kind))
            lost += float(np.square(modules[path].delta() - delta).sum(dtype=np.float64))
            total += float(np.square(delta).sum(dtype=np.float64))
        return replace(dora, modules=modules, dora_error=(lost / total) ** 0.5 if total else 0.0)
