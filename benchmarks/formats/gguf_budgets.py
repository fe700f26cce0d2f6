"""Plans for the bytes of GGUF files beside exports of other plans, in llama.cpp itself.

    d2c-mlx pack --budget 6.25% --format gguf --output RUN ...       # and one without --format
    python -m benchmarks.formats.gguf_budgets RUN [RUN ...] [--rows N] [--weights float32|stored]

Every run has the same library and the embedded base. Its pack is exported to GGUF; llama.cpp and we
compute the loss of the same held-out tokens. `excess` is the mean over tasks of loss - loss under
the task's own adapter, by the same program. The first row of a run is what its own files give us,
the second what the GGUF files give in llama.cpp. `as many as fit`: whole adapters in the smallest
files of llama.cpp's converter (q8_0) or of PEFT (16 bit) at the run's budget, the base model for
the other tasks, at the mean over all choices; their rounding is not counted against them.
`padded`: the GGUF files in 16 bit with one rank for all modules.
"""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks import command_line
from benchmarks.formats.bindings import LlamaCpp, conditions, in_float32
from benchmarks.formats.gguf_lora import ours, theirs
from d2c_mlx.adapters.gguf_format import save_gguf_lora
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.adapters.peft_format import save_peft
from d2c_mlx.compress.storage import GgufStorage
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.resolve import embedded_gguf
from d2c_mlx.models.tasks import load_tasks
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.run.config_file import load_config
from d2c_mlx.utils.files import write_json


class Judge:
    """Mean losses of held-out rows, here and in llama.cpp."""

    def __init__(self, base, llm, sets):
        """Judge the rows of `sets`, task -> `ExampleSet`."""
        self.base, self.llm, self.names, self.sets = base, llm, [*sets], [*sets.values()]

    def here(self, adapters):
        """A loss per task under its adapter, None is the base."""
        return self._mean(ours(self.base, a, one.examples) for a, one in zip(adapters, self.sets))

    def there(self, files):
        """The same by llama.cpp under the files."""
        return self._mean(theirs(self.llm, f, one.examples) for f, one in zip(files, self.sets))

    @staticmethod
    def _mean(each):
        return np.array([-float(one.mean()) for one in each])


def whole(base, adapters, folder):
    """Kind of file -> mean bytes of a whole adapter."""
    storage = GgufStorage(base.module_shapes, base.config)
    eight = [
        storage.nbytes(a.name, {path: ((lora.rank, 8),) for path, lora in a.modules.items()})
        for a in adapters
    ]
    sizes = []
    for adapter in adapters:
        save_peft(adapter.uniform(mx.float16), folder / adapter.name)
        sizes.append(sum(file.stat().st_size for file in (folder / adapter.name).iterdir()))
    return {"llama.cpp's converter, q8_0": np.mean(eight), "PEFT, 16 bit": np.mean(sizes)}


def padded(pack, base):
    """Bytes of the same adapters in 16 bit with one rank each, as they were exported once."""
    storage, total = GgufStorage(base.module_shapes, base.config), 0
    for tasks in pack.adapters.values():
        adapter = pack.load(tasks[0])
        total += storage.nbytes(adapter.name, dict.fromkeys(adapter.modules, ((adapter.rank, 16),)))
    return total


def rows_of(run, judge, known, folder):
    """The rows of one run; `known` has the losses of base and own adapters, and whole sizes."""
    config, pack = load_config(run / "config.yaml", {}), load_pack(run / "pack")
    names = judge.names
    files = export(pack, "gguf", folder / run.name)
    paths = [files[name] and folder / run.name / files[name] for name in names]
    nbytes = sum(path.stat().st_size for path in {path for path in paths if path})
    about = {"budget": config.budget, "nbytes_allowed": pack.manifest.budget.nbytes}
    here = judge.here([pack.load(name) for name in names]) - known["own here"]
    there = judge.there(paths) - known["own there"]
    label = f"{config.budget}, {pack.storage}"
    found = [
        {"label": f"{label}: our own reading", "nbytes": pack.nbytes, "excess": here.mean()},
        {
            "label": f"{label}: GGUF in llama.cpp",
            "nbytes": nbytes,
            "excess": there.mean(),
            "padded": padded(pack, judge.base),
        },
    ]
    lost = float((known["base there"] - known["own there"]).mean())
    for kind, size in known["whole"].items() if pack.storage == "gguf" else ():
        k = min(len(names), int(pack.manifest.budget.nbytes // size))
        found.append({
            "label": f"{config.budget}, as many as fit: {kind}", "adapters": k,
            "nbytes": round(k * size), "excess": (1 - k / len(names)) * lost,
        })  # fmt: skip
    return [{**about, **one} for one in found]


def main():
    """Compare, print, write."""
    parser = command_line(__doc__, __spec__, "gguf_budgets.json")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories with a pack")
    parser.add_argument("--rows", type=int, default=4, help="held-out rows per task")
    parser.add_argument("--weights", choices=("float32", "stored"), default="float32")
    options = parser.parse_args()
    base, first = BaseModel(), load_pack(options.runs[0] / "pack")
    config = load_config(options.runs[0] / "config.yaml", {})
    tasks = load_tasks(Path(config.tasks), sorted(first.tasks))
    sets = {task.name: base.encode(task.name, task.test[: options.rows]) for task in tasks}
    own = [load_adapter(options.runs[0] / "adapters" / task.name) for task in tasks]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = embedded_gguf()
        if options.weights == "float32":
            model = in_float32(model, folder / "float32.gguf")
        judge = Judge(base, LlamaCpp(model), sets)
        files = [folder / f"{adapter.name}.gguf" for adapter in own]
        for adapter, file in zip(own, files):
            save_gguf_lora(adapter, file, base.config)
        known = {
            "own here": judge.here(own), "own there": judge.there(files),
            "base there": judge.there([None] * len(sets)), "whole": whole(base, own, folder),
        }  # fmt: skip
        rows = [{"label": "own adapters, 16 bit, in llama.cpp", "excess": 0.0,
                 "nbytes": sum(file.stat().st_size for file in files)}]  # fmt: skip
        for run in options.runs:
            rows += rows_of(run, judge, known, folder)
            write_json(options.output, result_of(options, rows, known))
    for row in rows:
        print(f"{row['label']:<50} {row['nbytes']:>11,} bytes  excess {row['excess']:+.4f}")


def result_of(options, rows, known):
    """The content of the results file."""
    losses = {name: float(values.mean()) for name, values in known.items() if name != "whole"}
    return {
        **conditions(),
        "mlx": mx.__version__,
        "weights": options.weights,
        "conditions": f"{len(known['own here'])} tasks, {options.rows} held-out rows each",
        "losses": losses,
        "rows": json.loads(json.dumps(rows, default=float)),
    }


if __name__ == "__main__":
    main()
