"""A pack of a run, exported to PEFT: held-out losses by torch beside those of its bench.json.

    python -m benchmarks.formats.peft_pack --run DIR

Every task under the adapter that the pack has for it, on the rows that bench judged: the model in
float32, the cross entropy of its logits in float64.
"""

import json
import tempfile
from pathlib import Path

from benchmarks import command_line
from benchmarks.other_loops import peft_loop
from benchmarks.stock_models import torch_model
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_tasks
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.run.config import load_config
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import hash_file, write_json


def main():
    """Compare, print, write."""
    parser = command_line(__doc__, __spec__, "peft_pack.json")
    parser.add_argument("--run", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(options.run / "config.yaml", {})
    bench = json.loads((options.run / "bench.json").read_text())["methods"]["pack"]["tasks"]
    base, pack = Model(config.model), load_pack(options.run / "pack")
    served = {task: key for task, key in pack.tasks.items() if key is not None}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        places = export(pack, "peft", directory / "peft")
        (directory / "base").mkdir()
        paths = [directory / "peft" / name for name in sorted(set(filter(None, places.values())))]
        model = torch_model(base, paths, directory / "base")
        for task in load_tasks(Path(config.tasks), served):
            one = base.encode(task.name, task.test[: config.test_examples or None])
            (total,) = peft_loop(model, [places[task.name]], [one], exact=True)
            rows.append({"task": task.name, "bench": bench[task.name]["loss"],
                         "peft": total / one.n_targets})  # fmt: skip
            print(f"{task.name:<12} bench {rows[-1]['bench']:.6f}  PEFT {rows[-1]['peft']:.6f}",
                  flush=True)  # fmt: skip
    largest = max(abs(row["bench"] - row["peft"]) for row in rows)
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("bench", "peft")}
    write_json(options.output, {
        **environment(), "manifest_sha256": hash_file(pack.path / "manifest.json"),
        "nbytes": pack.nbytes, "test_examples": config.test_examples, "rows": rows,
        "largest_difference": largest,
    })  # fmt: skip
    print(f"{len(rows)} tasks: mean {mean['bench']:.6f}, PEFT {mean['peft']:.6f}; largest"
          f" difference {largest:.1e} nats per target token")  # fmt: skip


if __name__ == "__main__":
    main()
