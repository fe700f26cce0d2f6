"""One pack of each storage, for tests that only read; `copy_of` gives one to damage or change."""

import json
import shutil

import mlx.core as mx
import pytest
from helpers.adapters import SERVES, adapter_of
from helpers.tiny import ALL, LAYERS, tiny_model

from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.compress.gguf_form import gguf_store
from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.resolve import config_digest
from d2c_mlx.packs.manifest import GgufPlaces, Manifest
from d2c_mlx.packs.write import write_pack


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A float32 base, so that stock mlx-lm computes in the precision that we compute in."""
    return tiny_model(tmp_path_factory.mktemp("packs") / "model", mx.float32)


@pytest.fixture(scope="session")
def about(model):
    return Manifest(model="tiny/llama", config_hash=config_digest(model), n_layers=LAYERS)


@pytest.fixture(scope="session")
def plain(tmp_path_factory, about):
    """All modules, and one module of one block only."""
    adapters = [adapter_of("one"), adapter_of("two", [*ALL][-7:-6], seed=1)]
    return write_pack(tmp_path_factory.mktemp("plain") / "pack", adapters, about)


@pytest.fixture(scope="session")
def compact(tmp_path_factory, about):
    """Ranks and bits that differ by module, an adapter that has lost all, a task of the base."""
    one, two = adapter_of("one"), adapter_of("two", mixed=True, seed=1)
    adapters = [
        compress(one, dict.fromkeys(one.modules, [(3, 4)])),
        compress(two, {p: [(1, 16), (1, 8)] if "v_proj" in p else [(1, 16)] for p in two.modules}),
        compress(one, dict.fromkeys(one.modules, ())),
    ]
    return write_pack(tmp_path_factory.mktemp("compact") / "pack", adapters, about, SERVES)


@pytest.fixture(scope="session")
def gguf(tmp_path_factory, model, about):
    """A file per adapter, in 16 and in 8 bit, and a task of the base."""
    root, config = tmp_path_factory.mktemp("gguf"), json.loads((model / "config.json").read_text())
    save_gguf(adapter_of("one"), root / "one.gguf", config)
    two = gguf_store(adapter_of("two"), dict.fromkeys(ALL, ((3, 8),)))
    save_gguf(two, root / "two.gguf", config)
    facts = about.model_copy(update={"gguf": GgufPlaces.of(config, list(ALL))})
    files = [root / "one.gguf", root / "two.gguf"]
    return write_pack(root / "pack", files, facts, {"one": 0, "two": 1, "none": None})


@pytest.fixture(params=["plain", "compact", "gguf"])
def pack(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy_of(tmp_path):
    """`copy_of(pack, **fields)`: a copy, whose manifest says `fields` too; `...` takes one out."""

    def copy(pack, **fields):
        path = tmp_path / "pack"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(pack.path, path)
        manifest = {**json.loads((path / "manifest.json").read_text()), **fields}
        manifest = {key: value for key, value in manifest.items() if value is not ...}
        (path / "manifest.json").write_text(json.dumps(manifest))
        return path

    return copy
