"""A run and its stages. Library imports stay inside commands, so that --help is instant."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .paths import UserPath

F = TypeVar("F", bound=Callable[..., Any])

_DIR = UserPath(path_type=str)
_OPTIONS = [
    click.option("--model", metavar="M", help="mlx-lm directory, Hugging Face id or .gguf file"
                 "  [default: the embedded SmolLM2-135M-Instruct]"),
    click.option("--adapters", type=_DIR, metavar="A", help="folder with one subdirectory per"
                 " adapter (PEFT, MLX or GGUF), or a list with commas: directories, .gguf files,"
                 " Hugging Face ids owner/name[@revision]"),
    click.option("--tasks", type=_DIR, metavar="DIR", help="<adapter>/probe.jsonl and test.jsonl"),
    click.option("--budget", metavar="B", help='"12.5%", "40MB", "500KB" or a number of adapters'
                 "  [default: 12.5%]"),
    click.option("--output", type=_DIR, metavar="DIR", help="run directory; resumable"),
    click.option("--plan", metavar="NAME", help="auto: clusters, rank and bits for a budget in"
                 " bytes, by measuring; d2c: merge, in 16 bit  [default: auto]"),
    click.option("--max-adapters", type=int, help="most adapters that a plan may store  [default:"
                 " any number]"),
    click.option("--merge-method", metavar="NAME", help="linear, ties, ..., auto (docs/merging.md)"
                 "  [default: layerwise, or regmean++ where a model cannot be run by blocks]"),
    click.option("--density", type=float, help="share of entries kept by methods that sparsify"
                 "  [default: 0.5]"),
    click.option("--scale", type=float, help="scale of every merge  [default: tuned on probes]"),
    click.option("--merge-rank", type=int, help="largest rank of a merged adapter  [default: the"
                 " largest of the inputs]"),
    click.option("--search", metavar="NAME", help="moves, or paper: the plain loop of D2C"
                 "  [default: moves]"),
    click.option("--patience", type=int, help="rounds of paper without a new best, or"
                 " proposals of moves in a row that may fail  [default: 2 or 10]"),
    click.option("--init", metavar="LIST", help="starts of D2C: adapters, kmeans, random,"
                 " table, pairs  [default: table,kmeans]"),
    click.option("--rounds", type=int, help="most rounds of one start  [default: 10]"),
    click.option("--restarts", type=int, help="draws per kind of start  [default: 1]"),
    click.option("--eps", type=float, help="smallest fall of regret that moves a task"
                 "  [default: 0.001]"),
    click.option("--seed", type=int, help="of all random choices  [default: 0]"),
    click.option("--probe-examples", type=int, help="rows that decide  [default: 10]"),
    click.option("--neighbours", type=int, help="other adapters under which a task is probed, the"
                 " most alike; or twice as many as share a slot  [default: 32]"),
    click.option("--test-examples", type=int, help="rows that judge, 0 is all  [default: 100]"),
    click.option("--answers", type=int, help="held-out rows of each task that are answered and"
                 " compared with the expected answers  [default: 0]"),
    click.option("--baselines", metavar="LIST", help="partitions that bench merges too, to compare;"
                 ' "" is none  [default: merge-all,random,kmeans]'),
    click.option("--random-seeds", type=int, help="random partitions to average  [default: 3]"),
    click.option("--memory-limit", metavar="M", help='"3GB", "800MB"  [default: what the device'
                 " recommends, else half the memory]"),
    click.option("--without", metavar="LIST", help="savings of the evaluation to switch off: head,"
                 " prefix, batches, frozen, fold, streams, exponentials, cache, bound"),
    click.option("--stack", type=int, help="adapters evaluated in one batch  [default: 1]"),
    click.option("--compile/--no-compile", default=None, help="evaluate through mx.compile"
                 "  [default: no]"),
    click.option("--refine/--no-refine", default=None, help="train every merge for a while to match"
                 " its members (docs/refining.md)  [default: no]"),
    click.option("--refine-steps", type=int, help="most steps of it  [default: 40]"),
    click.option("--refine-rate", type=float, help="its learning rate  [default: 0.0005]"),
    click.option("--unlabelled", type=_DIR, metavar="FILE", help='prompts without answers for it:'
                 ' JSONL, {"task": NAME, "prompt": ...} or with "messages"'),
]  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="print the result as JSON")
_QUIET = click.option("--quiet", is_flag=True, help="no progress bars")


def _run_options(command: F) -> F:
    """The options of RunConfig, and the optional YAML file they override."""
    for option in [*reversed(_OPTIONS), _QUIET, _JSON]:
        command = option(command)
    return click.argument("config", required=False, type=UserPath(path_type=Path))(command)


def _execute(until: str, config: Path | None, quiet: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
    """Load the config (a run directory's own if no file is given), run, print.

    Under `mlx.launch` ranks other than 0 serve instead: they need no file but the base model's.
    """
    from d2c_mlx.run.config_file import load_config
    from d2c_mlx.utils.environment import RANK_VARIABLES
    from d2c_mlx.utils.errors import ConfigError

    if any(name in os.environ for name in RANK_VARIABLES):
        from d2c_mlx.evaluate.distributed import launched, serve

        group = launched()
        if group and group.rank() > 0:
            serve(group)
            return
    given = {name: value for name, value in options.items() if value is not None}
    if until == "refine":
        given["refine"] = True
    if until in ("plan", "cluster", "merge", "refine"):
        given["plan"] = "auto" if until == "plan" else "d2c"
    saved = Path(given.get("output", "")) / "config.yaml"
    resumed = config is None and "output" in given and "adapters" not in given
    if resumed and saved.is_file():
        config = saved

    checked = load_config(config, given, saved=resumed)
    if until == "plan" and not checked.planned:
        raise ConfigError(
            f"budget: found {checked.budget!r} adapters, expected bytes, such as 12.5% or 40MB, to"
            " plan for; pass the number as --max-adapters"
        )

    from d2c_mlx.run.config import stages_of
    from d2c_mlx.run.directory import RunDirectory

    directory = RunDirectory(Path(checked.output))
    # Asked here as well, since the pipeline takes seconds to import.
    if not directory.is_finished(checked, stages_of(checked, until)):
        from d2c_mlx.pipeline import run as run_pipeline

        run_pipeline(checked, until, quiet)
    _show(directory.root, until, as_json)


_ARTIFACTS = {
    "probe": "losses.json",
    "plan": "plan.json",
    "cluster": "clusters.json",
    "merge": "merges.json",
    "refine": "refines.json",
    "pack": "pack/manifest.json",
    "bench": "bench.json",
    "report": "bench.json",
}


def _show(output: Path, stage: str, as_json: bool) -> None:
    from d2c_mlx.report.report import render_table

    content = json.loads((output / _ARTIFACTS[stage]).read_text(encoding="utf-8"))
    if as_json:
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
    elif stage in ("bench", "report"):
        click.echo(render_table(content))
        for name in ("pack", "report.html") if stage == "report" else ():
            click.echo(f"{name:<12} {output / name}")
    else:
        click.echo(f"wrote {output / _ARTIFACTS[stage]}")


def _stage_command(name: str, help: str, until: str | None = None) -> click.Command:
    @click.command(name, help=help)
    @_run_options
    def command(config: Path | None, quiet: bool, as_json: bool, **options: Any) -> None:  # noqa: ANN401
        _execute(until or name, config, quiet, as_json, **options)

    return command


_RESUME = "\n\nRuns what comes before it too, unless it is done. With --output, and neither"
_RESUME += " CONFIG nor --adapters, options that are not given are those of that run directory."

run = _stage_command(
    "run",
    "Convert, probe, cluster, merge, pack, bench and report.\n\n\b\nExamples:\n"
    "  d2c-mlx run --adapters loras --tasks tasks --budget 25% --output runs/first\n"
    "  d2c-mlx run config.yaml --budget 20MB\n"
    "  d2c-mlx run --output runs/first          # continue, or repeat what changed",
    "report",
)
probe = _stage_command(
    "probe",
    "Losses of the adapters on the tasks' probe examples -> losses.json." + _RESUME
    + "\n\n\b\nExample:\n  d2c-mlx probe --adapters loras --tasks tasks --output runs/first",
)  # fmt: skip
plan = _stage_command(
    "plan",
    "What to store for a budget in bytes, by measuring -> plan.json." + _RESUME
    + " From then on, that includes --plan auto.\n\n\b\nExample:\n"
    "  d2c-mlx plan --output runs/first --budget 3%",
)  # fmt: skip
cluster = _stage_command(
    "cluster",
    "Which adapters to merge: D2C and the baselines -> clusters.json." + _RESUME
    + "\n\n\b\nExample:\n  d2c-mlx cluster --output runs/first --restarts 3 --json",
)  # fmt: skip
merge = _stage_command(
    "merge",
    "One adapter per cluster -> merged/<k>/." + _RESUME
    + "\n\n\b\nExample:\n  d2c-mlx merge --output runs/first --merge-method ties",
)  # fmt: skip
refine = _stage_command(
    "refine",
    "Train every merge to match its members -> refined/<k>/." + _RESUME
    + " From then on, that includes --refine.\n\n\b\nExample:\n"
    "  d2c-mlx refine --output runs/first --refine-steps 50",
)  # fmt: skip
pack = _stage_command(
    "pack",
    "Adapters and a manifest that ship -> pack/." + _RESUME
    + "\n\n\b\nExample:\n  d2c-mlx pack --output runs/first --json",
)  # fmt: skip
bench = _stage_command(
    "bench",
    "Held-out loss of every method -> bench.json." + _RESUME
    + "\n\n\b\nExamples:\n  d2c-mlx bench --output runs/first --test-examples 0\n\n\b\n"
    "A pack as on a phone: d2c-mlx phone PACK. Two results of that side by side:\n"
    "  d2c-mlx bench compare A.json B.json",
)  # fmt: skip
report = _stage_command(
    "report",
    "The results for people -> report.md, report.html." + _RESUME
    + "\n\n\b\nExample:\n  d2c-mlx report --output runs/first",
)  # fmt: skip
