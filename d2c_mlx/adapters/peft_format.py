"""Reading and writing PEFT's adapter directories.

PEFT stores `lora_A (r, in)` and `lora_B (out, r)`, MLX their transposes: a conversion is a
transpose and a scale, and changes no bit of a factor. A feature that A and B alone do not describe
is refused by name. Source: PEFT's `LoraConfig` and `tuners/lora/layer.py`,
https://github.com/huggingface/peft.
"""

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
    DoraBase,
    base_name,
    check_base,
    pair_problems,
    read_config,
)
from d2c_mlx.adapters.tensor_file import PEFT_NAMES, PEFT_WEIGHTS, read_tensors
from d2c_mlx.utils.errors import AdapterError, InputError, collect
from d2c_mlx.utils.parsing import is_positive, matches_end

# Factors, and the magnitudes of a DoRA, which had a longer name in older versions.
_TENSOR = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?P<leaf>lora_[AB]|lora_magnitude_vector)(\.weight)?"
)
# Fields of a config whose value never changes what A and B mean on the stock base model.
_HARMLESS = frozenset(
    "alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config eva_config"
    " ensure_weight_tying exclude_modules inference_mode init_lora_weights layers_pattern"
    " layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_config"
    " megatron_core peft_type peft_version qalora_group_size r rank_pattern revision"
    " runtime_config target_modules task_type use_rslora".split()
)
# Where the blocks of a text model are: alone, and within vision-language models of transformers.
_TEXT = {"model", "model.language_model", "language_model.model", "model.text_model"}
# Initialisations that also change the base model's weights.
_BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft(
    directory: Path, dora: DoraBase | None = None, shapes: Collection[str] = ()
) -> Adapter:
    """Read PEFT's layout (`adapter_model.safetensors` + its config), see `read_adapter`.

    Paths of a text model within a vision-language model become those of the base.

    Raises:
        AdapterError: listing every problem of the directory, fields that A and B alone do not
            describe among them.
    """
    config, where, weights = read_config(directory), directory / CONFIG, directory / PEFT_WEIGHTS
    dora = dora if config.get("use_dora") else None
    problems = _refusals(config, where, dora is not None)
    errors: list[InputError] = []
    pairs: dict[str, dict[str, mx.array]] = {}
    magnitudes, other = {}, {}
    for name, x in sorted((collect(errors, lambda: read_tensors(weights)) or {}).items()):
        match = _TENSOR.fullmatch(name)
        if match and match["leaf"] == "lora_magnitude_vector" and config.get("use_dora"):
            magnitudes[match["path"]] = x
        elif match and name.endswith(f"{match['leaf']}.weight") and x.ndim == 2:
            pairs.setdefault(match["path"], {})[match["leaf"]] = x.T
        else:
            other[name] = x
    # Where the config has modules stored in full, they are in the file too.
    if other and not config.get("modules_to_save"):
        first = min(other)
        problems.append(
            f"{weights}: {len(other)} tensors are no plain linear LoRA factor (first: {first} with"
            f" shape {tuple(other[first].shape)}, expected {PEFT_NAMES[0].format('<module>')} or"
            " .lora_B.weight); train it without them, on linear modules of the blocks alone"
        )
    problems += pair_problems(weights, pairs, ("lora_A", "lora_B"), magnitudes if dora else None)
    problems += [line for error in errors for line in error.problems]
    if problems:
        raise AdapterError(problems)
    # Names of the base's text model; the same where two may be meant, or none.
    parents = [{x.partition(".layers.")[0] for x in group} & _TEXT for group in (pairs, shapes)]
    names = {path: path for path in pairs}
    if list(map(len, parents)) == [1, 1]:
        (old,), (new,) = parents
        names = {path: re.sub(rf"^{re.escape(old)}\.layers\.", f"{new}.layers.", path)
                 for path in pairs}  # fmt: skip
    loras = _scaled_modules(pairs, config, where)
    modules = {names[path]: lora for path, lora in loras.items()}
    adapter = Adapter(directory.name, modules, base_name(config))
    if dora is None:
        return adapter
    return dora.to_lora(adapter, {names[path]: x for path, x in magnitudes.items()})


def _refusals(config: Mapping[str, Any], path: Path, as_lora: bool) -> list[str]:
    """List the fields of a PEFT config that A and B alone do not describe, one line each."""
    init = config.get("init_lora_weights", True)
    changed = isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INIT)
    patterns = {
        field: {} if config.get(field) is None else config[field]
        for field in ("rank_pattern", "alpha_pattern")
    }
    # Values of another kind would count as unset, or as true, and change every scale.
    rules = [
        ("peft_type", config.get("peft_type") == "LORA", "'LORA'"),
        ("bias", config.get("bias", "none") == "none", "'none': trained biases"),
        ("r", is_positive(config.get("r")), "a number above 0"),
        ("lora_alpha", is_positive(config.get("lora_alpha")), "a number above 0"),
        ("use_rslora", isinstance(config.get("use_rslora") or False, bool), "true or false"),
        *((field, isinstance(value, dict) and all(map(is_positive, value.values())),
           "an object of numbers above 0 by module, or null") for field, value in patterns.items()),
        ("init_lora_weights", not changed, "one that leaves the base model's weights as they are;"
         " convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"),
    ]  # fmt: skip
    problems = [f"{path}: {field} is {config.get(field)!r}, expected {expected}"
                for field, good, expected in rules if not good]  # fmt: skip
    for field, value in config.items():
        if value and field not in _HARMLESS and not (field == "use_dora" and as_lora):
            reason = "A and B alone do not describe it; train a plain LoRA, or without it"
            reason = DORA if field == "use_dora" else reason
            problems.append(f"{path}: {field} is {value!r}, expected none: {reason}")
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
    names = Counter(path.rpartition(".")[2] for path in adapter.modules)
    targets = names if set(names.values()) == {n_layers} else adapter.modules
    loras = dict(sorted(adapter.modules.items()))
    ranks = {path: lora.rank for path, lora in loras.items()}
    alphas = {path: _alpha(lora.scale, lora.rank) for path, lora in loras.items()}
    tensors = {}
    for path, lora in loras.items():
        tensors[PEFT_NAMES[0].format(path)] = mx.contiguous(lora.a.T)
        tensors[PEFT_NAMES[1].format(path)] = mx.contiguous(lora.b.T)
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
        "rank_pattern": {path: x for path, x in ranks.items() if x != rank},
        "alpha_pattern": {path: x for path, x in alphas.items() if x != alpha},
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (directory / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
