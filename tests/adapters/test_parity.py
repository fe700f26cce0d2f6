"""Our numbers against PEFT on torch and against stock mlx-lm, on real adapters and real rows."""

import pytest
import torch
from helpers.losses import stock_loss
from mlx_lm import load as stock_load
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2c_mlx.adapters.reading import find_adapters, read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.export import export
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack


def _ours(base, adapter, examples):
    ((_, rows),) = Engine(base).run([(adapter, examples)])
    total = rows.sum()
    return total / examples.n_targets


def _torch_loss(model, examples):
    """Mean NLL over target tokens, one row at a time: no padding, no prefix, full logits."""
    total = 0.0
    with torch.inference_mode():
        for example in examples.examples:
            tokens = torch.tensor([example.tokens])
            logits = model(tokens[:, :-1]).logits[0].double()
            nll = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
            total += nll[example.first_target - 1 :].sum().item()
    return total / examples.n_targets


@pytest.fixture(scope="module")
def torch_base(float_base):
    return AutoModelForCausalLM.from_pretrained(float_base, dtype=torch.float32).eval()


@pytest.mark.slow
def test_every_converted_adapter_has_the_loss_that_peft_has(base, torch_base, library, rows):
    worst = {}
    for source in find_adapters(library / "adapters"):
        name, path = source.name, source.path
        examples = base.encode(name, load_task(library / "tasks" / name).test[:rows])
        ours = _ours(base, read_adapter(path, base.module_shapes), examples)
        model = PeftModel.from_pretrained(torch_base, path).eval()
        theirs = _torch_loss(model, examples)
        model.unload()
        worst[name] = abs(ours - theirs)
        print(f"{name:<12} ours {ours:.6f}  PEFT {theirs:.6f}  difference {worst[name]:.1e}")
    assert len(worst) > 1
    assert max(worst.values()) < 1e-4, worst


@pytest.mark.slow
def test_stock_mlx_lm_and_peft_give_our_loss_on_a_pack(
    base, float_base, torch_base, library, tmp_path
):
    names = [source.name for source in find_adapters(library / "adapters")[:3]]
    adapters = [read_adapter(library / "adapters" / n, base.module_shapes) for n in names]
    merged = scaled(merge_adapters(adapters[:2]), 1.4).uniform(base.dtype)
    alone = merge_adapters(adapters[2:]).uniform(base.dtype)
    pack = write_pack(
        tmp_path / "pack",
        [merged, alone],
        Manifest(model=base.name, config_hash=base.config_hash, n_layers=base.n_layers, budget="2"),
    )
    exported = export(pack, "peft", tmp_path / "peft")
    for name in names:
        examples = base.encode(name, load_task(library / "tasks" / name).test[:4])
        model, _ = stock_load(str(float_base), adapter_path=str(pack.adapter_path(name)))
        ours = _ours(base, pack.load(name), examples)
        assert ours == pytest.approx(stock_loss(model, examples), abs=1e-5)
        model = PeftModel.from_pretrained(torch_base, tmp_path / "peft" / exported[name]).eval()
        assert ours == pytest.approx(_torch_loss(model, examples), abs=1e-4)
        model.unload()
