"""Coverage-guided fuzzing of everything that reads what strangers wrote (targets.py).

    pip install -e .[test,fuzz]                  # atheris: Python 3.11 to 3.13, Linux or macOS
    python tests/robustness/fuzz.py --inputs 1000000        # shared out over the targets
    python tests/robustness/fuzz.py --only gguf --inputs 5000

Every input must be read, or refused with an InputError, within 5 s of CPU and 3 GiB. Anything else
ends the target and is kept as `<output>/<target>/crash-*`, `timeout-*` or `oom-*`. What reached new
code is kept in `<output>/<target>/corpus`, where the next run starts; counts in
`<output>/counts.json`.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # helpers/

_CPU_SECONDS, _MEMORY_MB, _ADDRESSES = 5, 3072, 24 << 30
# Of the clock, after which libFuzzer gives up: a busy machine may not give 5 s to anyone for long.
_TIMEOUT = 300
# A target's share of all inputs: what is slow gets fewer.
_SLOW = {"gguf": 0.3, "manifest-plain": 0.5, "manifest-compact": 0.5}


def fuzz_one(name, arguments):
    """Fuzz one target in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["d2c_mlx", "gguf"]):
        import d2c_mlx  # noqa: F401  the fast BLAS first  # isort: skip
        from helpers.damage import damaged
        from helpers.targets import TARGETS, Shared

    # A header that asks for more than that fails at once instead of filling the memory.
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, resource.RLIM_INFINITY))
    root = Path(tempfile.mkdtemp())
    (root / "target").mkdir()
    target = TARGETS[name](Shared(root), root / "target")
    seeds = root / "seeds"
    seeds.mkdir()
    for i, seed in enumerate(target.seeds):
        (seeds / str(i)).write_bytes(seed)

    def one(data):
        started = time.process_time()
        target.take(data)
        assert time.process_time() - started < _CPU_SECONDS

    def mutate(data, most, seed):
        draw = random.Random(seed)
        if draw.random() < 0.5:
            return damaged(data, draw, target.head)[:most]
        return atheris.Mutate(data, most)

    longest = 2 * max(map(len, target.seeds))
    atheris.Setup([sys.argv[0], *arguments, f"-max_len={longest}", str(seeds)], one,
                  custom_mutator=mutate)  # fmt: skip
    atheris.Fuzz()


def fuzz_target(name, n, output):
    """Fuzz one target in a process of its own; what happened."""
    from helpers.targets import KEPT

    corpus = output / name / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    # The first directory is where libFuzzer writes.
    places = [corpus] + ([KEPT / name] if (KEPT / name).is_dir() else [])
    command = [sys.executable, __file__, "--target", name, *map(str, places), f"-runs={n}",
               f"-timeout={_TIMEOUT}", f"-rss_limit_mb={_MEMORY_MB}", "-print_final_stats=1",
               f"-artifact_prefix={output / name}/"]  # fmt: skip
    started = time.monotonic()
    log = output / name / "log.txt"
    with open(log, "w") as file, tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False,
                              env={**os.environ, "TMPDIR": scratch})  # fmt: skip
    text = log.read_text(errors="replace")
    stats = dict(re.findall(r"stat::(\w+):\s+(\d+)", text))
    findings = sorted(p.name for p in (output / name).iterdir()
                   if p.name.startswith(("crash-", "timeout-", "oom-", "leak-")))  # fmt: skip
    # libFuzzer says the number at its end, and on the way at powers of two.
    seen = [int(x) for x in re.findall(r"^#(\d+)\s", text, re.M)]
    return {
        "inputs": int(stats.get("number_of_executed_units", max(seen, default=0))),
        "seconds": round(time.monotonic() - started),
        "peak_mb": int(stats.get("peak_rss_mb", 0)),
        "corpus": sum(1 for _ in corpus.iterdir()),
        "exit_code": done.returncode,
        "findings": findings,
    }


def main():
    """Fuzz every target; exit code 1 if one of them found something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=13_000, help="of all targets together")
    parser.add_argument("--only", action="append", help="a target; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    from helpers.targets import TARGETS

    names = options.only or list(TARGETS)
    shares = {name: _SLOW.get(name, 1.0) for name in names}
    options.output.mkdir(parents=True, exist_ok=True)
    counts = options.output / "counts.json"
    results = {}
    for name in names:
        n = round(options.inputs * shares[name] / sum(shares.values()))
        results[name] = fuzz_target(name, n, options.output.resolve())
        print(name, results[name], flush=True)
        counts.write_text(json.dumps(results, indent=2) + "\n")
    print(sum(result["inputs"] for result in results.values()), "inputs")
    return int(any(result["exit_code"] or result["findings"] for result in results.values()))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        if sys.argv[1:2] == ["--target"]:
            fuzz_one(sys.argv[2], sys.argv[3:])
        else:
            sys.exit(main())
