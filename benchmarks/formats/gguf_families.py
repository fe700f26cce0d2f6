"""GGUF adapters of every family that is exported, against llama.cpp's own tools and llama.cpp.

torch makes a tiny random model of each family and PEFT an adapter of all its linear modules
(tests/helpers/families.py). `converter`: the largest difference of dW between our export and what
llama.cpp's convert_lora_to_gguf.py makes of the same adapter. `base`, `adapter`: the largest
difference of logits between llama.cpp (float32, base from its convert_hf_to_gguf.py, adapter from
our export) and torch. `change`: what the adapter changes at most, in torch.

    pip install llama-cpp-py-sync    # and a checkout of llama.cpp, for its converters
    python -m benchmarks.formats.gguf_families LLAMA_CPP_DIRECTORY
"""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from gguf import GGUFReader

from benchmarks import command_line
from benchmarks.formats.bindings import LlamaCpp, conditions
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.models.model import Model
from d2c_mlx.packs.export import export
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.files import write_json

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))
from helpers.families import FAMILIES, TOKENS  # noqa: E402
from helpers.tiny import tiny_tokenizer  # noqa: E402

FEATURE = "all linear"
# convert_hf_to_gguf.py, without a vocabulary: it knows no tokenizer of 300 tokens.
CONVERT_BASE = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion import ModelType, get_model_class
config = json.load(open(sys.argv[1] + "/config.json"))
kind = get_model_class(config["architectures"][0])
def set_vocab(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(config["vocab_size"])
kind.set_vocab = set_vocab
convert_hf_to_gguf.main()
"""


def python(*arguments):
    """Run a program of its own; its words only if it fails."""
    done = subprocess.run([sys.executable, "-W", "ignore", *map(str, arguments)],
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)


def deltas(path):
    """Module -> dW of a GGUF adapter, by llama.cpp's formula."""
    reader = GGUFReader(path)
    field = reader.fields.get("adapter.lora.alpha")
    found = {t.name: np.array(t.data, np.float32) for t in reader.tensors}
    names = {name.rpartition(".")[0] for name in found}
    return {
        name: (field.contents() / len(found[f"{name}.lora_a"]) if field else 1.0)
        * (found[f"{name}.lora_b"] @ found[f"{name}.lora_a"])
        for name in names
    }


def logits(model, adapter=None):
    """llama.cpp's, of `TOKENS`."""
    llm = LlamaCpp(model, 64)
    llm.attach(adapter)
    found = llm.logits(TOKENS[0].tolist())
    llm.close()
    return found


def compare(folder, tools, family):
    """One row of the table."""
    model, source, out = folder / family / "model", folder / family / FEATURE, folder / family
    tiny_tokenizer().save_pretrained(model)
    base = Model(str(model))
    adapter = replace(read_adapter(source, base.module_shapes), sources=("task",))
    pack = write_pack(
        out / "pack",
        [adapter.uniform(mx.float32)],
        Manifest(model=family, config_hash=base.config_hash, n_layers=base.n_layers, budget="-"),
    )
    ours = out / "gguf" / export(pack, "gguf", out / "gguf", str(model))["task"]
    theirs, gguf = out / "theirs.gguf", out / "base.gguf"
    python(tools / "convert_lora_to_gguf.py", "--base", model, "--outtype", "f32", "--outfile",
           theirs, source)  # fmt: skip
    python("-c", CONVERT_BASE, tools, model, "--outtype", "f32", "--outfile", gguf)
    a, b = deltas(ours), deltas(theirs)
    if a.keys() != b.keys():
        raise SystemExit(f"{family}: other tensors: {sorted(a.keys() ^ b.keys())}")
    plain = [lora.delta() for lora in adapter.modules.values()]
    moved = [
        name
        for name, x in b.items()
        if not any(x.shape == d.shape and np.allclose(x, d, atol=1e-6) for d in plain)
    ]
    known = np.load(out / "logits.npz")
    expected = {name: known[name][0] for name in ("base", FEATURE)}
    return {
        "converter": max(float(np.abs(a[name] - b[name]).max()) for name in a),
        "base": float(np.abs(logits(gguf) - expected["base"]).max()),
        "adapter": float(np.abs(logits(gguf, ours) - expected[FEATURE]).max()),
        "change": float(np.abs(expected[FEATURE] - expected["base"]).max()),
        # As llama.cpp's converter has them: names without `blk.<n>.`, and whose rows it moves.
        "tensors": sorted({name.split(".")[2] for name in b}),
        "moved": sorted({name.split(".")[2] for name in moved}),
    }


def main():
    """Compare, print, write."""
    parser = command_line(__doc__, __spec__, "gguf_families.json")
    parser.add_argument("llama_cpp", type=Path, help="a checkout, for its converters")
    options = parser.parse_args()
    tools = options.llama_cpp
    with tempfile.TemporaryDirectory() as folder:
        python(ROOT / "tests" / "helpers" / "families.py", folder)
        rows = {family: compare(Path(folder), tools, family) for family in FAMILIES}
    print("| family | converter | base | adapter | change |\n|---|--:|--:|--:|--:|")
    for family, row in rows.items():
        numbers = (f"{row[name]:.1e}" for name in ("converter", "base", "adapter", "change"))
        print(f"| {family} | {' | '.join(numbers)} |")
    result = {
        **conditions(),
        "mlx": mx.__version__,
        "rows": rows,
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
