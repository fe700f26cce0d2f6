"""Adapters stay in their files: more of them take no more memory, in any stage."""

import gc
import json
import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers.loras import lora_of
from helpers.runs import config_of
from helpers.runs import records as records_of
from helpers.tiny import SHAPES, library, peft_adapter

from d2c_mlx import Adapter, read_adapter
from d2c_mlx.adapters.tensor_file import Spool, left_in_file
from d2c_mlx.compress.compact_file import read_compact, write_compact
from d2c_mlx.compress.plan import OnDemand
from d2c_mlx.compress.quantize import compress
from d2c_mlx.merge import merging
from d2c_mlx.pipeline import run
from d2c_mlx.run import stages
from d2c_mlx.utils.errors import AdapterError

RANK = 16
# Bytes of one adapter in float32.
NBYTES = 4 * 2 * RANK * sum(map(sum, SHAPES.values()))


def peaks(root, n, budget, **options):
    """Most bytes of MLX's arrays in every stage of a run of n adapters, those of the model too."""
    gc.collect()  # The model of the run before is part of a cycle.
    names = [f"a{i}" for i in range(n)]
    lib = library(root, names)
    for i, name in enumerate(names):
        peft_adapter(lib.adapters, name, rank=RANK, seed=i, targets=tuple(SHAPES))
    if options:
        clusters = [names[i : i + 3] for i in range(0, n, 3)]
        (root / "clusters.json").write_text(json.dumps(clusters))
        options["clusters"] = str(root / "clusters.json")
    options |= {"budget": budget, "probe_examples": 1, "test_examples": 1}
    session = run(config_of(lib, root / "run", **options), until="bench", quiet=True)
    records = {path.stem: json.loads(path.read_text()) for path in records_of(session.output)}
    return {stage: x["peak_nbytes"] for stage, x in records.items() if "peak_nbytes" in x}


@pytest.mark.slow
@pytest.mark.parametrize("budget, options", [("30%", {}), ("", {"merge_method": "layerwise"})])
def test_more_adapters_take_no_more_memory(tmp_path, budget, options, monkeypatch):
    # Answers of the base model are as many as there are tasks.
    monkeypatch.setattr(stages, "ANSWERED_ROWS", 0)
    monkeypatch.setattr(merging, "_JUDGED_AS_SHIPPED", 12)  # the search keeps the merges of both
    few, many = (peaks(tmp_path / str(n), n, budget or f"{n // 3}", **options) for n in (3, 12))
    assert few.keys() == many.keys() > {"convert", "probe", "pack", "bench"}
    for stage, most in few.items():
        # All nine would take nine times as much. Rows and lists of them take a little.
        assert many[stage] - most < 2 * NBYTES, stage


def test_an_adapter_in_its_file_is_the_same(tmp_path):
    path = peft_adapter(tmp_path, "a", targets=tuple(SHAPES))
    adapter, kept = read_adapter(path), left_in_file(read_adapter(path), path)
    for other in (kept, Spool().put(adapter), kept.changed(lambda lora: lora.uniform())):
        assert (other.digest, other.rank) == (adapter.digest, 4)
        assert other.modules.keys() == adapter.modules.keys()
    peft_adapter(tmp_path, "a", seed=1, targets=tuple(SHAPES))
    with pytest.raises(AdapterError, match="was changed while it was in use; run again"):
        next(iter(kept.modules.values()))


def test_a_compact_file_is_written_one_adapter_after_the_other(tmp_path):
    lora, path = lora_of(np.random.default_rng(0), (4096, 4096), 4), "model.layers.0.q"
    small = compress(Adapter("a", {path: lora}), {path: [(4, 8)]})
    write_compact(tmp_path / "all", [replace(small, name=f"a{i}") for i in range(40)])
    there = OnDemand(partial(read_compact, tmp_path / "all"), 40)
    tracemalloc.start()
    write_compact(tmp_path / "each", there)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "each").read_bytes() == (tmp_path / "all").read_bytes()
    assert peak < (tmp_path / "all").stat().st_size / 4
