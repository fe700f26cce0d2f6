"""One base model through the whole program: runs for both kinds of budget, exports, serving."""

import warnings

import mlx.core as mx
import numpy as np

from d2c_mlx import Adapter, RunConfig, load, load_pack
from d2c_mlx.models.model import Model, block_index
from d2c_mlx.packs.export import FORMATS, export
from d2c_mlx.pipeline import run
from d2c_mlx.utils.errors import InputWarning
from helpers.loras import lora_of
from helpers.tiny import task

TOKENS = mx.arange(1, 25)[None] * 7 % 250
# What a base goes through, in a table's head.
COLUMNS = ("run, slots", "run, bytes", "export", "serve")


def through_all(model, root):
    """The base's cells of `COLUMNS`, once two random adapters have gone all the way."""
    base, rng = Model(str(model)), np.random.default_rng(1)
    for name in "ab":
        # Of the last two blocks, so that states below them are kept.
        loras = {path: lora_of(rng, shape, 2, dtype=mx.float16, size=0.1)
                 for path, shape in base.module_shapes.items()
                 if block_index(path) >= base.n_layers - 2}  # fmt: skip
        Adapter(name, loras).save(root / "adapters" / name, base.n_layers)
        task(root / "tasks", name)
    config = RunConfig(
        model=str(model), adapters=str(root / "adapters"), tasks=str(root / "tasks"),
        output=str(root / "slots"), budget="1", baselines=(), probe_examples=2, test_examples=2,
    )  # fmt: skip
    with warnings.catch_warnings():
        # Of defaults that an architecture does not allow.
        warnings.simplefilter("ignore", InputWarning)
        slots = run(config, until="pack", quiet=True)
        config = config.replace(budget="40%", output=str(root / "bytes"))
        packed = run(config, until="pack", quiet=True)
    for to in FORMATS:
        export(load_pack(slots.path("pack")), to, root / to, str(model))
    for session in (slots, packed):
        pack = load_pack(session.path("pack"))
        served, _ = load(pack, "a", str(model))
        served.set_dtype(mx.float32)
        base.attach(pack.load("a"))
        y, expected = (np.array(model(TOKENS)) for model in (served, base.model))
        assert np.abs(y - expected).max() < 1e-3 * np.abs(expected).max()
    method = slots.read("merges.json")[0]["method"]
    assert method in ("layerwise", "regmean++") and packed.read("plan.json")["units"]
    return "yes", "yes", ", ".join(FORMATS), "yes"
