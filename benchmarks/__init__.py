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


def command_line(doc: str, spec: ModuleSpec) -> ArgumentParser:
    """A parser whose `--help` is a script's docstring, under the name it is run by.

    Args:
        doc: the script's `__doc__`.
        spec: its `__spec__`.
    """
    name = spec.name.removesuffix(".__main__")
    return ArgumentParser(
        prog=f"python -m {name}", description=doc, formatter_class=RawDescriptionHelpFormatter
    )
