"""Adapters that arrive at packs."""

from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.changing import full_rank

from d2c_mlx.adapters.adapter import LoRA


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Of rank 4 and, so that merges of four lose nothing, of one component each."""
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, one in full_rank(root).items():
        first = mx.array([[1.0], [0], [0], [0]])
        modules = {
            path: LoRA(lora.a, (lora.b.astype(mx.float32) * first).astype(lora.b.dtype), lora.scale)
            for path, lora in one.modules.items()
        }
        found[name] = replace(one, modules=modules)
    return found
