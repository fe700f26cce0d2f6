"""Measurements of d2c-mlx, its rivals and its parts: a folder per question, see README.md.

Every script is run from the root of the repository, as `python -m benchmarks.quality.experiment`,
and has `--help`. The import of `d2c_mlx` comes before any of `mlx.core`: it loads the fast BLAS.
"""

from pathlib import Path

import d2c_mlx  # noqa: F401

# One JSON file per script, of the same name.
RESULTS = Path(__file__).parent / "results"
