"""Students: adapters as refining trains them, in the numbers that their factors are made of.

A merge trains its factors. An adapter in the low bits of a plan keeps its codes and trains the
scale and the bias of every group of them, so nothing is rounded anew and no byte is added.

Source of the second: PEQA, https://arxiv.org/abs/2305.14152; so ends EfficientQAT,
https://arxiv.org/abs/2407.11062.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.compressed import Compressed, Level, Quantized, unpack_codes
from d2c_mlx.evaluate.distill import Factors
from d2c_mlx.refine.steps import Parameters

__all__ = ["Form", "Student", "student_of"]

Form = TypeVar("Form", Adapter, Compressed)


class Student(Protocol[Form]):
    """An adapter in the form in which it is trained and stored.

    Attributes:
        start: parameters at the beginning.
        rate: learning rate that suits them.
    """

    start: Parameters
    rate: float

    def factors(self, parameters: Parameters) -> Factors:
        """The factors, made by operations of MLX."""

    def made(self, parameters: Parameters) -> Form:
        """The adapter as a pack holds it."""

    def plain(self, form: Form) -> Adapter:
        """The adapter to evaluate."""


def student_of(form: Form, dtype: mx.Dtype) -> Student[Form]:
    """The student that starts as a form.

    Args:
        form: a merge, or an adapter as a plan stores it.
        dtype: 16-bit dtype of the base model, in which a merge is packed.
    """
    return _Merge(form, dtype) if isinstance(form, Adapter) else _Stored(form, dtype)


def _balance(adapter: Adapter, path: str) -> float:
    """The ratio by which `a` is multiplied and `b` divided, so that both have one norm.

    Adam moves both by the same amount.
    """
    norms = [float(np.linalg.norm(x)) for x in adapter.modules[path].factors()]
    return math.sqrt(norms[1] / norms[0]) if min(norms) > 0 else 1.0


class _Merge:
    """A plain adapter, whose factors are trained."""

    rate = 5e-4

    def __init__(self, form: Adapter, dtype: mx.Dtype) -> None:
        self._form, self._dtype = form, dtype
        self.start: Factors = {}
        for path in sorted(form.modules):
            a, b = form.modules[path].factors()
            ratio = _balance(form, path)
            self.start[path] = mx.array(a * ratio)[None], mx.array(b / ratio)[None]

    def factors(self, parameters: Factors) -> Factors:
        return parameters

    def made(self, parameters: Factors) -> Adapter:
        modules = {
            path: LoRA(a[0].astype(self._dtype), b[0].astype(self._dtype))
            for path, (a, b) in parameters.items()
        }
        return replace(self._form, modules=modules)

    def plain(self, form: Adapter) -> Adapter:
        return form


@dataclass(frozen=True)
class _Part:
    """One factor of a level: rows whose codes stay.

    Attributes:
        stored: the factor as it is stored.
        codes: `(rows, groups, group_size)` uint8; None at 16 bits.
    """

    stored: Quantized
    codes: mx.array | None

    @classmethod
    def of(cls, stored: Quantized) -> _Part:
        if stored.bits == 16:
            return cls(stored, None)
        codes = unpack_codes(stored.weight, stored.bits)
        return cls(stored, mx.array(codes.reshape(len(codes), -1, stored.group_size)))

    def start(self, ratio: float) -> tuple[mx.array, ...]:
        """The parameters in float32: scales and biases of the groups, or 16-bit numbers."""
        one = self.stored
        some = [one.weight] if self.codes is None else [one.scales, one.biases]
        return tuple(mx.array(x.astype(np.float32) * ratio) for x in some)

    def rows(self, numbers: tuple[mx.array, ...]) -> mx.array:
        """The factor `(rows, width)`."""
        if self.codes is None:
            return numbers[0]
        scales, biases = (x[..., None] for x in numbers)
        values = scales * self.codes.astype(mx.float32) + biases
        return values.reshape(len(values), -1)[:, : self.stored.width]

    def made(self, numbers: tuple[mx.array, ...], ratio: float) -> Quantized:
        """The factor with these numbers, over `ratio`, in float16."""
        halves = [np.array((x / ratio).astype(mx.float16)) for x in numbers]
        if self.codes is None:
            return replace(self.stored, weight=halves[0])
        return replace(self.stored, scales=halves[0], biases=halves[1])


class _Stored:
    """An adapter in low bits: scales and biases are trained, and numbers that are in 16 bit."""

    # The best of four on three tasks: benchmarks/notes/2026-11-29-refining.md.
    rate = 2e-3

    def __init__(self, form: Compressed, dtype: mx.Dtype) -> None:
        self._form, self._dtype = form, dtype
        self._parts = {
            path: [(_Part.of(level.a), _Part.of(level.b)) for level in levels]
            for path, levels in form.modules.items()
        }
        exact = self.plain(form)
        self._ratios = {path: _balance(exact, path) for path in form.modules}
        self.start: Parameters = {
            path: [(a.start(ratio), b.start(1 / ratio)) for a, b in self._parts[path]]
            for path, ratio in self._ratios.items()
        }

    def factors(self, parameters: Parameters) -> Factors:
        found = {}
        for path, parts in self._parts.items():
            pairs = list(zip(parts, parameters[path]))
            a = mx.concatenate([part.rows(numbers) for (part, _), (numbers, _) in pairs])
            b = mx.concatenate([part.rows(numbers) for (_, part), (_, numbers) in pairs])
            found[path] = a.T[None], b[None]
        return found

    def made(self, parameters: Parameters) -> Compressed:
        modules = {
            path: tuple(
                Level(a.made(of_a, ratio), b.made(of_b, 1 / ratio))
                for (a, b), (of_a, of_b) in zip(self._parts[path], parameters[path])
            )
            for path, ratio in self._ratios.items()
        }
        return replace(self._form, modules=modules)

    def plain(self, form: Compressed) -> Adapter:
        found = form.adapter(self._dtype)
        assert found, f"{form.name}: a stored form has modules"
        return found
