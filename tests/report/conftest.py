"""Two finished runs whose reports are read and opened."""

import json

import pytest
from helpers.runs import config_of
from helpers.tiny import library

from d2c_mlx import PhoneConfig, bench_phone
from d2c_mlx.pipeline import run
from d2c_mlx.utils.errors import InputWarning


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
    """Kind of plan -> run directory; one with merges, one planned in bytes, both measured."""
    root = tmp_path_factory.mktemp("report")
    paths = library(root, ["a", "b", "c", "d"])
    outputs = {}
    for kind, budget in (("d2c", "2"), ("auto", "60%")):
        output = root / kind
        more = {"budget": budget, "test_examples": 3, "baselines": ("merge-all",)}
        config = config_of(paths, output, **more)
        run(config, until="pack", quiet=True)
        phone = PhoneConfig(packs=(str(output / "pack"),), model=str(paths.model), bits="16,4",
                            contexts=(12,), decode=2, runs=1)  # fmt: skip
        phone = phone.replace(tasks=str(paths.tasks), test_examples=2)
        with pytest.warns(InputWarning, match="another base than this in 4 bits"):
            phone = bench_phone(phone, quiet=True)
        (output / "phone.json").write_text(json.dumps(phone))
        run(config, quiet=True)
        outputs[kind] = output
    return outputs


@pytest.fixture(params=["d2c", "auto"])
def directory(runs, request):
    return runs[request.param]
