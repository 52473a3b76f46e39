"""The vocabulary of a method's equation: vectors, one per branch, and scalars.

A method says what it does once, as `guide(self, u, c, *, scale)`, with +, -, products and quotients by scalars, `dot`,
`norm`, `mean`, `std`, and the functions of this module. That function is run

- with `Dense` vectors, which are arrays: the reference;
- with `Form` vectors, linear forms over a basis whose moments are known, and scalars that record what is done with them
  (program.py): the program that every kernel runs;
- with forms over moments that a kernel has computed: what a custom function of the moments sees.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from ..arrays import Array

Scalar = Any  # a number, an array of them (one per sample or group), or program.TracedScalar
V = TypeVar("V", bound="Vector")


class Vector(Protocol):
    """What the branch of a sample, or of a group of its elements, is in a method's equation."""

    def __add__(self: V, other: V) -> V: ...
    def __sub__(self: V, other: V) -> V: ...
    def __neg__(self: V) -> V: ...
    def __mul__(self: V, scalar: Scalar) -> V: ...
    def __rmul__(self: V, scalar: Scalar) -> V: ...
    def __truediv__(self: V, scalar: Scalar) -> V: ...
    def dot(self: V, other: V) -> Scalar:
        """sum_i x_i y_i."""

    def norm(self) -> Scalar:
        """sqrt(sum_i x_i^2)."""

    def mean(self) -> Scalar:
        """sum_i x_i / N."""

    def std(self) -> Scalar:
        """sqrt(sum_i (x_i - mean)^2 / (N - 1)), the unbiased one of torch.std."""


class Dense:
    """An array, its reductions over `axes`."""

    def __init__(self, array: Array, axes: tuple[int, ...]) -> None:
        self.array, self.axes = array, axes

    def _with(self, array: Array) -> Dense:
        return Dense(array, self.axes)

    def __add__(self, other: Dense) -> Dense:
        return self._with(self.array + other.array)

    def __sub__(self, other: Dense) -> Dense:
        return self._with(self.array - other.array)

    def __neg__(self) -> Dense:
        return self._with(-self.array)

    def __mul__(self, scalar: Scalar) -> Dense:
        return self._with(self.array * scalar)

    __rmul__ = __mul__

    def __truediv__(self, scalar: Scalar) -> Dense:
        return self._with(self.array / scalar)

    def _sum(self, array: Array) -> Array:
        if isinstance(array, np.ndarray):
            return array.sum(axis=self.axes, keepdims=True)
        return array.sum(dim=self.axes, keepdim=True)

    def dot(self, other: Dense) -> Scalar:
        return self._sum(self.array * other.array)

    def norm(self) -> Scalar:
        return sqrt(self.dot(self))

    def mean(self) -> Scalar:
        return self._sum(self.array) / self._count()

    def std(self) -> Scalar:
        away = self.array - self.mean()
        return sqrt(self._sum(away * away) / (self._count() - 1))

    def _count(self) -> int:
        return int(np.prod([self.array.shape[axis] for axis in self.axes]))


class Moments(Protocol):
    """Sums and inner products of the vectors of a basis."""

    size: Scalar  # N

    def sum(self, i: int) -> Scalar: ...
    def inner(self, i: int, j: int) -> Scalar: ...


class Form:
    """sum_i coefficient_i y_i over a basis y of which the moments are known. Coefficients of exactly 0 are not kept."""

    __array_ufunc__ = None  # numpy leaves scalar * form to the form

    def __init__(self, parts: Mapping[int, Scalar], moments: Moments) -> None:
        self.parts = {i: x for i, x in parts.items() if not is_zero(x)}
        self.moments = moments

    def _each(self, f: Callable[[Scalar], Scalar]) -> Form:
        return Form({i: f(x) for i, x in self.parts.items()}, self.moments)

    def __add__(self, other: Form) -> Form:
        if not isinstance(other, Form):
            return NotImplemented
        parts = dict(self.parts)
        for i, x in other.parts.items():
            parts[i] = parts[i] + x if i in parts else x
        return Form(parts, self.moments)

    def __neg__(self) -> Form:
        return self._each(lambda x: -x)

    def __sub__(self, other: Form) -> Form:
        if not isinstance(other, Form):
            return NotImplemented
        parts = dict(self.parts)
        for i, x in other.parts.items():
            parts[i] = parts[i] - x if i in parts else -x
        return Form(parts, self.moments)

    def __mul__(self, scalar: Scalar) -> Form:
        if isinstance(scalar, Form):
            raise TypeError("a guidance method cannot multiply two branches element by element; dot() sums the product")
        return self._each(lambda x: _product(x, scalar))

    __rmul__ = __mul__

    def __truediv__(self, scalar: Scalar) -> Form:
        if isinstance(scalar, Form):
            raise TypeError("a guidance method cannot divide by a branch; divide by its norm(), std() or mean()")
        return self._each(lambda x: x / scalar)

    def dot(self, other: Form) -> Scalar:
        """sum_ij x_i z_j <y_i, y_j>."""
        inner = self.moments.inner
        return _total(
            _product(_product(x, z), inner(min(i, j), max(i, j)))
            for i, x in self.parts.items()
            for j, z in other.parts.items()
        )

    def norm(self) -> Scalar:
        return sqrt(maximum(self.dot(self), 0.0))

    def mean(self) -> Scalar:
        return self._sum() / self.moments.size

    def std(self) -> Scalar:
        size, total = self.moments.size, self._sum()
        return sqrt(maximum((self.dot(self) - total * total / size) / (size - 1.0), 0.0))

    def _sum(self) -> Scalar:
        return _total(_product(x, self.moments.sum(i)) for i, x in self.parts.items())

    def __repr__(self) -> str:
        return f"Form({self.parts})"


def is_zero(x: Scalar) -> bool:
    """Whether a scalar is the number 0, and not an array or a traced value that may be."""
    return isinstance(x, (int, float)) and x == 0


def _product(x: Scalar, y: Scalar) -> Scalar:
    """x y; the number 1 costs nothing."""
    return y if isinstance(x, float) and x == 1 else x if isinstance(y, float) and y == 1 else x * y


def _total(terms: Iterable[Scalar]) -> Scalar:
    total: Scalar = None
    for term in terms:
        total = term if total is None else total + term
    return 0.0 if total is None else total


def sqrt(x: Scalar) -> Scalar:
    return _apply("sqrt", x)


def exp(x: Scalar) -> Scalar:
    return _apply("exp", x)


def minimum(x: Scalar, y: Scalar) -> Scalar:
    """The smaller one; NaN if one is."""
    return _apply("minimum", x, y)


def maximum(x: Scalar, y: Scalar) -> Scalar:
    """The larger one; NaN if one is."""
    return _apply("maximum", x, y)


def where(condition: Scalar, x: Scalar, y: Scalar) -> Scalar:
    """x where the condition (of scalars: a < b) holds, else y."""
    return _apply("where", condition, x, y)


def _apply(name: str, *values: Scalar) -> Scalar:
    for value in values:
        own = getattr(value, "_scalar_function", None)
        if own is not None:  # a traced value
            return own(name, *values)
    if name == "where" and isinstance(values[0], bool):
        return values[1] if values[0] else values[2]
    tensors = [value for value in values if hasattr(value, "new_full")]
    if not tensors:
        with np.errstate(invalid="ignore", divide="ignore"):
            return getattr(np, name)(*values)
    if name in ("minimum", "maximum") and len(tensors) == 1:  # no copy of a number to the device
        limit = values[0] if values[1] is tensors[0] else values[1]
        return tensors[0].clamp(max=limit) if name == "minimum" else tensors[0].clamp(min=limit)
    if name == "where" and len(tensors) == 1:  # two numbers would be float32
        values = (values[0], tensors[0].new_full((), values[1], dtype=sys.modules["torch"].float64), values[2])
    return getattr(sys.modules["torch"], name)(*values)
