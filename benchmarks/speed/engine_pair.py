"""The engine of this checkout and of an older one, in turns, beside mlx-lm's loop and PEFT.

    python -m benchmarks.speed.engine_pair --before DIR [--rounds 3]

DIR is a checkout of an earlier commit with an environment in `.venv`. Each side is a process of its
own: two of the demo's adapters on three rows of its six tasks, the median of five; then a plain
float32 matmul on all cores, mlx-lm's loop (our BLAS) and PEFT on torch, once each. Results:
results/engine_pair.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import command_line
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

# Runs in either checkout, whose modules have other names before 29 November.
SIDE = """
import json, sys, tempfile
from pathlib import Path
sys.path[:0] = [".", "benchmarks"]
if Path("benchmarks/speed").exists():
    from benchmarks.common import load_library, run
    from benchmarks.speed import engine as measures
else:
    from common import load_library, run
    import engine as measures
base, adapters, _, sets = load_library(Path(sys.argv[1]), int(sys.argv[2]))
adapters = adapters[:2]
pieces = [(adapter, one) for adapter in adapters for one in sets]
run(measures.Engine(base), pieces[:2])
seconds, _ = measures.timed(lambda: run(measures.Engine(base), pieces), int(sys.argv[3]))
found = {"tokens": 2 * sum(one.n_tokens for one in sets), "seconds": seconds,
         "matmul_flops": measures.matmul_rate(), "flops": 2 * measures.useful_flops(base, sets)}
with tempfile.TemporaryDirectory() as name:
    here = Path(name)
    stock, peft = ([here / kind / one.name for one in adapters] for kind in ("mlx", "peft"))
    for adapter, first, second in zip(adapters, stock, peft):
        adapter.save(first, base.n_layers)
        measures.save_peft(adapter, second)
    loop = lambda: measures.mlx_lm_loop(base.path, stock, sets)
    found["mlx_lm_seconds"], _ = measures.timed(loop, 1)
    (here / "base").mkdir()
    model = measures.torch_model(base, peft, here / "base")
    measures.peft_loop(model, [peft[0].name], sets[:1])
    names = [path.name for path in peft]
    found["peft_seconds"], _ = measures.timed(lambda: measures.peft_loop(model, names, sets), 1)
print(json.dumps(found))
"""


def measure(library, checkout, n_rows=3, repeats=5):
    """One side, in a process of its own; checkout None is this one."""
    python = checkout / ".venv/bin/python" if checkout else sys.executable
    command = [python, "-c", SIDE, library, n_rows, repeats]
    # Each has its own packages.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=checkout, env=environment, check=True,
                          capture_output=True, text=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Measure and print."""
    parser = command_line(__doc__, __spec__, "engine_pair.json")
    parser.add_argument("--before", type=Path, required=True, help="checkout of an earlier commit")
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    library, rows = options.library.resolve(), []
    for _ in range(options.rounds):
        for name, checkout in (("before", options.before.resolve()), ("now", None)):
            rows.append({"checkout": name, **measure(library, checkout)})
            print(rows[-1], flush=True)
            write_json(options.output, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
