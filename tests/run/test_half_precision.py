"""Runs in 16 bits, as on Metal, against float32: here a device of that name computes in them."""

import mlx.core as mx
import pytest
from helpers.tiny import Gpu, library, tiny_model

from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run import stages
from d2c_mlx.run.config import RunConfig

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 2e-3), (mx.bfloat16, 2e-2)])
def test_every_stage_in_16_bits_agrees_with_float32(tmp_path, monkeypatch, dtype, tolerance):
    monkeypatch.setattr(stages, "ANSWERED_ROWS", 0)
    lib = library(tmp_path, ["a", "b", "c"])
    tiny_model(lib.model, dtype)
    slots = RunConfig(
        model=str(lib.model), adapters=str(lib.adapters), tasks=str(lib.tasks), budget="2",
        output=str(tmp_path / "cpu-slots"), baselines=(), probe_examples=2, test_examples=2,
            )  # fmt: skip
    plan = slots.replace(budget="40%", output=str(tmp_path / "cpu-plan"))
    expected = {one.budget.text: run(one, quiet=True) for one in (slots, plan)}
    monkeypatch.setattr(mx, "default_device", Gpu)
    for one in (slots, plan):
        found = run(one.replace(output=one.output.replace("cpu", "gpu")), quiet=True)
        assert found.library.base.compute_dtype == dtype
        assert expected[one.budget.text].library.base.compute_dtype == mx.float32
        ours, theirs = (x.read("bench.json") for x in (found, expected[one.budget.text]))
        assert ours["provenance"]["compute_dtype"] == str(dtype).split(".")[-1]
        for name in ("base", "individual", "pack"):
            near = pytest.approx(theirs["methods"][name]["loss"], rel=tolerance)
            assert ours["methods"][name]["loss"] == near, name
        pack = load_pack(found.path("pack"))
        assert {lora.a.dtype for lora in pack.load("a").modules.values()} == {dtype}
