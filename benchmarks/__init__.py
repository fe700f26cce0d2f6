"""Measurements of d2c-mlx, its rivals and its parts: a folder per question, see README.md.

Every script is run from the root of the repository, as `python -m benchmarks.quality.experiment`,
and has `--help`. The import of `d2c_mlx` comes before any of `mlx.core`: it loads the fast BLAS.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib.machinery import ModuleSpec
from pathlib import Path

import d2c_mlx  # noqa: F401

# One JSON file per script, of the same name.
RESULTS = Path(__file__).parent / "results"


def command_line(doc: str, spec: ModuleSpec, result: str | None = None) -> ArgumentParser:
    """A parser whose `--help` is a script's docstring, under the name it is run by.

    Args:
        doc: the script's `__doc__`.
        spec: its `__spec__`.
        result: its file in results/, which `--output` replaces; None: it has no such option.
    """
    parser = ArgumentParser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}", description=doc,
        formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    if result:
        parser.add_argument("--output", type=Path, default=RESULTS / result,
                            help=f"[default: benchmarks/results/{result}]")  # fmt: skip
    return parser
