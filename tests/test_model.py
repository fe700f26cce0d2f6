"""The engine against the plain loop: full logits, one row at a time, no shared prefix."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import library

from d2c_mlx.convert import read_adapter
from d2c_mlx.doctor import diagnose, machine
from d2c_mlx.merge import scaled
from d2c_mlx.model import BaseModel
from d2c_mlx.probe import Evaluator
from d2c_mlx.tasks import load_task


def plain_nll(base, examples):
    total = 0.0
    for example in examples.examples:
        logits = base.model(mx.array([example.tokens[:-1]]))[0].astype(mx.float32)
        nll = nn.losses.cross_entropy(logits, mx.array(example.tokens[1:]))
        total += float(nll[example.first_target - 1 :].sum().item())
    return total


@pytest.fixture
def tiny(tmp_path):
    paths = library(tmp_path, ["a", "b"])
    base = BaseModel(str(paths.model))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "ab"]
    sets = [base.encode(name, load_task(paths.tasks / name).test) for name in "ab"]
    return base, adapters, sets


@pytest.mark.parametrize("max_tokens", [1, 60, 2048])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_savings_change_nothing(tiny, max_tokens, prefix, head):
    base, (adapter, _), sets = tiny
    assert base._head is not None and base._prefix_ok
    base._prefix_ok = prefix
    base._head = base._head if head else None
    for attached in (None, adapter):
        base.attach(attached)
        for got, one in zip(base.nll(sets, max_tokens), sets):
            assert got == pytest.approx(plain_nll(base, one), rel=1e-5)


def test_a_value_does_not_depend_on_what_else_is_asked(tiny):
    base, (adapter, _), sets = tiny
    base.attach(adapter)
    together = base.nll(sets)
    assert together == [base.nll([one])[0] for one in sets]


def test_swapping_leaves_nothing_behind(tiny):
    base, (first, second), sets = tiny
    base.attach(None)
    bare = base.nll(sets)
    base.attach(first)
    alone = base.nll(sets)
    part = type(second)("part", dict(list(second.modules.items())[:1]), second.base)
    base.attach(part)
    base.attach(first)
    assert base.nll(sets) == alone != bare
    base.attach(None)
    assert base.nll(sets) == bare


def test_capped_logits_are_noticed(tiny):
    """A head that does more than multiply is not used alone."""
    base, _, _ = tiny
    plain = type(base.model).__call__

    class Capped(type(base.model)):
        def __call__(self, *args, **kwargs):
            return 0.1 * mx.tanh(plain(self, *args, **kwargs))

    base.model.__class__ = Capped
    assert base._prove_head() is None


def test_losses_are_computed_once_and_survive_on_disk(tiny, tmp_path):
    base, (first, second), sets = tiny
    evaluator = Evaluator(base, tmp_path / "losses.jsonl")
    before = evaluator.losses([(first, sets), (None, sets[:1]), (first, sets)])
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 3
    base.nll = None  # a second evaluation would fail
    again = Evaluator(base, tmp_path / "losses.jsonl").losses([(first, sets), (None, sets[:1])])
    assert [x.tolist() for x in again] == [x.tolist() for x in before[:2]]
    with pytest.raises(TypeError):
        Evaluator(base, tmp_path / "losses.jsonl").losses([(second, sets)])


def test_the_digest_follows_content_not_names(tiny):
    _, (first, second), _ = tiny
    assert first.digest != second.digest != scaled(second, 2.0).digest
    assert type(first)("other", first.modules, None, ("x",)).digest == first.digest


@pytest.mark.parametrize("metal", [True, False])
def test_machine_reports_what_the_device_knows(monkeypatch, metal):
    """Both sides of the Apple-only keys: `mx.device_info` has more of them on Metal."""
    info = {"device_name": "Apple M9", "memory_size": 8 << 30}
    info["max_recommended_working_set_size"] = 6 << 30
    monkeypatch.setattr(mx, "device_info", lambda: info if metal else {"device_name": "x"})
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    facts = machine()
    assert (facts["backend"] == "metal") is metal
    assert ("working_set" in facts) is metal
    assert facts["memory"] == 8 << 30 if metal else facts["memory"] > 1 << 30
    names = {finding.name for finding in diagnose()}
    assert ("gpu memory" in names) is metal


def test_metal_keeps_the_dtype_of_the_base(tiny, monkeypatch, tmp_path):
    """On a GPU device weights stay as stored; here the same code runs with that device named."""
    paths = library(tmp_path / "half", ["a"])

    class Gpu:
        type = mx.DeviceType.gpu

    original = mx.default_device()
    monkeypatch.setattr(mx, "default_device", Gpu)
    monkeypatch.setattr(mx, "default_stream", lambda _: mx.new_stream(original))
    base = BaseModel(str(paths.model))
    assert base.compute_dtype == base.dtype
    assert base.n_streams == 1
    assert np.isfinite(base.nll([base.encode("a", load_task(paths.tasks / "a").test)])).all()
