"""Forms of a base model as mlx-lm quantizes them, each made once in the cache."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.convert import mixed_quant_predicate_builder

from d2c_mlx.models.fused import FusedModel
from d2c_mlx.models.resolve import cached_model, resolve_model, weights_digest
from d2c_mlx.models.stock import TEXTS
from d2c_mlx.utils.files import hash_file
from d2c_mlx.utils.parsing import json_or_none

Json = dict[str, Any]


def quantized_model(spec: str | None, bits: str | None) -> tuple[str, Path, Json]:
    """Find a base model, or the form of it that mlx-lm makes of its weights in 16 bit.

    Weights that only exist in few bits are dequantized first, and then rounded a second time.

    Args:
        spec: see `models.resolve.resolve_model`.
        bits: see `phone.config.BITS`; None takes the model as it is.

    Returns:
        Its name, the directory of that form, and facts: bits, how it was made, and its bytes.

    Raises:
        ModelError: no such model.
    """
    name, path = resolve_model(spec)
    config = json_or_none(path / "config.json")
    about = config if isinstance(config, dict) else {}  # mlx-lm says what is wrong with it.
    quantization = about.get("quantization", about.get("quantization_config"))
    stored = str(quantization.get("bits", "?")) if isinstance(quantization, dict) else "16"
    if bits is None or bits == stored == "16":
        return name, path, _about(path, stored, "as it is")
    model = FusedModel(path, None, 4 if bits.startswith("mixed") else int(bits))
    group = model.form["group_size"]
    if bits.startswith("mixed"):
        recipe = mixed_quant_predicate_builder(bits, model.model, group)
        model.forms = {path: recipe(path, model.modules[path]) for path in model.forms}

    # They decide how weights are read, and are copied with them.
    texts = sorted(file for file in path.iterdir() if file.suffix in TEXTS and file.is_file())
    beside = [(file.name, hash_file(file)) for file in texts]
    parts = [weights_digest(path), beside, bits, version("mlx-lm"), "v4"]
    steps = [f"dequantized from {stored} bits"] * (stored != "16")
    steps += [f"quantized by mlx-lm in groups of {group}"] * (bits != "16")
    directory = cached_model(f"{path.name}-{bits}bit", parts, model.save)
    return name, directory, _about(directory, bits, ", then ".join(steps))


def _about(path: Path, bits: str, form: str) -> Json:
    """Bits and form of a model, and the bytes of its files and of its weights in memory."""
    files = sorted(path.glob("model*.safetensors"))
    weights: Any = [mx.load(str(file)) for file in files]  # Their numbers are not read.
    return {
        "bits": bits,
        "form": form,
        "file_nbytes": sum(file.stat().st_size for file in files),
        "weights_nbytes": sum(x.nbytes for tensors in weights for x in tensors.values()),
    }
