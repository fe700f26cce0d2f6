"""The options of the configs, as click has them. Written by `make options`; edit the configs."""

from __future__ import annotations

from functools import partial

import click

from .help import GroupedOption
from .paths import UserPath

__all__ = ["PHONE_OPTIONS", "RUN_OPTIONS"]

_PATH = UserPath(path_type=str)
_option = partial(click.option, cls=GroupedOption)

RUN_OPTIONS = (
    _option(
        "--adapters",
        group="Adapters and tasks",
        type=_PATH,
        metavar="A",
        help="folder with one subdirectory per adapter (PEFT, MLX or GGUF), or a list with"
        " commas: directories, .gguf files, Hugging Face ids owner/name[@revision]",
    ),
    _option(
        "--skip-bad/--no-skip-bad",
        group="Adapters and tasks",
        default=None,
        help="leave out adapters that cannot be read or have no rows, and list them  [default: no]",
    ),
    _option(
        "--accept-dora",
        group="Adapters and tasks",
        type=int,
        help="take DoRAs in as the closest LoRAs of this rank, and show the error  [default:"
        " refuse them]",
    ),
    _option(
        "--tasks",
        group="Adapters and tasks",
        type=_PATH,
        metavar="DIR",
        help="folder with <adapter>/probe.jsonl and <adapter>/test.jsonl  [default: none: by"
        " weights alone, nothing is measured]",
    ),
    _option(
        "--unlabelled",
        group="Adapters and tasks",
        type=_PATH,
        metavar="FILE",
        help='prompts without answers: JSONL, {"task": NAME, "prompt": ...} or with'
        ' "messages"; without --tasks the adapters\' answers to them are the rows, else'
        " they are for --refine",
    ),
    _option(
        "--model",
        group="Adapters and tasks",
        metavar="M",
        help="base model: mlx-lm directory, Hugging Face id or .gguf file  [default: the"
        " embedded SmolLM2-135M-Instruct]",
    ),
    _option(
        "--probe-model",
        group="Adapters and tasks",
        metavar="M",
        help="base model to choose everything on, such as a copy in 4 bits; the pack is for"
        " --model, and the report has its losses on both  [default: --model]",
    ),
    _option(
        "--output",
        group="Adapters and tasks",
        type=_PATH,
        metavar="DIR",
        help="run directory; the same command continues there",
    ),
    _option(
        "--budget",
        group="Budget",
        metavar="B",
        help='"12.5%", "40MB", "500KB" or a number of adapters  [default: 12.5%]',
    ),
    _option(
        "--plan",
        group="Budget",
        metavar="NAME",
        help="of a budget in bytes: auto chooses clusters, rank and bits by measuring; d2c"
        " merges in 16 bit, as a number of adapters always does  [default: auto]",
    ),
    _option(
        "--format",
        group="Budget",
        metavar="NAME",
        help="files of a planned pack, whose bytes are planned: compact, one for all adapters;"
        " gguf, one for each, which llama.cpp reads as it is  [default: compact]",
    ),
    _option(
        "--same-shape/--no-same-shape",
        group="Budget",
        default=None,
        help="plan one rank and one set of modules for all adapters, for runtimes that feed a"
        " LoRA to a fixed graph  [default: no]",
    ),
    _option(
        "--max-adapters",
        group="Budget",
        type=int,
        help="most adapters that a plan may store  [default: any number]",
    ),
    _option(
        "--merge-method",
        group="Merge",
        metavar="NAME",
        help="linear, ties, ..., auto; auto packs for every cluster the best of seven on its"
        " calibration rows  [default: layerwise, or regmean++ where a model cannot be run"
        " by blocks; without rows tsv]",
    ),
    _option(
        "--merge-rank",
        group="Merge",
        type=int,
        help="largest rank of a merged adapter  [default: the largest of the inputs]",
    ),
    _option(
        "--density",
        group="Merge",
        type=float,
        help="share of entries kept by methods that sparsify  [default: 0.5]",
    ),
    _option(
        "--scale",
        group="Merge",
        type=float,
        help="scale of every merge  [default: tuned per cluster on the calibration rows;"
        " without any from the weights]",
    ),
    _option(
        "--clusters",
        group="Search",
        type=_PATH,
        metavar="FILE",
        help="merge these clusters in place of D2C's, to compare merge methods: clusters.json"
        " of a run, or a JSON list of lists of adapters",
    ),
    _option(
        "--search",
        group="Search",
        metavar="NAME",
        help="estimates: measure the partitions that are estimated to be best; paper: the"
        " plain loop of D2C  [default: estimates]",
    ),
    _option(
        "--thorough/--no-thorough",
        group="Search",
        default=None,
        help="measure every candidate of a plan, instead of those that estimates choose"
        "  [default: False]",
    ),
    _option(
        "--eps",
        group="Search",
        type=float,
        help="smallest fall of regret that moves a task  [default: 0.001]",
    ),
    _option(
        "--seed",
        group="Search",
        type=int,
        help="of all random choices  [default: 0]",
    ),
    _option(
        "--probe-examples",
        group="Evaluation",
        type=int,
        help="calibration rows that decide, the first of probe.jsonl  [default: 10]",
    ),
    _option(
        "--test-examples",
        group="Evaluation",
        type=int,
        help="held-out rows that judge, the first of test.jsonl; 0 is all  [default: 100]",
    ),
    _option(
        "--answers",
        group="Evaluation",
        type=int,
        help="most held-out rows of each task that are answered and compared with the expected"
        " answers; 0 is none  [default: 3]",
    ),
    _option(
        "--baselines",
        group="Evaluation",
        metavar="LIST",
        help='partitions that bench merges too, to compare; "" is none  [default:'
        " merge-all,random,kmeans]",
    ),
    _option(
        "--random-seeds",
        group="Evaluation",
        type=int,
        help="random partitions to average  [default: 3]",
    ),
    _option(
        "--memory-limit",
        group="Evaluation",
        metavar="M",
        help='of the process while it evaluates: "3GB", "800MB"  [default: what the device'
        " recommends, else half the memory]",
    ),
    _option(
        "--without",
        group="Evaluation",
        metavar="LIST",
        help="optimizations of the evaluation to switch off: head, prefix, batches, frozen,"
        " fold, streams, exponentials, cache, bound",
    ),
    _option(
        "--stack",
        group="Evaluation",
        type=int,
        help="adapters evaluated in one batch; above 1 a loss depends on the others by"
        " rounding  [default: 1]",
    ),
    _option(
        "--refine/--no-refine",
        group="Refine",
        default=None,
        help="train every merge for a while to match its members  [default: no]",
    ),
    _option(
        "--refine-steps",
        group="Refine",
        type=int,
        help="most steps of it  [default: 40]",
    ),
    _option(
        "--refine-rate",
        group="Refine",
        type=float,
        help="its learning rate  [default: 0.0005]",
    ),
)
PHONE_OPTIONS = (
    _option(
        "--device",
        group="Model and device",
        metavar="PROFILE",
        required=True,
        help="iphone-6gb, iphone-8gb, iphone-12gb, mac-8gb, mac-16gb, android-8gb, or a .yaml"
        " file of your own",
    ),
    _option(
        "--model",
        group="Model and device",
        metavar="M",
        help="mlx-lm directory, Hugging Face id or .gguf file  [default: the embedded"
        " SmolLM2-135M-Instruct]",
    ),
    _option(
        "--bits",
        group="Model and device",
        type=int,
        help="4 or 8, if M is not quantized yet  [default: M as it is]",
    ),
    _option(
        "--adapters",
        group="Quality",
        type=_PATH,
        metavar="A",
        help="the individual adapters, to measure them too",
    ),
    _option(
        "--tasks",
        group="Quality",
        type=_PATH,
        metavar="DIR",
        help="<task>/test.jsonl, to measure quality too",
    ),
    _option(
        "--test-examples",
        group="Quality",
        type=int,
        help="rows that judge, 0 is all  [default: 10]",
    ),
    _option(
        "--answers",
        group="Quality",
        type=int,
        help="how many of them are answered and compared, 0 is none  [default: all of them]",
    ),
    _option(
        "--contexts",
        group="Measurement",
        metavar="LIST",
        help="tokens of the prompts  [default: 128,512,1024, if the model has room]",
    ),
    _option(
        "--decode",
        group="Measurement",
        type=int,
        help="tokens generated after each  [default: 32]",
    ),
    _option(
        "--runs",
        group="Measurement",
        type=int,
        help="timed runs of each  [default: 3]",
    ),
)
