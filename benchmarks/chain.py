"""The whole chain on another base model: packs at several budgets, judged, verified, exported.

    python -m benchmarks.chain --library DIR --model MODEL [--budgets 2,12.5%,3%] [--examples 4]

Each pack is that of a `d2c-mlx run` with few calibration rows; held-out rows judge it beside the
base and the individual adapters. It is verified and exported to llama.cpp and PEFT. A budget that
is in the results is not repeated. Results: results/gemma.json, of the adapters of
library/gemma.yaml.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import ends
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.packs.export import export, verify
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json

FORMATS = ("gguf", "peft")


def measure(config, directory):
    """One budget: what the pack keeps and takes, with the seconds up to it."""
    started = time.perf_counter()
    session = run(config, until="pack", quiet=True)
    seconds = time.perf_counter() - started
    pack = verify(session.path("pack"))
    for to in FORMATS:
        export(pack, to, directory / f"{config.budget.text}-{to}", config.model)
    each = {name: pack.load(name) for name in session.library.names}
    methods = {**ends(session), "pack": BenchMethod(pack.nbytes, [each])}
    benched = bench_methods(session.library.scorer, methods, session.library.held_out)
    losses = {name: one["loss"] for name, one in benched.items()}
    return {
        "budget": config.budget.text, "nbytes": pack.nbytes, "seconds": seconds, "losses": losses,
        "excess": benched["pack"]["excess"], "kept": benched["pack"]["kept"],
        "exported": list(FORMATS),
    }  # fmt: skip


def main():
    """Measure what is missing, and print."""
    parser = command_line(__doc__, __spec__, "gemma.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--budgets", default="2,12.5%,3%")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tests", type=int, default=8)
    options = parser.parse_args()
    content = {"examples": options.examples, "tests": options.tests, "rows": []}
    if options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if all(before[key] == content[key] for key in ("examples", "tests")):
            content["rows"] = before["rows"]
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        for budget in options.budgets.split(","):
            if budget in {one["budget"] for one in content["rows"]}:
                print(f"{budget}: is in {options.output}; give another --output to measure it")
                continue
            config = RunConfig(
                model=options.model, adapters=str(options.library / "adapters"),
                tasks=str(options.library / "tasks"), budget=budget,
                probe_examples=options.examples, test_examples=options.tests,
                output=str(Path(directory) / budget), baselines=(),
            )  # fmt: skip
            content["rows"].append(measure(config, Path(directory)))
            write_json(options.output, {**environment(), **content})
            row = content["rows"][-1]
            print(budget, f"{row['excess']:.4f} {row['kept']:.1%} {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
