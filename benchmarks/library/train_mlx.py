"""Train LoRA adapters with mlx-lm's own command, one directory per task, and judge them by ours.

    python -m benchmarks.library.train_mlx --tasks DIR --output DIR --names date-en,num-en
        [--config benchmarks/library/mlx.yaml] [--set iters=60 --set num_layers=8] [--result FILE]

What runs is `mlx_lm.lora --train --data DIR/<task> -c CONFIG`, with the prompts masked, in a
process that only has a faster BLAS. Reads `<task>/train.jsonl` and judges by `<task>/test.jsonl`,
before and after. One adapter at a time, whole or not at all; a stopped run continues with the first
one that is missing. `training.jsonl` in the output has a line for every adapter; one that does not
beat the base says so. `stock` is the loss after training by mlx-lm's own model, adapter layers and
loss function. Seconds are those of mlx-lm's command, loading included.

Weights are float32: on a CPU quantized or 16-bit ones cannot be trained at a useful speed.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import yaml
from mlx_lm.tuner.trainer import default_loss

from benchmarks import command_line
from benchmarks.stock_models import float32_base
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.kernels import use_fast_exponentials
from d2c_mlx.models.model import Model
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_dir, write_json

CONFIG = Path(__file__).with_name("mlx.yaml")
# The command `mlx_lm.lora`, after the BLAS.
COMMAND = "import d2c_mlx; from mlx_lm.lora import main; main()"


def train(model, task, config, output):
    """Run mlx-lm's trainer, its words on stderr; the adapter is in `output` then."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "--train", "--model", model, "--data", task,
             "--adapter-path", output, "-c", path],
            stdout=sys.stderr,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{task.name}: mlx-lm's trainer ended with code {done.returncode}")


def stock_loss(model, adapter, examples):
    """Mean NLL per target token by mlx-lm alone: its loader, layers and `default_loss`.

    Row by row and without padding: in its padded batches (which it trains on) `default_loss` counts
    the first token of padding as one more target.
    """
    loaded, _ = mlx_lm.load(str(model), adapter_path=str(adapter))
    total = 0.0
    for row in examples.examples:
        lengths = mx.array([[row.first_target, len(row.tokens)]])
        loss, n = default_loss(loaded, mx.array([row.tokens]), lengths)
        total += loss.item() * n.item()
    return total / examples.n_targets


class Trainer:
    """The base model, and the same weights in float32 for mlx-lm: shared by all adapters."""

    def __init__(self, options, directory):
        self.options = options
        self.base = Model(options.model)
        # mlx-lm writes this path into the adapter; its last part is the base model's name.
        self.model = directory / self.base.name
        float32_base(self.base, self.model)
        # Its exponentials would be put into mlx-lm's model as well, which `stock_loss` measures.
        self.engine = Engine(self.base)
        use_fast_exponentials(self.base.model, False)

    def loss(self, adapter, examples):
        """Mean NLL per target token by our engine, in nats."""
        ((_, rows),) = self.engine.run([(adapter, examples)])
        return float(rows.sum()) / examples.n_targets

    def adapt(self, task):
        """Train, judge and save one adapter; returns its line of the log."""
        config = yaml.safe_load(self.options.config.read_text(encoding="utf-8"))
        config |= dict(self.options.set)
        config["save_every"] = config["iters"] + 1  # no checkpoints beside the adapter
        rows = [json.loads(row) for row in open(task / "test.jsonl", encoding="utf-8")]
        tests = self.base.encode(task.name, rows[: self.options.tests])
        before = self.loss(None, tests)
        with write_dir(self.options.output / "adapters" / task.name) as directory:
            started = time.perf_counter()
            train(self.model, task, config, directory)
            seconds = time.perf_counter() - started
            adapter = read_adapter(directory, self.base.module_shapes)
            after = self.loss(adapter, tests)
            stock = stock_loss(self.model, directory, tests)
            used = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        return line(task, adapter, used) | {
            "base": round(before, 4), "loss": round(after, 4), "beats_base": after < before,
            "stock": round(stock, 4), "stock_difference": abs(after - stock),
            "seconds": round(seconds, 1),
        }  # fmt: skip


def line(task, adapter, used):
    """Settings of one adapter under the names that train.py gives them, and mlx-lm's own."""
    lora = used["lora_parameters"]
    targets = {path.split(".")[-1].removesuffix("_proj") for path in adapter.modules}
    return {
        "name": task.name, "rank": lora["rank"], "alpha": lora["rank"] * lora["scale"],
        "targets": ",".join(sorted(targets)), "rslora": False, "layers": used["num_layers"],
        "steps": used["iters"], "seed": used["seed"], "batch": used["batch_size"],
        "rate": used["learning_rate"], "optimizer": used["optimizer"],
        "trainer": f"mlx-lm {mlx_lm.__version__}",
        "rows": sum(1 for _ in open(task / "train.jsonl", encoding="utf-8")),
    }  # fmt: skip


def setting(text):
    """`name=value` with a value in YAML."""
    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def parse():
    """The options."""
    parser = command_line(__doc__, __spec__)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--names", required=True, help="tasks, separated by commas")
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML that mlx_lm.lora reads")
    parser.add_argument("--set", type=setting, action="append", default=[],
                        help="name=value in place of the config's")  # fmt: skip
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--result", type=Path, help="JSON with all lines, and this machine")
    return parser.parse_args()


def main():
    """Train what is missing."""
    options = parse()
    log = options.output / "training.jsonl"
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(options, Path(directory))
        for name in options.names.split(","):
            if (options.output / "adapters" / name).exists():
                continue
            text = json.dumps(trainer.adapt(options.tasks / name))
            with open(log, "a", encoding="utf-8") as file:
                file.write(text + "\n")
            print(text, flush=True)
    if options.result:
        rows = [json.loads(text) for text in open(log, encoding="utf-8")]
        write_json(options.result, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
