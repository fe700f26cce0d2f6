"""Reading and writing PEFT's adapter directories.

PEFT stores `lora_A (r, in)` and `lora_B (out, r)`, MLX their transposes: a conversion is a
transpose and a scale, and changes no bit of a factor. A feature that A and B alone do not describe
is refused by name.

Source: PEFT's `LoraConfig` and `tuners/lora/layer.py`,
https://github.com/huggingface/peft.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import CONFIG, Adapter, LoRA
from d2c_mlx.adapters.checks import (
    DORA,
    BaseWeights,
    base_name,
    check_base,
    pair_problems,
    read_config,
)
from d2c_mlx.adapters.tensor_file import PEFT_NAMES, read_tensors
from d2c_mlx.utils.errors import AdapterError, InputError, collect, warn
from d2c_mlx.utils.parsing import is_positive, matches_end

__all__ = ["PEFT_WEIGHTS", "PICKLE", "read_peft", "save_peft"]

PEFT_WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_TENSOR = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<leaf>[AB])\.weight")
# The magnitudes of a DoRA, and a module stored in full; older versions had longer names.
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_magnitude_vector(\.weight)?")
_WHOLE = re.compile(
    r"base_model\.model\.(?!.*\.lora_)(?P<path>.+?)(\.modules_to_save(\.default)?)?\.weight"
)

# Fields of a config whose value never changes what A and B mean on the stock base model.
_HARMLESS = frozenset(
    "alpha_pattern arrow_config auto_mapping base_model_name_or_path corda_config eva_config"
    " ensure_weight_tying exclude_modules inference_mode init_lora_weights layers_pattern"
    " layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config"
    " megatron_core peft_type peft_version qalora_group_size r rank_pattern revision"
    " runtime_config target_modules task_type use_rslora".split()
)
# Fields of a config that are refused when set, and why.
_REFUSED = {
    "use_dora": DORA,
    "use_qalora": "QALoRA pools the input before A",
    "use_bdlora": "block-diagonal LoRA stores factors in another layout",
    "lora_bias": "a bias in lora_B is no low-rank delta",
    "modules_to_save": "these modules are stored in full, beside the LoRA",
    "trainable_token_indices": "trained token embeddings are stored beside the LoRA",
    "target_parameters": "LoRA on bare parameters has another layout",
    "layer_replication": "it changes the number of layers of the base model",
    "fan_in_fan_out": "its factors are transposed",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
}
# Where the blocks of a text model are: alone, and within vision-language models of transformers.
_TEXT = {"model", "model.language_model", "language_model.model", "model.text_model"}
# Initialisations that also change the base model's weights.
_BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _refusals(config: Mapping[str, Any], path: Path, accepted: Collection[str]) -> list[str]:
    """List the fields of a PEFT config that A and B alone do not describe, one line each."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("bias", "none") != "none":
        problems.append(f"{path}: bias is {config['bias']!r}, expected 'none': trained biases")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INIT):
        problems.append(
            f"{path}: init_lora_weights is {init!r}: it changes the base model's weights too;"
            " convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    # Values of another kind would count as unset, or as true, and change every scale.
    for field in ("rank_pattern", "alpha_pattern"):
        value = config.get(field)
        if value is not None and not isinstance(value, dict):
            problems.append(
                f"{path}: {field} is {value!r}, expected an object of numbers by module, or null"
            )
        numbers = value if isinstance(value, dict) else {}
        for key in [key for key, number in numbers.items() if not is_positive(number)][:1]:
            problems.append(
                f"{path}: {field}: {key!r} is {numbers[key]!r}, expected a number above 0"
            )
    for field in ("r", "lora_alpha"):
        if not is_positive(config.get(field)):
            problems.append(f"{path}: {field} is {config.get(field)!r}, expected a number above 0")
    if not isinstance(config.get("use_rslora") or False, bool):
        problems.append(
            f"{path}: use_rslora is {config['use_rslora']!r}, expected true or false, no quotes"
        )
    for field, value in config.items():
        if not value or field in _HARMLESS or field == "bias" or field in accepted:
            continue
        reason = _REFUSED.get(field, "not known to this version, so not known to be exact")
        problems.append(f"{path}: {field} is {value!r}: {reason}")
    return problems


def read_peft(
    directory: Path,
    base: BaseWeights | None = None,
    shapes: Collection[str] | None = None,
) -> Adapter:
    """Read PEFT's layout (`adapter_model.safetensors` + its config), see `read_adapter`.

    Args:
        directory: of the adapter.
        base: the base model's weights, for what they alone tell: modules stored in full that are
            the base's own are left out with an `InputWarning`, and DoRAs become LoRAs where it has
            a `dora_rank`. Without them both are refused.
        shapes: paths of the base's linear modules; those of a text model within a vision-language
            model become these. None leaves modules stored in full to a reader who has the base.

    Raises:
        AdapterError: listing every problem of the directory, fields that A and B alone do not
            describe among them.
    """
    config, where, weights = read_config(directory), directory / CONFIG, directory / PEFT_WEIGHTS
    errors: list[InputError] = []
    tensors = collect(errors, lambda: read_tensors(weights)) or {}
    is_dora = bool(config.get("use_dora"))
    pairs: dict[str, dict[str, mx.array]] = {}
    magnitudes, whole, other = {}, {}, {}
    for name, x in sorted(tensors.items()):
        if (match := _TENSOR.fullmatch(name)) and x.ndim == 2:
            pairs.setdefault(match["path"], {})[f"lora_{match['leaf']}"] = x.T
        elif is_dora and (match := _MAGNITUDE.fullmatch(name)) and x.ndim == 1:
            magnitudes[match["path"]] = x
        elif match := _WHOLE.fullmatch(name):
            whole[match["path"]] = x
        else:
            other[name] = x
    as_dora = is_dora and base is not None and base.dora_rank is not None
    if shapes is None:
        whole, config = {}, {**config, "modules_to_save": None}
    names = _text_names(pairs, shapes or (), whole)
    held = [path for path, x in whole.items() if base is not None and base.holds(names[path], x)]
    compared = base is not None and bool(whole)
    accepted = {"use_dora": as_dora, "modules_to_save": compared}
    problems = _refusals(config, where, [field for field, yes in accepted.items() if yes])
    if compared or not config.get("modules_to_save"):
        changed = {path: x for path, x in whole.items() if path not in held}
        problems += _unknown(weights, other, changed)
    leaves = ("lora_A", "lora_B")
    problems += pair_problems(weights, pairs, leaves, magnitudes if as_dora else None)
    problems += [line for error in errors for line in error.problems]
    if problems:
        raise AdapterError(problems)
    if held:
        warn(f"{weights}: {', '.join(held)}: stored in full, as the base model has them: left out")
    scaled = _scaled_modules(pairs, config, where)
    modules = {names[path]: lora for path, lora in scaled.items()}
    adapter = Adapter(directory.name, modules, base_name(config))
    if base is None or not as_dora:
        return adapter
    return base.to_lora(adapter, {names[path]: x for path, x in magnitudes.items()})


def _text_names(
    paths: Collection[str], shapes: Collection[str], whole: Collection[str]
) -> dict[str, str]:
    """Module path -> the base's for it; the same where two text models may be meant, or none."""
    here, there = ({x.partition(".layers.")[0] for x in group} & _TEXT for group in (shapes, paths))
    if len(here) != 1 or len(there) != 1:
        return {path: path for path in (*paths, *whole)}
    (new,), (old,) = here, there
    # Embeddings and norms are beside the blocks; a LoRA there is refused by its own name.
    begins = {**dict.fromkeys(whole, "."), **dict.fromkeys(paths, ".layers.")}
    return {
        path: re.sub(rf"^{re.escape(old + begin)}", new + begin, path)
        for path, begin in begins.items()
    }


def _unknown(
    weights: Path, other: Mapping[str, mx.array], whole: Mapping[str, mx.array]
) -> list[str]:
    """Describe tensors that no LoRA of a linear module holds."""
    problems = []
    if other:
        first = min(other)
        problems.append(
            f"{weights}: {len(other)} tensors are no plain linear LoRA factor (first: {first} with"
            f" shape {tuple(other[first].shape)}, expected {PEFT_NAMES[0].format('<module>')} or"
            " .lora_B.weight); train it without them, on linear modules of the blocks alone"
        )
    if whole:
        first = min(whole)
        problems.append(
            f"{weights}: {len(whole)} modules are stored in full, and not as the base model has"
            f" them (first: {first} with shape {tuple(whole[first].shape)}): no LoRA holds such a"
            " change; train it without modules_to_save and new tokens"
        )
    return problems


def _scaled_modules(
    pairs: Mapping[str, Mapping[str, mx.array]], config: Mapping[str, Any], where: Path
) -> dict[str, LoRA]:
    """Give every factor pair the scale that PEFT would: alpha / r, or alpha / sqrt(r)."""

    def lookup(field: str, default: float, path: str) -> float:
        # PEFT's `get_pattern_key`: the first regular expression that matches the path's end.
        try:
            patterns = (config.get(field) or {}).items()
            return next((value for key, value in patterns if matches_end(key, path)), default)
        except ValueError as error:
            raise AdapterError(f"{where}: {field}: {error}") from None

    modules, wrong = {}, list[str]()
    for path, pair in sorted(pairs.items()):
        rank = int(pair["lora_A"].shape[1])
        expected = lookup("rank_pattern", config["r"], path)
        if rank != expected:
            wrong.append(f"{path} has rank {rank}, expected {expected}")
        alpha = lookup("alpha_pattern", config["lora_alpha"], path)
        a, b = (mx.contiguous(pair[leaf]) for leaf in ("lora_A", "lora_B"))
        modules[path] = LoRA(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if wrong:
        raise AdapterError(
            f"{where}: r or rank_pattern is not the rank of {len(wrong)} modules (first:"
            f" {wrong[0]}); set them to the ranks of the tensors"
        )
    return modules


def _alpha(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is `scale`; one ulp off where no float64 is exact."""
    guess = scale * rank
    near = (guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
    alpha = next((x for x in near if x / rank == scale), guess)
    return int(alpha) if alpha.is_integer() else alpha


def save_peft(
    adapter: Adapter,
    directory: str | Path,
    config: Mapping[str, Any] | None = None,
    n_layers: int | None = None,
) -> None:
    """Write PEFT's layout: `adapter_model.safetensors` + `adapter_config.json`.

    Ranks and scales per module go into `rank_pattern` and `alpha_pattern`, so no factor changes.

    Args:
        adapter: any adapter.
        directory: created if need be.
        config: the base model's config.json; without it the base is judged by its name alone.
        n_layers: blocks of the base model. If all have the same modules, `target_modules` are
            names such as `q_proj`, which every reader knows, else paths.

    Raises:
        AdapterError: mlx-lm changes the weights of that base as it loads them; nothing is written.
    """
    directory = Path(directory)
    check_base(directory, config, adapter.base)
    directory.mkdir(parents=True, exist_ok=True)
    first = next(iter(adapter.modules.values()))
    rank, alpha = first.rank, _alpha(first.scale, first.rank)
    tensors, rank_pattern, alpha_pattern = {}, {}, {}
    names = Counter(path.rpartition(".")[2] for path in adapter.modules)
    targets = names if set(names.values()) == {n_layers} else adapter.modules
    for path, lora in sorted(adapter.modules.items()):
        tensors[PEFT_NAMES[0].format(path)] = mx.contiguous(lora.a.T)
        tensors[PEFT_NAMES[1].format(path)] = mx.contiguous(lora.b.T)
        if lora.rank != rank:
            rank_pattern[path] = lora.rank
        if _alpha(lora.scale, lora.rank) != alpha:
            alpha_pattern[path] = _alpha(lora.scale, lora.rank)
    # MLX gives no reason when it opens the file itself; here a full disk is an OSError.
    with open(directory / PEFT_WEIGHTS, "wb") as file:
        mx.save_safetensors(file, tensors, metadata={"format": "pt"})
    about = {
        "base_model_name_or_path": adapter.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (directory / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
