"""Peak memory and seconds of every stage on models of the shapes that people use.

    python -m benchmarks.speed.large --work DIR --shape 1B --adapters 100 --memory-limit 6GB

Random weights with the standard deviation of trained ones, in bfloat16; adapters of rank 32 on all
linear modules, in PEFT's layout and float16, four of a kind; one calibration row of a few tokens,
since a forward pass of a large model is slow on a CPU. More than 24 adapters are copies of those,
and losses and clusters are put in, not measured: four passes an adapter, and all cosines. Merges
are of fours, at scale 1. The peak is the process's, base model included, and begins anew with every
stage (Linux). Results: results/large.json, written after every stage. DIR keeps model and adapters
for the next run.
"""

import gc
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks import command_line
from d2c_mlx.cluster.partition import Clusters
from d2c_mlx.cluster.search import STRENGTHS
from d2c_mlx.evaluate.scorer import LossTable
from d2c_mlx.models.resolve import resolve_model
from d2c_mlx.pipeline import STAGES
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.inputs import read_inputs
from d2c_mlx.run.run import Run
from d2c_mlx.utils.device import environment, process_peak
from d2c_mlx.utils.files import write_json

import mlx.core as mx  # isort: skip

# Of Llama-3.2: hidden size, blocks, heads, key-value heads, width of the MLP.
SHAPES = {"1B": (2048, 16, 32, 8, 8192), "3B": (3072, 28, 24, 8, 8192)}
VOCABULARY, RANK, GROUP = 128256, 32, 4
METHODS = ("linear", "regmean", "layerwise")
# Most adapters whose losses are measured.
MEASURED = 24


def modules(shape):
    """Module of a block -> (in, out)."""
    hidden, _, heads, kv, wide = SHAPES[shape]
    kv = hidden // heads * kv
    attention = {"q": hidden, "k": kv, "v": kv, "o": hidden}
    found = {f"self_attn.{name}_proj": (hidden, out) for name, out in attention.items()}
    return found | {"mlp.gate_proj": (hidden, wide), "mlp.up_proj": (hidden, wide),
                    "mlp.down_proj": (wide, hidden)}  # fmt: skip


def write_model(directory, shape):
    """A model directory of mlx-lm, with the tokenizer of the demo's model."""
    hidden, blocks, heads, kv, wide = SHAPES[shape]
    directory.mkdir(parents=True)
    for file in resolve_model(None)[1].iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copyfile(file, directory / file.name)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": blocks, "intermediate_size": wide, "num_attention_heads": heads,
        "num_key_value_heads": kv, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 131072, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }  # fmt: skip

    def weight(out, width):
        return (0.02 * mx.random.normal((out, width))).astype(mx.bfloat16)

    mx.random.seed(0)
    ones = mx.ones((hidden,), mx.bfloat16)
    for i in range(blocks):
        prefix = f"model.layers.{i}."
        tensors = {f"{prefix}{name}.weight": weight(out, width)
                   for name, (width, out) in modules(shape).items()}  # fmt: skip
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = ones
        mx.save_safetensors(str(directory / f"model-{i:02d}.safetensors"), tensors,
                            metadata={"format": "mlx"})  # fmt: skip
    mx.save_safetensors(
        str(directory / "model-ends.safetensors"),
        {"model.embed_tokens.weight": weight(VOCABULARY, hidden), "model.norm.weight": ones},
        metadata={"format": "mlx"},
    )
    (directory / "config.json").write_text(json.dumps(config), "utf-8")


def write_adapter(directory, shape, i):
    """An adapter whose dW has falling singular values; those of a group are alike."""
    directory.mkdir(parents=True)
    common, own = np.random.default_rng(i // GROUP), np.random.default_rng((1, i))
    falling = np.arange(1, RANK + 1, dtype=np.float32) ** -0.7
    tensors = {}
    for block in range(SHAPES[shape][1]):
        for name, (width, out) in modules(shape).items():
            a, b = (
                common.standard_normal(size, np.float32) + own.standard_normal(size, np.float32)
                for size in ((RANK, width), (out, RANK))
            )
            prefix = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = mx.array(a / width**0.5).astype(mx.float16)
            tensors[f"{prefix}.lora_B.weight"] = mx.array(0.01 * b * falling).astype(mx.float16)
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none",
              "base_model_name_or_path": f"random/{shape}",
              "target_modules": [name.split(".")[1] for name in modules(shape)]}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config), "utf-8")


def write_library(work, shape, n):
    """Model, n adapters, and a calibration and a held-out row for each, where they are missing."""
    if not (work / "model" / "config.json").exists():
        shutil.rmtree(work / "model", ignore_errors=True)
        write_model(work / "model", shape)
    shutil.rmtree(work / f"{n}", ignore_errors=True)
    (work / f"{n}").mkdir()
    for i in range(n):
        path, name = work / "adapters" / f"{i:03d}", f"{i:03d}"
        if not (path / "adapter_config.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            if i < MEASURED:
                write_adapter(path, shape, i)
            else:
                shutil.copytree(work / "adapters" / f"{i % MEASURED:03d}", path)
        (work / f"{n}" / name).symlink_to(path)
        task = work / "tasks" / name
        task.mkdir(parents=True, exist_ok=True)
        for kind in ("probe", "test"):
            row = {"text": f"{kind} {i}"}
            (task / f"{kind}.jsonl").write_text(json.dumps(row) + "\n", "utf-8")


def forget_peak():
    """Let `process_peak` begin anew, where the system can."""
    gc.collect()
    mx.clear_cache()
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")


def put_in(session, groups):
    """What `probe` and `cluster` would have found: every adapter gains one nat; these groups."""
    n, strengths = len(session.library.names), sorted(STRENGTHS)
    losses = LossTable(tuple(session.library.names), np.ones(n), np.full(n, 2.0), tuple(strengths),
                       np.tile(2.0 - np.array(strengths), (n, 1)))  # fmt: skip
    write_json(session.path("losses.json"), losses.to_json())
    found = [asdict(Clusters("d2c", tuple(k for k, some in enumerate(groups) for _ in some), 0.0))]
    methods = dict.fromkeys(("d2c", "kmeans", "random", "merge-all"), found)
    write_json(session.path("clusters.json"), {"methods": methods})


def measure(work, n, limit, wanted, tell):
    """Run the wanted stages; `tell(stage, {seconds, peak_nbytes, ...})` hears of each."""
    shutil.rmtree(work / "run", ignore_errors=True)
    os.environ["D2C_MLX_CACHE"] = str(work / "cache")
    shutil.rmtree(work / "cache", ignore_errors=True)
    groups = [[f"{j:03d}" for j in range(i, min(i + GROUP, n))] for i in range(0, n, GROUP)]
    clusters = work / "clusters.json"
    clusters.write_text(json.dumps(groups), "utf-8")
    config = RunConfig(
        adapters=str(work / f"{n}"), tasks=str(work / "tasks"), model=str(work / "model"),
        output=str(work / "run"), budget=str(len(groups)), clusters=str(clusters),
        merge_method="linear", baselines=(), probe_examples=1, test_examples=1,
    )  # fmt: skip
    os.environ["D2C_MLX_MEMORY_LIMIT"] = limit
    forget_peak()
    started = time.monotonic()
    inputs = read_inputs(config)
    tell("load", {"seconds": round(time.monotonic() - started, 2), "peak_nbytes": process_peak(),
                  "base_nbytes": mx.get_active_memory(), "input_nbytes": inputs.capacity.total,
                  "folded": inputs.library.scorer.engine.fold})  # fmt: skip
    cases = {method: config.replace(merge_method=method) for method in METHODS}
    cases["plan"] = RunConfig(**config.to_dict() | {
        "budget": "12.5%", "clusters": None, "merge_method": None,
    })  # fmt: skip
    for case in wanted:
        session = Run(cases[case])
        library = session.inputs.library
        for stage in session.stages("pack"):
            if stage in ("probe", "cluster") and n > MEASURED:
                put_in(session, groups)
                if stage == "probe":
                    table = LossTable.from_json(session.read("losses.json"))
                    library = library.measured(table)
                continue
            forget_peak()
            library = STAGES[stage](session, library)
            record = json.loads((work / "run" / ".stages" / f"{stage}.json").read_text("utf-8"))
            name = stage if stage in ("convert", "probe", "cluster") else f"{stage} {case}"
            tell(name.replace("plan plan", "plan"), {
                "seconds": record["seconds"], "peak_nbytes": record["process_peak_nbytes"],
                "mlx_peak_nbytes": record["peak_nbytes"],
                "tokens": record["evaluations"]["tokens"],
            })  # fmt: skip
    shutil.rmtree(work / "run", ignore_errors=True)


def main():
    """Measure one shape, number of adapters and limit, and add it to the results."""
    parser = command_line(__doc__, __spec__, "large.json")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--memory-limit", default="6GB")
    parser.add_argument("--cases", default=",".join((*METHODS, "plan")))
    options = parser.parse_args()
    work = options.work.resolve() / options.shape
    write_library(work, options.shape, options.adapters)
    results = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    name = f"{options.shape}, {options.adapters} adapters, {options.memory_limit}"
    entry = results.setdefault(name, {"stages": {}}) | {"environment": environment()}
    results[name] = entry

    def tell(stage, found):
        entry["stages"][stage] = found
        write_json(options.output, results)
        print(stage, found, flush=True)

    measure(work, options.adapters, options.memory_limit, options.cases.split(","), tell)


if __name__ == "__main__":
    main()
