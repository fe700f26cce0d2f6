"""The fall of the singular values of dW, in weakly and in strongly trained adapters.

    python -m benchmarks.library.decay LIBRARY [LIBRARY ...] [--output FILE]

A library has `adapters/<name>`, or the adapters themselves, and `training.jsonl`, which may know
their steps. Strong is rank 32 or more on all seven linear modules, of 300 steps or more where they
are known; all others are weak. Singular values of a module are had from its factors: with
a = Q_a R_a and b^T = Q_b R_b those of dW^T = a b are those of R_a R_b^T, r x r. Energy is the
square, as a share of the module's sum; an adapter's numbers are means over its modules, a kind's
are means over its adapters.

Effective rank is exp of the entropy of the singular values as shares of their sum (Roy & Vetterli,
"The effective rank: a measure of effective dimensionality", EUSIPCO 2007); stable rank is the sum
of energies over the largest.
"""

import json
import statistics
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.tables.pages import show
from d2c_mlx.adapters.reading import find_adapters, read_adapter
from d2c_mlx.models.resolve import resolve_model
from d2c_mlx.models.stock import linear_shapes, load_stock
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def singular_values(a, b):
    """Singular values of `a @ b`, `(r,)`, falling; the product is never formed."""
    left, right = (np.linalg.qr(x.astype(np.float64), mode="r") for x in (a, b.T))
    return np.linalg.svd(left @ right.T, compute_uv=False)


def cumulative_energy(values):
    """Share of the energy in the largest 1, 2, ... singular values."""
    energy = values**2
    return np.cumsum(energy) / energy.sum()


def rank_for(cumulative, share):
    """The number of singular values that hold so much of the energy."""
    # The last share is 1 up to rounding.
    return int(np.argmax(cumulative >= min(share, cumulative[-1]))) + 1


def effective_rank(values):
    """Roy and Vetterli's; their shares are of the singular values, not of the energies."""
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def summary(spectra):
    """Means over modules, given the singular values of each; zero updates do not count."""
    alive = [values for values in spectra if values.any()]
    if not alive:
        return None
    curves = [cumulative_energy(values) for values in alive]
    rank = max(map(len, curves))
    padded = [np.pad(curve, (0, rank - len(curve)), constant_values=1.0) for curve in curves]
    return {
        "modules": len(alive),
        "zero_modules": len(spectra) - len(alive),
        "cumulative": [round(float(x), 6) for x in np.mean(padded, axis=0)],
        "rank_90": statistics.fmean(rank_for(curve, 0.90) for curve in curves),
        "rank_99": statistics.fmean(rank_for(curve, 0.99) for curve in curves),
        "stable_rank": statistics.fmean(float((v**2).sum() / v[0] ** 2) for v in alive),
        "effective_rank": statistics.fmean(map(effective_rank, alive)),
    }


def measure(library, source, shapes, steps):
    """One adapter's line; None if all of its updates are zero."""
    adapter = read_adapter(source.path, shapes)
    spectra = {path: singular_values(*lora.factors()) for path, lora in adapter.modules.items()}
    names = {path.split(".")[-1] for path in spectra}
    found = summary(list(spectra.values()))
    if found is None:
        return None
    every = names == {path.split(".")[-1] for path in shapes}
    strong = adapter.rank >= 32 and every and (steps is None or steps >= 300)
    line = {
        "library": library.name, "name": source.name, "kind": "strong" if strong else "weak",
        "rank": adapter.rank, "targets": "all-linear" if every else sorted(names), "steps": steps,
        **found,
    }  # fmt: skip
    if names > set(ATTENTION):
        # The weak ones mostly have no others.
        some = [values for path, values in spectra.items() if path.split(".")[-1] in ATTENTION]
        line["attention"] = summary(some)
    return line


def measure_library(library, shapes):
    """Lines of all adapters of a library."""
    log = library / "training.jsonl"
    lines = [json.loads(text) for text in open(log, encoding="utf-8")] if log.exists() else []
    steps = {line["name"]: line.get("steps") for line in lines}
    inside = library / "adapters"
    sources = find_adapters(inside if inside.is_dir() else library)
    found = [measure(library, source, shapes, steps.get(source.name)) for source in sources]
    return [line for line in found if line]


def main():
    """Measure, write and print."""
    parser = command_line(__doc__, __spec__, "decay.json")
    parser.add_argument("libraries", type=Path, nargs="+")
    parser.add_argument("--model", help="default: the embedded SmolLM2-135M-Instruct")
    options = parser.parse_args()
    model, _ = load_stock(resolve_model(options.model)[1], lazy=True)
    shapes = linear_shapes(model.named_modules())
    lines = [
        line for library in options.libraries for line in measure_library(library.resolve(), shapes)
    ]
    result = {"machine": machine(), "adapters": lines}
    write_json(options.output, result)
    show("decay", decay=result)


if __name__ == "__main__":
    main()
