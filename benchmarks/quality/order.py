"""Adapters that arrive one by one at a pack, in several orders, against planning all at once.

    python -m benchmarks.quality.order --library DIR [--orders 10] [--slots 6] [--budget 6.25]
    python -m benchmarks.quality.order --library DIR --probes 10 --kinds bytes --orders 3

Every order starts with a pack of its first adapter alone, and the others are added: into so many
slots, and into so many percent of the 16-bit bytes; by weights alone, or by so many probes of every
task (`d2c-mlx add --tasks`). The packs at the end are judged on held-out rows of all tasks. Resumes
pack by pack.
"""

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import ends
from benchmarks.tables.pages import show
from d2c_mlx.compress.quantize import compress, svd_components
from d2c_mlx.compress.storage import allocate, worth
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.packs.add import add_adapter
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json


def first_pack(session, kind, directory, adapter, budget):
    """A pack of one adapter, to which the others come."""
    base = session.library.base
    about = {"model": base.name, "config_hash": base.config_hash, "n_layers": base.n_layers}
    if kind == "slots":
        made = [replace(adapter.uniform(base.dtype), sources=(adapter.name,))]
        return write_pack(directory, made, Manifest(**about, budget=budget))
    limit = int(session.capacity.total * float(budget) / 100)
    widths = {path: sum(lora.shape) for path, lora in adapter.modules.items()}
    levels = allocate(worth(svd_components(adapter), [{}]), widths, limit)
    small = compress(adapter, levels)
    about |= {"budget": f"{limit}B", "max_bytes": limit, "dtype": base.dtype}
    return write_pack(directory, [small], Manifest(**about), {adapter.name: 0})


def grown(session, kind, budget, order, rows):
    """The adapter of each task after all have arrived, and the bytes."""
    by_name = dict(zip(session.library.names, session.library.adapters))
    with tempfile.TemporaryDirectory() as directory:
        pack = first_pack(session, kind, Path(directory) / "pack", by_name[order[0]], budget)
        for name in order[1:]:
            scorer = session.library.scorer if rows else None
            pack = add_adapter(pack, by_name[name], scorer=scorer, rows=rows).pack
        return BenchMethod(pack.nbytes, [{name: pack.load(name) for name in session.library.names}])


def main():
    """Measure what is missing, print all of it."""
    parser = command_line(__doc__, __spec__, "order.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--slots", default="6")
    parser.add_argument("--budget", default="6.25", help="percent")
    parser.add_argument("--probes", type=int, default=0)
    parser.add_argument("--kinds", default="slots,bytes")
    parser.add_argument("--tests", type=int, default=30)
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.exists() else {"rows": []}
    with tempfile.TemporaryDirectory() as directory:
        config = RunConfig(
            adapters=str(options.library / "adapters"), tasks=str(options.library / "tasks"),
            output=str(Path(directory) / "run"), budget=options.slots,
            probe_examples=options.probes or 3,
            test_examples=options.tests,
        )  # fmt: skip
        session = run(config, until="convert", quiet=True)
        plain = ends(session)
        rows = {one.task: one for one in session.library.calibration} if options.probes else {}
        budgets = {"slots": options.slots, "bytes": options.budget}
        for seed in range(options.orders):
            order = random.Random(seed).sample(session.library.names, len(session.library.names))
            for kind in options.kinds.split(","):
                budget = budgets[kind]
                about = {"kind": kind, "budget": budget, "probes": options.probes, "seed": seed,
                         "tests": options.tests}  # fmt: skip
                if any(about.items() <= row.items() for row in found["rows"]):
                    continue
                methods = {**plain, "pack": grown(session, kind, budget, order, rows)}
                judged = bench_methods(session.library.scorer, methods, session.library.held_out)[
                    "pack"
                ]
                keys = ("nbytes", "excess", "kept")
                row = about | {key: judged[key] for key in keys} | {"order": order}
                found = {"machine": machine(), "rows": [*found["rows"], row]}
                write_json(options.output, found)
                print(f"{kind:<6} {budget:>5} order {seed}: excess {row['excess']:.4f},"
                      f" kept {row['kept']:.1%}", flush=True)  # fmt: skip
    show("order", order=found)


if __name__ == "__main__":
    main()
