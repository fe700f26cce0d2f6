"""Two finished runs whose reports are read and opened."""

import json

import pytest
from helpers.tiny import library

from d2c_mlx.phone.benchmark import bench_phone
from d2c_mlx.phone.config import PhoneConfig
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
    """Kind of plan -> run directory; one with merges, one planned in bytes, both measured."""
    root = tmp_path_factory.mktemp("report")
    paths = library(root, ["a", "b", "c", "d"])
    common = RunConfig(model=str(paths.model), adapters=str(paths.adapters), output="x",
                       tasks=str(paths.tasks), probe_examples=3, test_examples=3,
                       baselines=("merge-all",))  # fmt: skip
    outputs = {}
    for kind, budget in (("d2c", "2"), ("auto", "60%")):
        output = root / kind
        config = common.replace(budget=budget, output=str(output))
        run(config, until="pack", quiet=True)
        phone = PhoneConfig(pack=str(output / "pack"), device="iphone-6gb", model=str(paths.model),
                            bits=4, contexts=(8,), decode=2, runs=1)  # fmt: skip
        phone = bench_phone(phone.replace(tasks=str(paths.tasks), test_examples=2), quiet=True)
        (output / "phone.json").write_text(json.dumps(phone))
        run(config, quiet=True)
        outputs[kind] = output
    return outputs


@pytest.fixture(params=["d2c", "auto"])
def directory(runs, request):
    return runs[request.param]
