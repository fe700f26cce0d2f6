"""A library and its base model in memory, for scripts of several folders."""

from pathlib import Path

from d2c_mlx.adapters.reading import find_adapters, read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.heldout import BenchMethod
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task


def load_library(
    library: Path, n_examples: int, n_adapters: int | None = None, model: str | None = None
):
    """`(base, adapters, paths, probe sets)`, of the embedded model by default."""
    base = Model(model)
    paths = [one.path for one in find_adapters(library / "adapters")][:n_adapters]
    adapters = [read_adapter(path, base.module_shapes) for path in paths]
    sets = [
        base.encode(path.name, load_task(library / "tasks" / path.name).probe[:n_examples])
        for path in paths
    ]
    return base, adapters, paths, sets


def run(engine: Engine, pieces):
    """NLL sums in the order of the pieces."""
    return [float(rows.sum()) for _, rows in sorted(engine.run(pieces), key=lambda x: x[0])]


def ends(session):
    """The base model and the individual adapters, by which `bench_methods` judges a method."""
    names = session.library.names
    return {
        "base": BenchMethod(0, [dict.fromkeys(names)]),
        "individual": BenchMethod(0, [dict(zip(names, session.library.adapters))]),
    }


def slug(case):
    """The name of a case in that of its directory."""
    return case.replace(":", "").replace(",", "").replace(" ", "-")
