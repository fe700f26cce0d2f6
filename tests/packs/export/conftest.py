"""A plain and a compact pack of the same model."""

import mlx.core as mx
import pytest
from helpers.compact import SERVES
from helpers.exported import adapter_of
from helpers.tiny import ALL, LAYERS, tiny_model

from d2c_mlx.compress.quantize import compress
from d2c_mlx.packs.pack import PackInfo
from d2c_mlx.packs.write import write_compact_pack, write_pack
from d2c_mlx.utils.files import hash_file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("export") / "model", mx.float32)


@pytest.fixture(scope="module")
def about(model):
    return {
        "model": "tiny/llama",
        "config_hash": hash_file(model / "config.json"),
        "n_layers": LAYERS,
        "budget": "-",
        "max_bytes": None,
    }


@pytest.fixture
def plain(tmp_path, about):
    """All modules, and one module of one block only."""
    adapters = [adapter_of("one"), adapter_of("two", [*ALL][-7:-6], seed=1)]
    return write_pack(tmp_path / "plain", adapters, PackInfo(**about))


@pytest.fixture
def compact(tmp_path, about):
    one, two = adapter_of("one"), adapter_of("two", mixed=True, seed=1)
    adapters = [
        compress(one, dict.fromkeys(one.modules, [(3, 4)])),
        compress(two, {p: [(1, 16), (1, 8)] if "v_proj" in p else [(1, 16)] for p in two.modules}),
        compress(one, dict.fromkeys(one.modules, ())),
    ]
    return write_compact_pack(tmp_path / "compact", adapters, SERVES, PackInfo(**about))


@pytest.fixture(params=["plain", "compact"])
def pack(request):
    return request.getfixturevalue(request.param)
