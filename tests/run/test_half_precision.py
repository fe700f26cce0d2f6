"""Runs in 16 bits, as on Metal, against float32: here a device of that name computes in them."""

import mlx.core as mx
import pytest
from helpers.runs import config_of
from helpers.tiny import Gpu, library, tiny_model

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run import stages

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "dtype, budget, tolerance", [(mx.float16, "2", 2e-3), (mx.bfloat16, "40%", 2e-2)]
)
def test_every_stage_in_16_bits_agrees_with_float32(
    tmp_path, monkeypatch, dtype, budget, tolerance
):
    monkeypatch.setattr(stages, "ANSWERED_ROWS", 0)
    lib = library(tmp_path, ["a", "b", "c"])
    tiny_model(lib.model, dtype)
    config = config_of(lib, tmp_path / "cpu", budget=budget, probe_examples=2)
    expected = run(config, quiet=True)
    monkeypatch.setattr(mx, "default_device", Gpu)
    half = run(config.replace(output=str(tmp_path / "gpu")), quiet=True)
    assert half.library.base.compute_dtype == dtype
    assert expected.library.base.compute_dtype == mx.float32
    ours, theirs = (x.read("bench.json") for x in (half, expected))
    assert ours["provenance"]["compute_dtype"] == str(dtype).split(".")[-1]
    for name in ("base", "individual", "pack"):
        near = pytest.approx(theirs["methods"][name]["loss"], rel=tolerance)
        assert ours["methods"][name]["loss"] == near, name
    pack = load_pack(half.path("pack"))
    assert {lora.a.dtype for lora in pack.load("a").modules.values()} == {dtype}
