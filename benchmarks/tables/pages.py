"""Regions of pages/*.md, README.md and docs/results.md, and the plots: which function makes which.

What stands between `<!-- table: NAME -->` and `<!-- end -->` is made by TABLES[NAME], and
plots/NAME.svg by PLOTS[NAME]. Another table is a function that gets `read` (result_files.py), a row
of TABLES and a region of a page.
"""

import json
import re
from functools import partial
from hashlib import sha256

from benchmarks import RESULTS
from benchmarks.tables import answers, formats, packs, plots, serving, speed, summary
from benchmarks.tables import experiment as paper
from benchmarks.tables.findings import findings
from benchmarks.tables.result_files import reader
from d2c_mlx.report.charts import svg_file

# Region of a page -> function(read) that returns lines of Markdown.
TABLES = {
    "probe": speed.probe,
    "merge": speed.merge,
    "stages": speed.stages,
    "stages-24": partial(speed.stages, file="stages_24"),
    "search": speed.search,
    "planning": speed.plans,
    "large": speed.large,
    "slots": packs.slots,
    "bytes-excess": packs.bytes_excess,
    "bytes-kept": packs.bytes_kept,
    "bytes-refined": packs.bytes_refined,
    "bytes-strong": packs.bytes_strong,
    "phone": speed.phone,
    "phone-memory": speed.phone_memory,
    "fuse": packs.fuse,
    "switch": speed.switch,
    "routers": serving.routers,
    "clients": serving.clients,
    "rooms": serving.rooms,
    "stress": serving.stress,
    "order": packs.order,
    "gemma": packs.gemma,
    "answers": answers.answers,
    "answers-pairs": answers.pairs,
    "departures": answers.departures,
    "without-rows": packs.without_rows,
    "compose": packs.compose,
    "compose-tasks": packs.compose_tasks,
    "compose-methods": partial(packs.compose, file="compose_methods"),
    "two-tasks": packs.two_tasks,
    "library": paper.library,
    "train-mlx": paper.train_mlx,
    "decay": paper.decay,
    "findings": partial(findings, template="experiment.md.jinja", file="experiment"),
    "experiment": paper.experiment,
    "pairs": paper.pairs,
    "worse": paper.worse,
    "kinds": paper.kinds,
    "clusters": paper.clusters,
    "experiment-24": partial(paper.experiment, file="experiment_24"),
    "pairs-24": partial(paper.pairs, file="experiment_24"),
    "ablations": paper.ablations,
    "agreement": paper.agreement,
    "gguf-lora": formats.gguf_lora,
    "gguf-families": formats.gguf_families,
    "gguf-budgets": formats.gguf_budgets,
    "gguf-budgets-24": partial(formats.gguf_budgets, file="gguf_budgets_24"),
    "route": formats.route,
    "route-gemma": partial(formats.route, file="route_gemma"),
    "summary": summary.summary,
    "methods": summary.methods,
    "plans": summary.plans,
    "scores": summary.scores,
    "findings-24": partial(findings, template="ablations.md.jinja", file="experiment_24"),
}
# plots/<name>.svg -> function(read) that returns a matplotlib figure.
PLOTS = {
    "bytes": plots.bytes_excess,
    "experiment": plots.experiment,
    "slots": plots.slots,
}
START, END = re.compile(r"<!-- table: (.*?) -->"), "<!-- end -->"


def show(name, **measured):
    """Print a table of what a script just measured; other results that it needs are the files'."""
    print("\n".join(TABLES[name](reader(**measured))))


def regions(path):
    """Yield the name of a region, or None between regions, and the lines, of all of a file.

    Raises:
        SystemExit: an unknown region, one in another, or one without an end; in one line.
    """
    name, lines = None, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found = START.fullmatch(line)
        if found and name:
            raise SystemExit(f"{path}:{number}: region {name} has no {END} before this line")
        if found:
            yield None, [*lines, line]
            name, lines = found[1], []
            if name not in TABLES:
                known = ", ".join(TABLES)
                raise SystemExit(f"{path}:{number}: no table {name}; there are: {known}")
        elif line == END:
            if not name:
                raise SystemExit(f"{path}:{number}: {END} without a region")
            yield name, lines
            name, lines = None, [line]
        else:
            lines.append(line)
    if name:
        raise SystemExit(f"{path}: region {name} has no {END}")
    yield None, lines


def drawn(name, read):
    """A plot as SVG; its description is a hash of the results that it was drawn from."""
    used = {}

    def noted(file):
        used[file] = read(file)
        return used[file]

    figure = PLOTS[name](noted)
    digest = sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()
    return svg_file(figure, f"results {', '.join(used)}, sha256 {digest}")


def same(old, new):
    """The same bytes; or the same results, where another matplotlib drew, whose bytes differ."""
    version, results = (
        [re.search(pattern, text) for text in (old, new)]
        for pattern in (r"Matplotlib v[^,]+", r"results .*, sha256 \w+")
    )
    if not all((*version, *results)) or version[0][0] == version[1][0]:
        return old == new
    return results[0][0] == results[1][0]


def update(directory, check):
    """Make pages and plots of a directory what its results say; returns what was not."""
    read, changed, files = reader(directory / "results"), [], {}
    pages = sorted((directory / "pages").glob("*.md"))
    if directory.resolve() == RESULTS.parent:
        root = directory.resolve().parent
        pages += [root / "README.md", root / "docs" / "results.md"]
    # Before any table is made: a broken region is an error at once.
    parts = {page: [*regions(page)] for page in pages}
    for page, its in parts.items():
        text, before = [], len(changed)
        for name, lines in its:
            made = TABLES[name](read) if name else lines
            if made != lines:
                changed.append(f"table {name}")
            text += made
        if len(changed) > before:
            files[page] = "\n".join(text) + "\n"
    for name in PLOTS:
        path, made = directory / "plots" / f"{name}.svg", drawn(name, read)
        if not path.exists() or not same(path.read_text(encoding="utf-8"), made):
            changed.append(f"plots/{name}.svg")
            files[path] = made
    for path, content in files.items():
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return changed
