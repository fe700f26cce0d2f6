"""Build the documentation site into build/site, and check it; nothing is fetched.

    .venv-docs/bin/python -m docs.scripts.site        # or: make docs

Pages of docs/ become the site's own, those of benchmarks/ lie below benchmarks/. A link to a file
that has no page is made a link to the repository on GitHub where GITHUB_REPOSITORY names it, else
plain words. The build fails on a dead link, a page that the navigation lacks, an error of
mkdocstrings (which `zensical --strict` does not count), or a public name without words.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES, SITE = ROOT / "build" / "site-pages", ROOT / "build" / "site"
# Where a file of the repository lies in the site.
FOLDERS = {"docs": "", "benchmarks": "benchmarks", "tests/robustness": "robustness"}
COPIED = {".md", ".svg", ".json", ".png", ".css"}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def placed(source: Path) -> Path | None:
    """Path of a file in the site, None if it is not part of it."""
    for folder, place in FOLDERS.items():
        below = ROOT / folder
        if source.is_relative_to(below) and source.suffix in COPIED:
            return Path(place) / source.relative_to(below)
    return None


def pages() -> dict[Path, Path]:
    """Every file of the site: its path in the repository -> its path in the site."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")))
    return {path: place for path in paths if path.is_file() and (place := placed(path))}


def linked(text: str, source: Path, files: dict[Path, Path]) -> str:
    """A page's text with its links as the site has them."""

    def change(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        name, _, anchor = target.partition("#")
        if "://" in target or not name:
            return match[0]
        path = Path(os.path.normpath(source.parent / name))
        if path in files:
            target = os.path.relpath(files[path], files[source].parent)
            return f"{mark}[{label}]({target}{'#' + anchor if anchor else ''})"
        if not path.exists():
            return match[0]  # zensical names it
        repository = os.environ.get("GITHUB_REPOSITORY")
        if not repository:
            return label
        return f"[{label}](https://github.com/{repository}/blob/main/{path.relative_to(ROOT)})"

    return LINK.sub(change, text)


def gather() -> dict[Path, Path]:
    """Fill the folder that the site is built from; returns its files."""
    shutil.rmtree(PAGES, ignore_errors=True)
    files = pages()
    for source, place in files.items():
        target = PAGES / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
            target.write_text(linked(text, source, files), encoding="utf-8")
        else:
            shutil.copy(source, target)
    return files


def problems(output: str, navigation: str) -> list[str]:
    """What zensical does not count: words of mkdocstrings, pages and names that are missing."""
    import griffe  # of .venv-docs alone

    errors = [
        line for line in output.splitlines()
        if re.match(r"\W*(mkdocstrings|griffe|mkdocs_autorefs)", line)
    ]  # fmt: skip
    for path in sorted((ROOT / "docs").rglob("*.md")):
        name = path.relative_to(ROOT / "docs").as_posix()
        if f'"{name}"' not in navigation:
            errors.append(f"docs/{name}: not in the navigation of zensical.toml")
    api = (SITE / "reference" / "api.html").read_text(encoding="utf-8")
    package = griffe.load("d2c_mlx", search_paths=[ROOT], resolve_aliases=True)
    for name in package.exports or ():
        if name == "__version__":
            continue
        if not package[str(name)].has_docstring:
            errors.append(f"d2c_mlx.{name}: no docstring")
        if f'id="d2c_mlx.{name}"' not in api:
            errors.append(f"d2c_mlx.{name}: not on the page of the Python API")
    return errors


def main() -> None:
    """Build and check; exit code 1 if anything is wrong."""
    files = gather()
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    sys.stdout.write(output)
    if done.returncode:
        raise SystemExit(1)
    errors = problems(output, (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    print(*errors, sep="\n", end="\n" if errors else "")
    if errors:
        raise SystemExit(1)
    count = sum(path.suffix == ".md" for path in files)
    print(f"{count} pages: {(SITE / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
