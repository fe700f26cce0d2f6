"""Base models in 4, 8 and 16 bits against stock mlx-lm and float32.

The table in docs/reference/families.md is what this test finds, as in test_gguf_families.py.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.bases import COLUMNS, TOKENS, through_all
from helpers.loras import lora_of
from helpers.losses import losses_of, sum_nll
from helpers.made_by_tests import check_table, table
from helpers.runs import config_of
from helpers.tiny import Gpu, library, quantized, tiny_model
from mlx_lm import load as stock_load

from d2c_mlx import Adapter, load_pack
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.model import Model
from d2c_mlx.pipeline import run
from d2c_mlx.run import stages

pytestmark = pytest.mark.slow

BITS = (4, 8)
cells_of: dict = {f"{bits} bits": [] for bits in BITS}


@pytest.fixture(scope="module", params=BITS)
def small(request, tmp_path_factory):
    path = tiny_model(tmp_path_factory.mktemp("quantized") / "model")
    return quantized(path, path.with_name(f"{request.param} bits"), request.param)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_losses_are_those_of_stock_mlx_lm_on_the_same_files(small, device, tmp_path, monkeypatch):
    if device == "gpu":  # By name: weights stay as they are stored.
        monkeypatch.setattr(mx, "default_device", Gpu)
    base = Model(str(small))
    kept = any(isinstance(module, nn.QuantizedLinear) for module in base.model.modules())
    assert kept == (device == "gpu") and (kept != base.can_fold)
    rng = np.random.default_rng(0)
    loras = {path: lora_of(rng, shape, 2, dtype=mx.float16, size=0.1)
             for path, shape in base.module_shapes.items()}  # fmt: skip
    Adapter("a", loras).save(tmp_path / "a", base.n_layers)
    rows = [{"prompt": f"What is {i}?", "completion": f"Answer {i}."} for i in range(3)]
    examples = base.encode("a", rows)
    got = losses_of(Engine(base), [(None, examples), (Adapter("a", loras), examples)])
    for losses, path in zip(got, (None, str(tmp_path / "a"))):
        stock, _ = stock_load(str(small), adapter_path=path)
        if device == "cpu":
            stock.set_dtype(mx.float32)
        tolerance = 1e-5 if device == "cpu" else 1e-2
        assert losses == pytest.approx(sum_nll(stock, examples), rel=tolerance)
    assert abs(got[0] - got[1]) > 0.1
    cells_of[small.name].append(f"{tolerance:g}")


def test_the_whole_program_on_a_quantized_base(small, tmp_path):
    before = sorted(path.name for path in small.iterdir())
    cells_of[small.name] += through_all(small, tmp_path)
    # Nothing was dequantized to disk.
    assert sorted(path.name for path in small.iterdir()) == before
    assert stock_load(str(small))[0](TOKENS).shape[-1] > 0


def test_table_in_the_docs():
    if any(len(cells) != 2 + len(COLUMNS) for cells in cells_of.values()):
        pytest.skip("not every cell was run, or one has failed")
    columns = ("as mlx-lm has it", "load, loss to (float32)", "to (as stored)", *COLUMNS)
    rows = [[base, *cells] for base, cells in cells_of.items()]
    check_table("tests/run/test_quantized_bases.py", table(columns, *rows))


@pytest.mark.parametrize("half", [(mx.float16, "2", 2e-3), (mx.bfloat16, "40%", 2e-2)])
def test_every_stage_in_16_bits_agrees_with_float32(tmp_path, monkeypatch, half):
    """As on Metal: here a device of that name computes in them."""
    dtype, budget, tolerance = half
    monkeypatch.setattr(stages, "ANSWERED_ROWS", 0)
    lib = library(tmp_path, ["a", "b", "c"])
    tiny_model(lib.model, dtype)
    config = config_of(lib, tmp_path / "cpu", budget=budget, probe_examples=2)
    wide = run(config, quiet=True)
    monkeypatch.setattr(mx, "default_device", Gpu)
    narrow = run(config.replace(output=str(tmp_path / "gpu")), quiet=True)
    dtypes = [session.library.base.compute_dtype for session in (wide, narrow)]
    assert dtypes == [mx.float32, dtype]
    theirs, ours = (session.read("bench.json") for session in (wide, narrow))
    assert f"mlx.core.{ours['provenance']['compute_dtype']}" == str(dtype)
    for name in ("base", "individual", "pack"):
        near = pytest.approx(theirs["methods"][name]["loss"], rel=tolerance)
        assert ours["methods"][name]["loss"] == near, name
    loaded = load_pack(narrow.path("pack")).load("a")
    assert {lora.a.dtype for lora in loaded.modules.values()} == {dtype}
