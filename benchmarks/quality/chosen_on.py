"""Does it help to choose and merge on the quantized base that ships?

    python -m benchmarks.quality.chosen_on --library DIR [--bits 4] [--budget 3] [--work DIR]

One pack is made on the base in 16 bit, one on the base that mlx-lm quantizes. Both are judged, with
the task adapters, on the quantized one, by the same held-out rows. A second call goes on with the
runs in --work. Results: results/chosen_on.json.
"""

from pathlib import Path

from benchmarks import command_line
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.heldout import paired_bootstrap, row_losses
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.phone.quantized import quantized_model
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json


def main():
    """Make both packs, judge them, print and write what each loses."""
    parser = command_line(__doc__, __spec__, "chosen_on.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--budget", default="3")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=25)
    parser.add_argument("--work", type=Path, default=Path("runs/chosen_on"))
    options = parser.parse_args()
    adapters, rows = options.library / "adapters", options.library / "tasks"
    _, shipped, about = quantized_model(options.model, options.bits)
    serving = {}
    for name, model in (("16 bit", options.model), (f"{options.bits} bit", str(shipped))):
        config = RunConfig(
            adapters=[str(adapters)], tasks=str(rows), model=model, budget=options.budget,
            probe_examples=options.examples, output=str(options.work / name.replace(" ", "-")),
        )  # fmt: skip
        pack = load_pack(run(config, until="pack").path("pack"))
        serving[name] = {task: pack.load(task) for task in sorted(pack.tasks)}
    base, tasks = Model(str(shipped)), list(serving["16 bit"])
    scorer = Scorer(Engine(base))
    held_out = [base.encode(task, load_task(rows / task).test[: options.tests]) for task in tasks]
    own = {task: read_adapter(adapters / task, base.module_shapes) for task in tasks}
    theirs = row_losses(scorer, own, held_out)
    losses = {
        name: row_losses(scorer, adapter_of, held_out) for name, adapter_of in serving.items()
    }
    excess = {name: paired_bootstrap(ours, theirs) for name, ours in losses.items()}
    gained = paired_bootstrap(losses["16 bit"], losses[f"{options.bits} bit"])
    for name, interval in {**excess, "difference": gained}.items():
        print("{}: {difference:.4f} ({low:.4f} to {high:.4f})".format(name, **interval))
    result = {
        "machine": machine(), "judged_on": about["form"], "budget": options.budget, "tasks": tasks,
        "n_rows": options.tests, "excess_by_base_of_choice": excess, "difference": gained,
    }  # fmt: skip
    write_json(options.output, result)


if __name__ == "__main__":
    main()
