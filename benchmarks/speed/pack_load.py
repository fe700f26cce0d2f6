"""Seconds until one adapter is out of a compact pack.

Eight random adapters of Llama-3.2-1B shapes (16 layers, q, k, v, o; rank 32, 4 bit) in one file.
"load" is what an app does when the task changes, `Pack.load(task)` and evaluating every factor:
opening the file, reading the index and one adapter's rows (from the page cache: the file was just
written), dequantizing to float16. "verify" is `load_pack`, which hashes the whole file once.
"plain" is the same adapter from a plain 16-bit pack.

    python -m benchmarks.speed.pack_load [--repeats N]
"""

import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks import command_line
from d2c_mlx.compress.compressed import GROUP_SIZE, Compressed, Level, Quantized
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

LAYERS, ADAPTERS, RANK, BITS, TARGET = 16, 8, 32, 4, 0.050
SHAPES = {"q_proj": (2048, 2048), "k_proj": (2048, 512), "v_proj": (2048, 512),
          "o_proj": (2048, 2048)}  # fmt: skip


def compressed(k):
    """A random adapter; nearest codes, for reading does not depend on how they were found."""
    rng = np.random.default_rng(k)

    def factor(width):
        rows = rng.standard_normal((RANK, width), np.float32) / np.float32(np.sqrt(width))
        weight, scales, biases = map(np.array, mx.quantize(mx.array(rows), GROUP_SIZE, BITS))
        halves = scales.astype(np.float16), biases.astype(np.float16)
        return Quantized(weight, *halves, BITS, GROUP_SIZE, width)

    modules = {
        f"model.layers.{layer}.self_attn.{name}": (Level(factor(width), factor(out)),)
        for layer in range(LAYERS)
        for name, (width, out) in SHAPES.items()
    }
    return Compressed(f"adapter-{k}", modules, "llama", (f"adapter-{k}",))


def timed(call, repeats):
    """Best and median milliseconds of `call`."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"best_ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds)}


def evaluated(pack, task):
    """Load one adapter and have every number of it."""
    mx.eval([x for lora in pack.load(task).modules.values() for x in (lora.a, lora.b)])


def main():
    """Measure, print, write."""
    parser = command_line(__doc__, __spec__, "pack_load.json")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    repeats = options.repeats
    adapters = [compressed(k) for k in range(ADAPTERS)]
    about = {"model": "llama", "config_hash": "0" * 64, "n_layers": LAYERS, "budget": "-"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        serves = {adapter.name: k for k, adapter in enumerate(adapters)}
        compact = write_pack(path / "c", adapters, Manifest(**about), serves)
        wide = [adapter.adapter() for adapter in adapters]
        plain = write_pack(path / "p", wide, Manifest(**about))
        # The one in the middle: an offset into every tensor.
        task = f"adapter-{ADAPTERS // 2}"
        rows = {
            "load, compact": timed(lambda: evaluated(compact, task), repeats),
            "load, plain": timed(lambda: evaluated(plain, task), repeats),
            "verify, compact": timed(lambda: load_pack(compact.path), repeats),
            "verify, plain": timed(lambda: load_pack(plain.path), repeats),
        }
        sizes = {"compact": compact.nbytes, "plain": plain.nbytes}
    print(f"target of a compact load: {1e3 * TARGET:.0f} ms")
    print("| what | best ms | median ms |\n|---|--:|--:|")
    for name, row in rows.items():
        print(f"| {name} | {row['best_ms']:.1f} | {row['median_ms']:.1f} |")
    print(f"{ADAPTERS} adapters: {sizes['compact']:,} bytes compact, {sizes['plain']:,} plain")
    result = {
        "machine": machine(),
        "mlx": mx.__version__,
        "conditions": f"{ADAPTERS} adapters, {LAYERS} layers, rank {RANK}, {BITS} bit;"
        f" {repeats} repeats; file in the page cache",
        "target_ms": 1e3 * TARGET,
        "nbytes": sizes,
        "rows": rows,
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
