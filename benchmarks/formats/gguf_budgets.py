"""Losses at equal bytes on a phone: plans for GGUF, compact packs, plain exports, LoRAQuant.

    d2c-mlx pack --budget 6.25% --format gguf --output RUN ...       # and one without --format
    python -m benchmarks.formats.gguf_budgets RUN [RUN ...] [--rows N] [--weights float32|stored]

Every run has the same library and the embedded base; those without rows are judged on `--tasks`.
`excess` is the mean over tasks of loss - loss under the task's own adapter, both by the program
that reads the files: llama.cpp for GGUF, d2c-mlx for all else, which gets the losses of PEFT
(peft_pack.py) and of llama.cpp (gguf_lora.py). All see the same tokens.

For each budget of the runs there are peers. `whole`: adapters as llama.cpp's converter (q8_0) or
PEFT (16 bit) writes them, `rank 1`: the same of the leading singular component; as many tasks as
fit have one, the others the base model, at the mean over all choices. `LoRAQuant`: loraquant.py, at
the largest share that fits. A peer gets the bytes of our larger pack of that budget.

Every loss is written as it is measured; the same command goes on after that.
"""

import itertools
import json
import tempfile
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks import command_line
from benchmarks.formats.bindings import LlamaCpp, conditions, in_float32
from benchmarks.formats.gguf_lora import ours, theirs
from benchmarks.formats.loraquant import LoraQuant
from benchmarks.tables.pages import show
from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.adapters.peft_format import save_peft
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.gguf_form import GgufStorage
from d2c_mlx.compress.quantize import svd_components
from d2c_mlx.models.model import Model
from d2c_mlx.models.resolve import embedded_gguf
from d2c_mlx.models.tasks import load_tasks
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.run.config import load_config
from d2c_mlx.utils.files import write_json


class Losses:
    """Losses by label and task, kept in the results file."""

    def __init__(self, path, about):
        """Go on with a file of the same conditions, or begin anew."""
        self._path, self._about, self.rows, self._known = path, about, [], {}
        if path.exists():
            old = json.loads(path.read_text())
            if {key: old.get(key) for key in about} == about:
                self._known = old["losses"]

    def of(self, label, names, measure):
        """A loss per task; `measure(place of the task)` gives those that are not known."""
        known = self._known.setdefault(label, {})
        for i, name in enumerate(names):
            if name not in known:
                known[name] = measure(i)
                self.write()
        return np.array([known[name] for name in names])

    def write(self):
        """Write all that is known."""
        write_json(self._path, {**self._about, "rows": self.rows, "losses": self._known})


class Judge:
    """Losses of held-out rows, here and in llama.cpp, which is loaded when it is needed."""

    def __init__(self, options, config, names):
        """Judge the first rows of every task."""
        self.base, self.names = Model(), names
        tasks = load_tasks(options.tasks or Path(config.tasks), names)
        sets = [self.base.encode(task.name, task.test[: options.rows]) for task in tasks]
        self._rows, self._weights = [one.examples for one in sets], options.weights
        rows = f"{len(names)} tasks, {options.rows} held-out rows each"
        about = {**conditions(), "mlx": mx.__version__, "weights": options.weights,
                 "conditions": rows}  # fmt: skip
        self._losses = Losses(options.output, about)
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self.own = [read_adapter(options.runs[0] / "adapters" / name) for name in names]

    @cached_property
    def _llm(self):
        model = embedded_gguf()
        if self._weights == "float32":
            model = in_float32(model, self.folder / "float32.gguf")
        return LlamaCpp(model)

    def here(self, label, adapter):
        """Losses by d2c-mlx; `adapter(place of the task)`, None is the base."""
        return self._losses.of(
            f"{label}; here", self.names,
            lambda i: -float(ours(self.base, adapter(i), self._rows[i]).mean()),
        )  # fmt: skip

    def there(self, label, file):
        """The same by llama.cpp under `file(place of the task)`."""
        return self._losses.of(
            f"{label}; llama.cpp", self.names,
            lambda i: -float(theirs(self._llm, file(i), self._rows[i]).mean()),
        )  # fmt: skip

    def gguf(self, adapter):
        """A file of an adapter in 16 bit, for llama.cpp."""
        save_gguf(adapter, self.folder / "one.gguf", self.base.config)
        return self.folder / "one.gguf"

    def note(self, **row):
        """Write a row of the table."""
        self._losses.rows.append(json.loads(json.dumps(row, default=float)))
        self._losses.write()


def excess_of_runs(judge, runs, known):
    """Note the packs of runs; returns budget -> bytes of the largest."""
    budgets = {}
    for run in runs:
        config, pack = load_config(run / "config.yaml", {}), load_pack(run / "pack")
        text = config.budget.text
        budgets[text] = max(pack.nbytes, budgets.get(text, 0))
        how = "" if config.tasks else ", by weights"
        label = f"{text}, {pack.storage} pack{how}"
        files = export(pack, "gguf", judge.folder / run.name)
        paths = [files[name] and judge.folder / run.name / files[name] for name in judge.names]
        row = {"budget": text, "nbytes": pack.nbytes}
        if pack.storage == "gguf":
            losses = judge.there(label, lambda i, paths=paths: paths[i])
            judge.note(**row, what=f"d2c-mlx, GGUF{how}", reader="llama.cpp",
                       excess=(losses - known["llama.cpp"]).mean())  # fmt: skip
        else:
            losses = judge.here(label, lambda i, pack=pack: pack.load(judge.names[i]))
            judge.note(**row, what=f"d2c-mlx, compact{how}", reader="d2c-mlx, Swift",
                       excess=(losses - known["here"]).mean(),
                       as_gguf=sum(p.stat().st_size for p in set(filter(None, paths))))  # fmt: skip
    return budgets


def rank_one(adapter):
    """The leading singular component of every module."""
    found = {}
    for path, (a, b) in svd_components(adapter).items():
        a, b = (mx.array(x[:1].astype(np.float16)) for x in (a, b))
        found[path] = LoRA(a.T, b)
    return Adapter(adapter.name, found, adapter.base)


def plain_sizes(judge, adapters):
    """Kind of file -> mean bytes of an adapter."""
    storage = GgufStorage(judge.base.module_shapes, judge.base.config)
    eight = [storage.nbytes(one.name, {p: ((x.rank, 8),) for p, x in one.modules.items()})
             for one in adapters]  # fmt: skip
    folder = judge.folder / "peft"
    sizes = []
    for adapter in adapters:
        save_peft(adapter.uniform(mx.float16), folder / f"{adapter.name}-{adapter.rank}")
        sizes.append(sum(file.stat().st_size for file in
                         (folder / f"{adapter.name}-{adapter.rank}").iterdir()))  # fmt: skip
    return {"llama.cpp's converter, q8_0": np.mean(eight), "PEFT, 16 bit": np.mean(sizes)}


def plain_peers(judge, budgets, known):
    """Note as many plain adapters as fit; the rounding of q8_0 is not counted against them."""
    n, lost = len(judge.names), (known["base"] - known["llama.cpp"]).mean()
    one = [rank_one(adapter) for adapter in judge.own]
    cut = judge.there("rank 1", lambda i: judge.gguf(one[i])) - known["llama.cpp"]
    for what, adapters, excess in (("whole", judge.own, 0.0), ("rank 1", one, cut.mean())):
        for kind, size in plain_sizes(judge, adapters).items():
            for budget, nbytes in budgets.items():
                k = min(n, int(nbytes // size))
                judge.note(budget=budget, what=f"{kind}, {what}", reader=kind.split(",")[0],
                           nbytes=round(k * size), tasks=k,
                           excess=(k * excess + (n - k) * lost) / n)  # fmt: skip


def loraquant_peers(judge, budgets, known):
    """Note LoRAQuant at every budget, with a part of 1 bit where that fits."""
    for bits, (budget, nbytes) in itertools.product((2, 3), budgets.items()):
        quant, what = LoraQuant(judge.own, bits, rest=True), f"LoRAQuant, {bits} bits and 1 bit"
        if quant.nbytes(0) > nbytes:
            quant, what = LoraQuant(judge.own, bits, rest=False), f"LoRAQuant, {bits} bits alone"
        share = quant.fit(nbytes)
        adapter = partial(quant.adapter, share=share)
        losses = judge.here(f"{what}, {share}", lambda i, adapter=adapter: adapter(judge.names[i]))
        judge.note(budget=budget, what=what, reader="its own", nbytes=quant.nbytes(share),
                   share=share, excess=(losses - known["here"]).mean())  # fmt: skip


def main():
    """Compare, print, write."""
    parser = command_line(__doc__, __spec__, "gguf_budgets.json")
    parser.add_argument("runs", type=Path, nargs="+", help="run directories with a pack")
    parser.add_argument("--rows", type=int, default=4, help="held-out rows per task")
    parser.add_argument("--tasks", type=Path, help="held-out rows, where the runs had none")
    parser.add_argument("--weights", choices=("float32", "stored"), default="float32")
    options = parser.parse_args()
    config = load_config(options.runs[0] / "config.yaml", {})
    judge = Judge(options, config, sorted(load_pack(options.runs[0] / "pack").tasks))
    known = {
        "base": judge.there("base", lambda _: None),
        "llama.cpp": judge.there("own", lambda i: judge.gguf(judge.own[i])),
        "here": judge.here("own", lambda i: judge.own[i]),
    }
    budgets = excess_of_runs(judge, options.runs, known)
    plain_peers(judge, budgets, known)
    loraquant_peers(judge, budgets, known)
    show("gguf-budgets", gguf_budgets=json.loads(options.output.read_text()))


if __name__ == "__main__":
    main()
