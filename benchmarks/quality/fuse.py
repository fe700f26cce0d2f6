"""The kept share of an adapter's gain in a 4-bit model: `d2c-mlx fuse`, stock `mlx_lm.fuse`.

    python -m benchmarks.quality.fuse --library DIR [--adapters a,b,...] [--rows 20] [--tests 40]

Two bases: the embedded model in its own 4 bits, and the same weights in 16 bit. Stock is
`mlx_lm.fuse`, and from 16 bit `mlx_lm.convert -q` after it. Calibration rows decide, held-out rows
judge; each case is saved as it comes, and a second call goes on. Results: results/fuse.json.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import command_line
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.fuse import fuse_task
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.phone.quantized import quantized_model
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

ADAPTERS = "date-de,num-en,gec-de,qa-en,summ-en,reply-fr"


def prepare(options, name, work):
    """An adapter's pack, its files for mlx-lm, and the first of its rows."""
    base, rows = Model(), load_task(options.library / "tasks" / name)
    adapter = read_adapter(options.library / "adapters" / name, base.module_shapes)
    about = {"model": base.name, "config_hash": base.config_hash, "n_layers": base.n_layers}
    pack = Manifest(**about, budget="1")
    write_pack(work / "pack", [replace(adapter, sources=(name,))], pack)
    adapter.save(work / "adapter", base.n_layers)
    (work / "tasks" / name).mkdir(parents=True)
    for kind, part in (("probe", rows.probe[: options.rows]), ("test", rows.test[: options.tests])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (work / "tasks" / name / f"{kind}.jsonl").write_text(text)


def stock(path, work, convert):
    """The directory that stock mlx-lm makes, in 4 bits."""
    steps = [("fuse", "--model", path, "--adapter-path", work / "adapter", "--save-path")]
    steps += [("convert", "--q-bits", "4", "-q", "--hf-path", work / "0", "--mlx-path")] * convert
    for i, step in enumerate(steps):
        command = [sys.executable, "-m", "mlx_lm", *map(str, step), str(work / str(i))]
        subprocess.run(command, check=True, capture_output=True)
    return work / str(len(steps) - 1)


def measure(options, name, own):
    """One adapter on one base: losses, shares of the gain and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        work, path = Path(folder), quantized_model(None, None if own else "16")[1]
        prepare(options, name, work)
        theirs = stock(path, work, convert=not own)
        base = Model(str(theirs))
        rows = base.encode(name, load_task(work / "tasks" / name).test)
        loss = float(Scorer(Engine(base)).losses([(None, [rows])])[0][0])
        nbytes = (theirs / "model.safetensors").stat().st_size
        shutil.rmtree(theirs)
        most = 0 if own else options.max_bytes
        ours = fuse_task(work / "pack", work / "out", name, 4, most, work / "tasks", str(path))
    losses = ours["losses"]
    kept = (losses["base"] - loss) / (losses["base"] - losses["adapter"])
    present = ours.pop("present")["share"]
    about = {"stock": {"loss": loss, "kept": kept, "nbytes": nbytes}, "present": present}
    return {"adapter": name, "base": "4 bit" if own else "16 bit", **ours, **about}


def main():
    """Measure what is missing."""
    parser = command_line(__doc__, __spec__, "fuse.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--adapters", default=ADAPTERS)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--tests", type=int, default=40)
    parser.add_argument("--max-bytes", type=int, default=95_000_000, help="from 16 bit")
    options = parser.parse_args()
    fresh = {"machine": machine(), "rows": options.rows, "tests": options.tests, "cases": []}
    results = json.loads(options.output.read_text()) if options.output.exists() else fresh
    done = {(case["adapter"], case["base"]) for case in results["cases"]}
    for name in options.adapters.split(","):
        for own in (False, True):
            if (name, "4 bit" if own else "16 bit") not in done:
                results["cases"].append(measure(options, name, own))
                write_json(options.output, results)
                print(json.dumps(results["cases"][-1]), flush=True)


if __name__ == "__main__":
    main()
