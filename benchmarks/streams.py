"""Tokens per second of the probe engine: one task per core against one after the other.

Same process, same tasks, alternating; the timing includes graph building, evaluation and the
head on target positions, not loading. Prints a table and one JSON line.
"""

import argparse
import json
import time
from pathlib import Path

import d2c_mlx  # noqa: F401  loads the fast BLAS before mlx.core
from d2c_mlx.blas import limit_blas_threads
from d2c_mlx.convert import find_adapters, read_adapter
from d2c_mlx.doctor import machine
from d2c_mlx.model import BaseModel
from d2c_mlx.tasks import load_task


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    base = BaseModel()
    adapters = find_adapters(options.library / "adapters")
    sets = [
        base.encode(name, load_task(options.library / "tasks" / name).probe[: options.examples])
        for name in adapters
    ]
    base.attach(read_adapter(next(iter(adapters.values())), base.module_shapes))
    n_tokens, streams = sum(one.n_tokens for one in sets), base._streams
    seconds = {"one stream": [], "one per core": []}
    for repeat in range(options.repeats + 1):
        for name, used in (("one stream", streams[:1]), ("one per core", streams)):
            base._streams = used
            limit_blas_threads(1 if len(used) > 1 else len(streams))
            started = time.perf_counter()
            base.nll(sets)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    rates = {name: n_tokens / sorted(s)[len(s) // 2] for name, s in seconds.items()}
    print("| evaluation | tokens/s (median) |\n|---|--:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} |")
    ratio = rates["one per core"] / rates["one stream"]
    print(json.dumps({"ratio": round(ratio, 2), "tokens_per_second": rates, "machine": machine()}))


if __name__ == "__main__":
    main()
