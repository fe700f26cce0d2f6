"""Our losses against PEFT on torch, on real adapters and real rows."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2c_mlx.adapters.reading import find_adapters, read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.tasks import load_task


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
    differences = {}
    for source in find_adapters(library / "adapters"):
        name, path = source.name, source.path
        examples = base.encode(name, load_task(library / "tasks" / name).test[:rows])
        adapter = read_adapter(path, base.module_shapes)
        ((_, losses),) = Engine(base).run([(adapter, examples)])
        model = PeftModel.from_pretrained(torch_base, path).eval()
        ours, theirs = losses.sum() / examples.n_targets, _torch_loss(model, examples)
        model.unload()
        differences[name] = abs(ours - theirs)
        print(f"{name:<12} ours {ours:.6f}  PEFT {theirs:.6f}  difference {ours - theirs:.1e}")
    assert len(differences) > 1 and max(differences.values()) < 1e-4, differences
