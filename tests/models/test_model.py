"""Losses kept by content, and what a machine says of itself."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.tiny import Gpu, library, tiny_model
from mlx_lm.models import lfm2

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.model import Model
from d2c_mlx.models.stock import stored_dtype
from d2c_mlx.models.tasks import load_task
from d2c_mlx.run.doctor import diagnose
from d2c_mlx.utils.device import machine


@pytest.fixture
def tiny(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    base = Model(str(paths.model))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "ab"]
    sets = [base.encode(name, load_task(paths.tasks / name).test) for name in "ab"]
    return base, adapters, sets


def test_losses_are_computed_once_and_survive_on_disk(tiny, tmp_path):
    base, (first, second), sets = tiny
    engine, path = Engine(base), tmp_path / "losses.sqlite"
    scorer = Scorer(engine, LossCache(path))
    before = scorer.losses([(first, sets), (None, sets[:1]), (first, sets)])
    assert (scorer.counts["asked"], scorer.counts["done"]) == (5, 3)
    again = Scorer(engine, LossCache(path))
    after = again.losses([(first, sets), (None, sets[:1])])
    assert [x.tolist() for x in after] == [x.tolist() for x in before[:2]]
    assert again.counts["done"] == 0
    again.losses([(second, sets)])
    assert again.counts["done"] == 2


def test_losses_in_parts_are_those_of_the_whole(tiny):
    base, (first, second), sets = tiny
    scorer = Scorer(Engine(base))
    mixed = [sets[0].halved(), sets[1]]
    assert [len(one.parts) for one in mixed] == [2, 1]
    jobs = [(first, mixed), (None, mixed[:1]), (second, mixed[1:])]
    for parts, whole in zip(scorer.losses(jobs, in_parts=True), scorer.losses(jobs)):
        assert parts == pytest.approx(whole, rel=1e-5)


def test_the_digest_follows_content_not_names(tiny):
    _, (first, second), _ = tiny
    assert first.digest != second.digest != scaled(second, 2.0).digest
    assert type(first)("other", first.modules, None, ("x",)).digest == first.digest


def test_a_model_is_known_by_all_of_its_weights(tmp_path, monkeypatch):
    """Two fine-tunings have the same config, and files of the same sizes that end alike."""
    monkeypatch.setattr("helpers.tiny.INTERMEDIATE", 8192)
    one, other = (tiny_model(tmp_path / name) for name in ("one", "other"))
    assert Model(str(one)).fingerprint == Model(str(other)).fingerprint
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    assert len(content) > 3 << 20
    content[-(2 << 20)] ^= 1
    weights.write_bytes(content)
    assert Model(str(one)).fingerprint != Model(str(other)).fingerprint


@pytest.mark.parametrize("metal", [True, False])
def test_machine_reports_what_the_device_knows(monkeypatch, metal):
    """Both sides of the Apple-only keys: `mx.device_info` has more of them on Metal."""
    info = {"device_name": "Apple M9", "memory_size": 8 << 30}
    info["max_recommended_working_set_size"] = 6 << 30
    monkeypatch.setattr(mx, "device_info", lambda: info if metal else {"device_name": "x"})
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    assert machine()["backend"] == "cpu"  # the device, wherever there is another
    if metal:
        monkeypatch.setattr(mx, "default_device", Gpu)
    facts = machine()
    assert (facts["backend"] == "metal") is metal
    assert ("working_set" in facts) is metal
    assert facts["memory"] == 8 << 30 if metal else facts["memory"] > 1 << 30
    (memory,) = (finding.value for finding in diagnose() if finding.name == "memory")
    assert ("recommended for the GPU" in memory) is metal


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_the_dtype_of_a_model_whose_last_norm_has_another_name(dtype):
    config = {
        "model_type": "lfm2", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 32,
        "block_ff_dim": 64, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1], "rope_theta": 10000.0,
    }  # fmt: skip
    model = lfm2.Model(lfm2.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    assert stored_dtype(model) == dtype


def test_a_model_without_a_norm_has_no_dtype_of_its_own():
    assert stored_dtype(nn.Linear(2, 2)) is None
    assert stored_dtype(nn.RMSNorm(2)) is None
