"""LoRAQuant as a peer: codes, bytes, and the split of components."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import lora_of

from benchmarks.formats.loraquant import LoraQuant, important
from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compress.compact_file import write_compact
from d2c_mlx.compress.quantize import compress


@pytest.fixture(scope="module")
def adapter():
    rng = np.random.default_rng(0)
    shapes = {"q": (192, 160), "v": (192, 64)}
    return Adapter("x", {p: lora_of(rng, s, 4, 1.0, mx.float32, 0.3) for p, s in shapes.items()})


def test_bytes_are_those_of_codes_scales_zero_points_and_a_compact_header(adapter, tmp_path):
    quant = LoraQuant([adapter], 2, rest=True)
    (whole,) = {quant.nbytes(1.0)}
    small = compress(adapter, dict.fromkeys(adapter.modules, [(4, 2)]))
    write_compact(tmp_path / "x", [small])
    header = 8 + int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    # Four components; 192 and 160 numbers are two groups of 128, 64 are one. Two modules' counts.
    rows = 4 * sum(w / 4 + g * 2.25 for w, g in ((192, 2), (160, 2), (192, 2), (64, 1)))
    assert whole == header + 2 + rows
    most = quant.nbytes(0.5)
    share = quant.fit(most)
    assert quant.nbytes(share) <= most < quant.nbytes(share + 1e-3)
    assert LoraQuant([adapter], 2, rest=False).fit(10) == 0


def test_the_important_part_holds_its_share(adapter):
    exact = {path: lora.delta() for path, lora in adapter.modules.items()}
    for path, matrix in exact.items():
        energy = np.linalg.svd(matrix, compute_uv=False)[:4] ** 2
        n = important(LoraQuant([adapter], 2, True)._parts["x"][path], 0.7)
        assert energy[: n - 1].sum() < 0.7 * energy.sum() <= energy[:n].sum() * (1 + 1e-5)

    def error(bits, rest, share):
        stored = LoraQuant([adapter], bits, rest).adapter("x", share)
        return sum(np.linalg.norm(stored.modules[p].delta() - exact[p]) ** 2 for p in exact)

    assert error(3, True, 1.0) < error(2, True, 1.0) < error(2, True, 0.5)
    assert error(3, True, 0.7) < error(3, False, 0.7)
