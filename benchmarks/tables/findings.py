"""Findings of the paper's experiment: lines of templates/*.md.jinja with their numbers.

A line has `it` (`Experiment`), `case` (`Ablations`), and filters: `points` and `percent` as the
tables round them, `nats`. Numbers follow the results; words are read again when results change.
"""

import statistics
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from benchmarks.tables.experiment import averages, ends
from benchmarks.tables.result_files import kind_of

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = {
    "points": lambda value: f"{float(value):.1f}",
    "percent": lambda value: f"{100 * float(value):.1f} %",
    "nats": lambda value: f"{float(value):.3f}",
}


def rows_with(rows, wanted):
    """Those that have these values.

    Raises:
        LookupError: none has; with the values.
    """
    found = [row for row in rows if wanted.items() <= row.items()]
    if not found:
        raise LookupError(", ".join(f"{name} {value}" for name, value in wanted.items()))
    return found


class Rows:
    """Rows of one method at one budget; scores in percent, excess in nats per target token."""

    def __init__(self, rows, ceiling):
        """Take rows, and the row of the individual adapters."""
        self._rows, self._ceiling = rows, ceiling

    @property
    def score(self):
        """Mean over tasks, seeds and draws."""
        return statistics.mean(averages(row)[0] for row in self._rows)

    @property
    def kept(self):
        """Score over the ceiling's."""
        ceiling, _ = averages(self._ceiling)
        if not ceiling:
            raise LookupError("the individual adapters have no score")
        return self.score / ceiling

    @property
    def kept_each(self):
        """The same of each seed and draw."""
        return [Rows([row], self._ceiling).kept for row in self._rows]

    @property
    def excess(self):
        """Loss over the individual adapters'."""
        mean = statistics.mean(averages(row)[1] for row in self._rows)
        return mean - averages(self._ceiling)[1]

    @property
    def regret(self):
        """On the probe rows that decided."""
        found = [row["probe_regret"] for row in self._rows]
        if None in found:
            raise LookupError("probe rows that decided")
        return statistics.mean(found)

    def scores_of(self, kind):
        """Mean over tasks of a kind."""
        names = [name for name in self._ceiling["tasks"] if kind_of(name) == kind]
        if not names:
            raise LookupError(f"no task is of kind {kind}")
        return statistics.mean(averages(row, names)[0] for row in self._rows)


class Experiment:
    """Rows by method and budget, and methods beside each other."""

    def __init__(self, result):
        """Take results/experiment*.json."""
        self._result = result
        base, self._ceiling = ends(result)
        self.base, self.ceiling = (Rows([row], self._ceiling) for row in (base, self._ceiling))

    def __call__(self, method, budget=12.5, seed=None):
        """`Rows` of a method at a budget in percent, of all seeds or of one."""
        wanted = {"method": method, "budget": f"{budget:g}%"}
        wanted |= {} if seed is None else {"seed": seed}
        return Rows(rows_with(self._result["rows"], wanted), self._ceiling)

    def ahead(self, method, beside, budget=12.5):
        """Points by which a method is ahead of another: `difference`, `low`, `high`, `seeds`."""
        wanted = {"method": method, "beside": beside, "budget": f"{budget:g}%"}
        return rows_with(self._result["pairs"], wanted)[0]


class Ablations:
    """Choices of D2C alone."""

    def __init__(self, result):
        """Take results/ablations.json."""
        self._rows = result["rows"]

    def __call__(self, case, value, seed=0):
        """The row of a case, its value and a seed."""
        return rows_with(self._rows, {"case": case, "value": value, "seed": seed})[0]

    def range_of(self, key, **wanted):
        """Smallest and largest number of that name, in rows with that `case` or `value`."""
        rows = rows_with(self._rows, wanted)
        values = [row[key] for row in rows if row.get(key) is not None]
        if not values:
            raise LookupError(key)
        return min(values), max(values)


def findings(read, template, file):
    """Lines of a template, filled; one that speaks of what was not measured says that instead.

    Raises:
        SystemExit: a line is no template, or has an unknown name; in one line.
    """
    environment = Environment(undefined=StrictUndefined)
    environment.filters |= FILTERS
    known = {"it": Experiment(read(file)), "case": Ablations(read("ablations"))}
    lines = []
    for number, line in enumerate((TEMPLATES / template).read_text("utf-8").splitlines(), 1):
        try:
            lines.append(environment.from_string(line).render(known))
        except LookupError as error:
            lines.append(f"- *Not measured: {error.args[0]}.*")
        except TemplateError as error:
            raise SystemExit(f"{TEMPLATES / template}:{number}: {error}") from None
    return lines
