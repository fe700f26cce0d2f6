"""Write the tables of pages/*.md and the plots from results/*.json, or check them.

python -m benchmarks.tables [--check] [--directory DIR]
"""

from pathlib import Path

from benchmarks import RESULTS, command_line
from benchmarks.tables.pages import update


def main():
    """Name what was written, or with `--check` what is outdated; 1 if there is any."""
    parser = command_line(__doc__, __spec__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    parser.add_argument("--directory", type=Path, default=RESULTS.parent,
                        help="with pages/, plots/ and results/  [default: benchmarks]")  # fmt: skip
    options = parser.parse_args()
    changed = update(options.directory, options.check)
    for one in changed:
        print(f"{one}: not what the results say" if options.check else f"{one}: written")
    if options.check and changed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
