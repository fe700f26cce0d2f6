"""Twelve merge methods for d2c-mlx, found by the entry points of pyproject.toml.

Every method is a pure function of arrays in a module beside this one, with its paper. Here it gets
what it needs from `options`, and says what a run must know of it.
"""

from d2c_mlx.merge.methods import MergeMethod, in_core, truncated
from d2c_mlx_methods.entrywise import dare_linear, dare_ties, emr
from d2c_mlx_methods.factorwise import concat, factor_linear
from d2c_mlx_methods.lego import lego
from d2c_mlx_methods.spectral import ctm, iso_c, iso_cts, knots, pico
from d2c_mlx_methods.wudi import wudi

DARE_LINEAR = in_core(lambda space, o: dare_linear(space.updates, o.density, o.seed))
DARE_TIES = in_core(lambda space, o: dare_ties(space.updates, o.density, o.seed))
EMR = in_core(lambda space, o: emr(space.updates))
KNOTS = in_core(lambda space, o: knots(space, o.density))
ISO_C = in_core(lambda space, o: iso_c(space, o.rank))
ISO_CTS = in_core(lambda space, o: iso_cts(space, o.rank))
PICO = in_core(lambda space, o: pico(space))
CTM = in_core(lambda space, o: ctm(space, o.rank, o.density))
WUDI = in_core(lambda space, o: wudi(space))
LEGO = MergeMethod(lambda factors, o: lego(factors, o.rank, o.seed))
CONCAT = MergeMethod(lambda factors, o: concat(factors, o.weights), weighted=True, sums_ranks=True)


def _factor_linear(factors, options):
    a, b = factor_linear(factors, options.weights, options.scales)
    # PEFT's own bits unless fewer columns were asked for.
    return (a, b) if len(b) <= options.rank else truncated([(a, b)], options.rank)


FACTOR_LINEAR = MergeMethod(_factor_linear, weighted=True)
