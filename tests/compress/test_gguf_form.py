"""Forms that a GGUF holds: what the `gguf` package reads is what was stored or measured."""

import json

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as read_blocks
from gguf.quants import quantize
from helpers.gguf_files import gguf_name, in_llama_rows, read_gguf
from helpers.loras import lora_of
from helpers.tiny import ALL, tiny_model

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.gguf_format import read_gguf as read_lora
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.compress.gguf_form import gguf_store


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("gguf_form") / "model", mx.float32)
    return json.loads((model / "config.json").read_text())


@pytest.mark.parametrize("bits, most", [(8, 0.02), (4, 0.2)])
@pytest.mark.parametrize("rank", [3, 32])
def test_a_planned_form_is_what_the_reader_gets(tmp_path, config, bits, most, rank):
    rng = np.random.default_rng(0)
    adapter = Adapter("x", {m: lora_of(rng, ALL[m], 32, 1.0, mx.float32, 0.3) for m in ALL})
    modules = {m: ((min(rank, *ALL[m]), bits),) for m in ALL}
    form = gguf_store(adapter, modules).scaled(1.7)
    save_gguf(form, tmp_path / "x.gguf", config)
    again = read_lora(tmp_path / "x.gguf", ALL, config)
    _, deltas = read_gguf(tmp_path / "x.gguf")
    for module, lora in form.adapter().modules.items():
        n = modules[module][0][0]
        expected = in_llama_rows(module, lora.delta())
        np.testing.assert_allclose(deltas[gguf_name(module)], expected, rtol=1e-5, atol=1e-5)
        read = again.modules[module]
        assert mx.array_equal(lora.a, read.a) and mx.array_equal(lora.b, read.b)
        u, s, vt = np.linalg.svd(1.7 * adapter.modules[module].delta())
        best = (u[:, :n] * s[:n]) @ vt[:n]
        assert np.linalg.norm(lora.delta() - best) < most * np.linalg.norm(best)
    places = [(t.data_offset, int(t.n_bytes)) for t in GGUFReader(tmp_path / "x.gguf").tensors]
    assert all(0 <= b - a - size < 8 for (a, size), (b, _) in zip(places, places[1:]))
    kinds = {(a.kind.name, b.kind.name) for a, b in form.modules.values()}
    quantized = {8: "Q8_0", 4: "Q4_0"}[bits]
    assert (quantized, quantized if rank == 32 else "F16") in kinds


def test_error_compensation_beats_the_nearest_codes():
    """At the same bytes as `quantize` of the `gguf` package, of the same components."""
    rng, module = np.random.default_rng(1), [*ALL][4]
    adapter = Adapter("x", {module: lora_of(rng, (256, 96), 8, 1.0, mx.float32, 0.3)})
    lora = adapter.modules[module]
    kind = GGMLQuantizationType.Q4_0
    nearest = read_blocks(quantize(np.ascontiguousarray(np.array(lora.a).T), kind), kind)
    exact = lora.delta()
    plain = np.linalg.norm(np.array(lora.b).T @ nearest - exact)
    ours = gguf_store(adapter, {module: ((8, 4),)}).adapter().modules[module].delta()
    assert np.linalg.norm(ours - exact) < 0.95 * plain
