"""The options of the configs, as click has them. Written by `make options`; edit the configs."""

from __future__ import annotations

from functools import partial

import click

from .help import GroupedOption
from .paths import UserPath

__all__ = ["PHONE_OPTIONS", "RUN_OPTIONS"]

_PATH = UserPath(path_type=str)
_adapters_and_tasks = partial(click.option, cls=GroupedOption, group="Adapters and tasks")
_budget = partial(click.option, cls=GroupedOption, group="Budget")
_merge = partial(click.option, cls=GroupedOption, group="Merge")
_search = partial(click.option, cls=GroupedOption, group="Search")
_evaluation = partial(click.option, cls=GroupedOption, group="Evaluation")
_refine = partial(click.option, cls=GroupedOption, group="Refine")
_model_and_device = partial(click.option, cls=GroupedOption, group="Model and device")
_quality = partial(click.option, cls=GroupedOption, group="Quality")
_measurement = partial(click.option, cls=GroupedOption, group="Measurement")

RUN_OPTIONS = (
    _adapters_and_tasks(
        "--adapters",
        type=_PATH,
        metavar="A",
        help="folder with one subdirectory per adapter (PEFT, MLX or GGUF), or a list with"
        " commas: directories, .gguf files, Hugging Face ids owner/name[@revision]",
    ),
    _adapters_and_tasks(
        "--skip-bad/--no-skip-bad",
        default=None,
        help="leave out adapters that cannot be read or have no rows, and list them  [default: no]",
    ),
    _adapters_and_tasks(
        "--accept-dora",
        type=int,
        help="take DoRAs in as the closest LoRAs of this rank, and show the error  [default:"
        " refuse them]",
    ),
    _adapters_and_tasks(
        "--tasks",
        type=_PATH,
        metavar="DIR",
        help="folder with <adapter>/probe.jsonl and <adapter>/test.jsonl  [default: none: by"
        " weights alone, nothing is measured]",
    ),
    _adapters_and_tasks(
        "--unlabelled",
        type=_PATH,
        metavar="FILE",
        help='prompts without answers: JSONL, {"task": NAME, "prompt": ...} or with'
        ' "messages"; the adapters\' answers are the rows, beside --tasks more of them for'
        " layerwise and --refine",
    ),
    _adapters_and_tasks(
        "--model",
        metavar="M",
        help="base model: mlx-lm directory, Hugging Face id or .gguf file  [default: the"
        " embedded SmolLM2-135M-Instruct]",
    ),
    _adapters_and_tasks(
        "--output",
        type=_PATH,
        metavar="DIR",
        help="run directory; the same command continues there",
    ),
    _budget(
        "--budget",
        metavar="B",
        help='"12.5%", "40MB", "500KB" or a number of adapters  [default: 12.5%]',
    ),
    _budget(
        "--plan",
        metavar="NAME",
        help="of a budget in bytes: auto chooses clusters, rank and bits by measuring; d2c"
        " merges in 16 bit, as a number of adapters always does  [default: auto]",
    ),
    _budget(
        "--format",
        metavar="NAME",
        help="files of a planned pack, whose bytes are planned: compact, one for all adapters;"
        " gguf, one for each, which llama.cpp reads as it is  [default: compact]",
    ),
    _budget(
        "--same-shape/--no-same-shape",
        default=None,
        help="plan one rank and one set of modules for all adapters, for runtimes that feed a"
        " LoRA to a fixed graph  [default: no]",
    ),
    _budget(
        "--max-adapters",
        type=int,
        help="most adapters that a plan may store  [default: any number]",
    ),
    _merge(
        "--merge-method",
        metavar="NAME",
        help="linear, ties, ..., auto; auto packs for every cluster the best of seven on its"
        " calibration rows  [default: layerwise, or regmean++ where a model cannot be run"
        " by blocks; without rows tsv]",
    ),
    _merge(
        "--merge-rank",
        type=int,
        help="largest rank of a merged adapter  [default: the largest of the inputs]",
    ),
    _merge(
        "--density",
        type=float,
        help="share of entries kept by methods that sparsify  [default: 0.5]",
    ),
    _merge(
        "--scale",
        type=float,
        help="scale of every merge  [default: tuned per cluster on the calibration rows,"
        " without any from the weights; for layerwise 1.0 or 1.4, by how alike the members"
        " are]",
    ),
    _search(
        "--clusters",
        type=_PATH,
        metavar="FILE",
        help="merge these clusters in place of D2C's, to compare merge methods: clusters.json"
        " of a run, or a JSON list of lists of adapters",
    ),
    _search(
        "--search",
        metavar="NAME",
        help="estimates: measure the partitions that are estimated to be best; paper: the"
        " plain loop of D2C  [default: estimates]",
    ),
    _search(
        "--thorough/--no-thorough",
        default=None,
        help="measure every candidate of a plan, instead of those that estimates choose"
        "  [default: no]",
    ),
    _search(
        "--eps",
        type=float,
        help="smallest fall of regret that moves a task  [default: 0.001]",
    ),
    _search("--seed", type=int, help="of all random choices  [default: 0]"),
    _evaluation(
        "--probe-examples",
        type=int,
        help="calibration rows that decide, the first of probe.jsonl  [default: 10]",
    ),
    _evaluation(
        "--test-examples",
        type=int,
        help="held-out rows that judge, the first of test.jsonl; 0 is all  [default: 100]",
    ),
    _evaluation(
        "--baselines",
        metavar="LIST",
        help='partitions that bench merges too, to compare; "" is none  [default:'
        " merge-all,random,kmeans]",
    ),
    _evaluation(
        "--memory-limit",
        metavar="M",
        help='of the process while it evaluates: "3GB", "800MB"  [default: what the device'
        " recommends, else half the memory]",
    ),
    _evaluation(
        "--without",
        metavar="LIST",
        help="optimizations of the evaluation to switch off: head, prefix, batches, frozen,"
        " fold, streams, exponentials, cache, bound",
    ),
    _evaluation(
        "--stack",
        type=int,
        help="adapters evaluated in one batch; above 1 a loss depends on the others by"
        " rounding  [default: 1]",
    ),
    _refine(
        "--refine/--no-refine",
        default=None,
        help="train every merge, or low-bit adapter, for a while to predict what its members"
        " predict  [default: no]",
    ),
    _refine("--refine-steps", type=int, help="steps of it  [default: 40]"),
    _refine(
        "--refine-rate",
        type=float,
        help="its learning rate  [default: 0.0005, and 0.002 for low-bit adapters]",
    ),
)
PHONE_OPTIONS = (
    _model_and_device(
        "--device",
        metavar="PROFILE",
        required=True,
        help="iphone-6gb, iphone-8gb, iphone-12gb, mac-8gb, mac-16gb, android-8gb, or a .yaml"
        " file of your own",
    ),
    _model_and_device(
        "--model",
        metavar="M",
        help="mlx-lm directory, Hugging Face id or .gguf file  [default: the embedded"
        " SmolLM2-135M-Instruct]",
    ),
    _model_and_device(
        "--bits",
        type=int,
        help="4 or 8, if M is not quantized yet  [default: M as it is]",
    ),
    _quality(
        "--adapters",
        type=_PATH,
        metavar="A",
        help="the individual adapters, to measure them too",
    ),
    _quality(
        "--tasks",
        type=_PATH,
        metavar="DIR",
        help="rows as a run has them, to measure quality too",
    ),
    _quality("--test-examples", type=int, help="rows that judge, 0 is all  [default: 10]"),
    _quality(
        "--answers",
        type=int,
        help="how many of them are answered and compared, 0 is none  [default: all of them]",
    ),
    _measurement(
        "--contexts",
        metavar="LIST",
        help="tokens of the prompts  [default: 128,512,1024, if the model has room]",
    ),
    _measurement("--decode", type=int, help="tokens generated after each  [default: 32]"),
    _measurement("--runs", type=int, help="timed runs of each  [default: 3]"),
)
