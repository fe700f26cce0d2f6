"""An undisturbed run of each way through the pipeline, with which tests compare others."""

import pytest
from helpers.runs import NAMES, WAYS
from helpers.runs import config_of as short_run
from helpers.tiny import library, peft_adapter

from d2c_mlx.pipeline import run


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Adapters that were trained from a model on somebody's disk."""
    paths = library(tmp_path_factory.mktemp("library"), NAMES)
    for seed, name in enumerate(NAMES):
        secret = str(paths.model.parent / "secret" / "tiny")
        peft_adapter(paths.adapters, name, seed=seed, base_model_name_or_path=secret)
    return paths


@pytest.fixture(scope="module")
def config_of(paths):
    """`config_of(way, output)`: the options of a run, of other paths if they are given."""
    return lambda way, output, paths=paths: short_run(paths, output, **WAYS[way])


@pytest.fixture(scope="module", params=WAYS)
def whole(request, config_of, tmp_path_factory):
    """A way, and the directory of its `run`, and of the `cache`, which was cold."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2C_MLX_CACHE", str(root / "cache"))
        run(config_of(request.param, root / "run"), quiet=True)
    return request.param, root
