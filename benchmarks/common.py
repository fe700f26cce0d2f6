"""What the benchmark scripts share."""

from pathlib import Path

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.adapters.sources import find_adapters
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.tasks import load_task


def load_library(library: Path, n_examples: int, n_adapters: int | None = None):
    """`(base, adapters, paths, probe sets)` of the embedded model."""
    base = BaseModel()
    paths = [one.path for one in find_adapters(library / "adapters")][:n_adapters]
    adapters = [read_adapter(path, base.module_shapes) for path in paths]
    sets = [
        base.encode(path.name, load_task(library / "tasks" / path.name).probe[:n_examples])
        for path in paths
    ]
    return base, adapters, paths, sets


def run(engine: Engine, pieces):
    """NLL sums in the order of the pieces."""
    return [value for _, value in sorted(engine.run(pieces))]
