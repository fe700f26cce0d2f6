"""A report of how d2c-mlx does on a Mac, in one JSON file to send back: `benchmarks/mac.sh`.

    python -m benchmarks.mac [--output mac.json] [--without demo,cpu,phone,tests] [--quick]

- demo: `make demo` from a cold cache: losses of every method, seconds, peaks and tokens per second
  of every stage
- cpu: the same on the CPU in float32, which losses on the GPU should be close to
- phone: the demo's pack on its base as stored, timed at two contexts
- tests: the fast tests

A part that fails is a result, too: its last lines are in the file, and the exit code is 1. No path
of the home directory and no name of the machine is in it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import command_line
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import write_json

PARTS = ("demo", "cpu", "phone", "tests")
COMMAND = [sys.executable, "-m", "d2c_mlx"]
# Most seconds of a part, and lines that are kept of one that failed.
_MOST, _LINES = 900, 30
# Smaller demo and phone, to see that this script works.
QUICK = {
    "demo": ["--probe-examples", "1", "--test-examples", "2", "--baselines", ""],
    "phone": ["--contexts", "64", "--decode", "2", "--runs", "1", "--test-examples", "1"],
}


def call(*argv, **variables):
    """Run a command; `{seconds, failed}`, the latter its last lines or null, and its output."""
    started = time.monotonic()
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_MOST,
                              env={**os.environ, **variables}, check=False)  # fmt: skip
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        code, out, err = None, "", f"not done after {_MOST} s"
    out, err = (one.replace(str(Path.home()), "~") for one in (out, err))
    lines = (out + err).splitlines()[-_LINES:]
    seconds = round(time.monotonic() - started, 1)
    return {"seconds": seconds, "failed": None if code == 0 else lines}, out


def demo(run, more, **variables):
    """The demo in directory `run`: losses, and what every stage took."""
    found, _ = call(*COMMAND, "run", "examples/demo.yaml", "--output", str(run), *more,
                    D2C_MLX_CACHE=str(run.parent / f"cache-{run.name}"), **variables)  # fmt: skip
    if found["failed"]:
        return found
    bench = json.loads((run / "bench.json").read_text("utf-8"))
    stages = {}
    for file in sorted((run / ".stages").glob("*.json")):
        record = json.loads(file.read_text("utf-8"))
        if "seconds" not in record:
            continue
        tokens, seconds = record["evaluations"]["tokens"], record["seconds"]
        stages[file.stem] = {
            "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / max(seconds, 0.01),
            "peak_nbytes": record["peak_nbytes"],
            "process_peak_nbytes": record["process_peak_nbytes"],
        }  # fmt: skip
    losses = {name: one["loss"] for name, one in bench["methods"].items()}
    dtype = bench["provenance"]["compute_dtype"]
    return {**found, "losses": losses, "compute_dtype": dtype, "stages": stages}


def phone(pack, more):
    """The demo's pack as on a phone, by stock mlx-lm."""
    options = ["--contexts", "1024,4096", "--test-examples", "3", "--answers", "0"]
    found, out = call(*COMMAND, "phone", str(pack), "--device", "mac-8gb", "--tasks",
                      "examples/demo/tasks", "--json", *options, *more)  # fmt: skip
    return {**found, "result": None if found["failed"] else json.loads(out)}


def tests():
    """The fast tests: the line that counts them, and those that failed."""
    found, out = call(sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile",
                      "-m", "not slow")  # fmt: skip
    lines = out.splitlines()
    names = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {**found, "said": next(iter(lines[-1:]), ""), "names": names}


def main():
    """Run the parts and write the file, anew after each."""
    parser = command_line(__doc__, __spec__)
    parser.add_argument("--output", type=Path, default=Path("mac.json"))
    parser.add_argument("--without", default="", help=f"of {','.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="smaller demo and phone")
    options = parser.parse_args()
    more = QUICK if options.quick else {"demo": [], "phone": []}
    left_out = options.without.split(",")
    revision = call("git", "rev-parse", "HEAD")[1].strip()
    result = {"revision": revision, "quick": options.quick, "environment": environment()}
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        parts = {
            "demo": lambda: demo(run, more["demo"]),
            "cpu": lambda: demo(run.with_name("cpu"), more["demo"], D2C_MLX_DEVICE="cpu"),
            "phone": lambda: phone(run / "pack", more["phone"]),
            "tests": tests,
        }
        for name in PARTS:
            if name not in left_out:
                print(f"{name} ...", file=sys.stderr, flush=True)
                result[name] = parts[name]()
                write_json(options.output, result)
                said = "failed" if result[name]["failed"] else "done"
                print(f"{name}: {said}, {result[name]['seconds']} s", file=sys.stderr, flush=True)
    print(f"wrote {options.output}: please send it in an issue of the repository")
    sys.exit(any(result[name]["failed"] for name in parts if name in result))


if __name__ == "__main__":
    main()
