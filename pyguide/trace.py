"""A solver, run on symbols: the linear forms of everything that it computes.

Run with arrays, a solver is the reference sampler; run with `Form`s it is recorded. A form is a linear combination of
atoms, in the order in which they become known:

    x_T, then per row the noises z drawn before an evaluation, an edit of the model's input, D and E of the evaluation

A form refuses whatever is not linear; the error names the operation and the row.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from .checks import as_float, number
from .path import Floats, Level, NoisePath

KEPT = 16  # live values that are looked at per row, the newest: a solver that keeps all of them stays linear in R


class TraceError(TypeError):
    """A solver did something that is not linear in its states, or that a plan cannot express."""


class Form:
    """A linear form over the atoms of a trace. Supports + - between forms, * and / by numbers, and nothing else."""

    __slots__ = ("__weakref__", "serial", "trace", "vector")

    def __init__(self, trace: Trace, vector: Floats) -> None:
        self.trace, self.vector = trace, vector
        self.serial = trace.register(self)

    def _combine(self, other: object, sign: float) -> Form:
        if not isinstance(other, Form):
            if _number(other) == 0:
                return Form(self.trace, self.vector)
            self._refuse(f"the addition of {type(other).__name__} {other!r}")
        left, right = self.vector, other.vector
        if len(left) >= len(right):
            total = left.copy()
            total[: len(right)] += right if sign > 0 else -right
        else:
            total = right.copy() if sign > 0 else -right
            total[: len(left)] += left
        return Form(self.trace, total)

    def __add__(self, other: object) -> Form:
        return self._combine(other, 1.0)

    __radd__ = __add__

    def __sub__(self, other: object) -> Form:
        return self._combine(other, -1.0)

    def __rsub__(self, other: object) -> Form:
        return (-self)._combine(other, 1.0)

    def __mul__(self, other: object) -> Form:
        number = _number(other)
        if number is None:
            kind = "the product of two states" if isinstance(other, Form) else f"a product with {_described(other)}"
            self._refuse(kind)
        if not math.isfinite(number):
            self._refuse(f"a product with {number}, which is not finite")
        return Form(self.trace, self.vector * number)

    __rmul__ = __mul__

    def __truediv__(self, other: object) -> Form:
        number = _number(other)
        if number is None:
            self._refuse(f"a division by {'a state' if isinstance(other, Form) else _described(other)}")
        if number == 0 or math.isnan(number):
            self._refuse(f"a division by {'zero' if number == 0 else 'nan'}")
        return Form(self.trace, self.vector / number)

    def __rtruediv__(self, other: object) -> NoReturn:
        self._refuse("a division by a state")

    def __neg__(self) -> Form:
        return Form(self.trace, -self.vector)

    def __pos__(self) -> Form:
        return Form(self.trace, self.vector)

    def _refuse(self, operation: str) -> NoReturn:
        raise TraceError(f"row {self.trace.row}: a solver must be linear in its states; it used {operation}")

    def __bool__(self) -> NoReturn:
        self._refuse("the truth value of a state (bool)")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            self._refuse(f"numpy.{ufunc.__name__}.{method}")
        return self._function(ufunc.__name__, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        self._refuse(f"numpy.{func.__name__}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        form = _first_form((args, kwargs or {}))
        if name == "randn_like":
            return form.trace.noise()
        return form._function(name, args, kwargs or {})

    def _function(self, name: str, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Numbers that arrive as numpy or torch scalars on the left of an operator come through here.

        Keyword arguments (torch's alpha and rounding_mode, numpy's out and where) change what an operation means:
        refused.
        """
        operation = _OPERATORS.get(name)
        if operation is None or len(inputs) != 2 or kwargs:
            self._refuse(f"the function {name}{f' with {chr(44).join(kwargs)}' if operation and kwargs else ''}")
        left, right = inputs
        return operation(left, right) if isinstance(left, Form) else operation(_scalar(self, left, name), right)

    # what a k-diffusion function asks of its tensor besides arithmetic: one sample without dimensions
    shape = (1,)
    ndim = 0

    def new_ones(self, size: object) -> Any:
        from .extras import require

        torch = require("torch")
        return torch.ones(1, dtype=torch.float64)

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        self._refuse("a conversion to an array")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(f"the attribute or method .{name}")


def _refused(name: str) -> Callable[..., NoReturn]:
    def method(self: Form, *args: object) -> NoReturn:
        self._refuse(name)

    return method


for _name, _what in {
    "__lt__": "a comparison (<)",
    "__le__": "a comparison (<=)",
    "__gt__": "a comparison (>)",
    "__ge__": "a comparison (>=)",
    "__eq__": "a comparison (==)",
    "__ne__": "a comparison (!=)",
    "__abs__": "abs",
    "__pow__": "a power",
    "__rpow__": "a power",
    "__mod__": "a remainder",
    "__rmod__": "a remainder",
    "__floordiv__": "a floor division",
    "__rfloordiv__": "a floor division",
    "__divmod__": "a remainder",
    "__rdivmod__": "a remainder",
    "__matmul__": "a matrix product",
    "__rmatmul__": "a matrix product",
    "__invert__": "an inversion (~)",
    "__round__": "rounding",
    "__float__": "a conversion to a number",
    "__int__": "a conversion to a number",
    "__index__": "a conversion to a number",
    "__complex__": "a conversion to a number",
    "__getitem__": "indexing",
    "__setitem__": "indexing",
    "__contains__": "a membership test",
    "__len__": "its length",
    "__iter__": "iteration",
    "__copy__": "a copy (write x * 1.0)",
    "__deepcopy__": "a copy (write x * 1.0)",
}.items():
    setattr(Form, _name, _refused(_what))

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "multiply": lambda a, b: a * b,
    "mul": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "true_divide": lambda a, b: a / b,
    "div": lambda a, b: a / b,
}


def _described(value: object) -> str:
    """A factor that is no number; a tensor [B] of equal numbers is the usual one."""
    shape = getattr(value, "shape", None)
    of = f" of shape {tuple(shape)}: coefficients are numbers, the same for all samples" if shape is not None else ""
    return f"{type(value).__name__}{of}"


def _number(value: object) -> float | None:
    """A real number, or a 0-d array of one; None for anything else."""
    if isinstance(value, (Form, str)):
        return None
    if getattr(value, "ndim", 0) != 0:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _first_form(values: Any) -> Form:
    """The first form in nested lists, tuples and dictionaries; torch calls __torch_function__ only if there is one."""
    if isinstance(values, Form):
        return values
    parts = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ()
    for part in parts:
        try:
            return _first_form(part)
        except LookupError:
            continue
    raise LookupError


def _scalar(form: Form, value: object, name: str) -> float:
    number = _number(value)
    if number is None:
        form._refuse(f"{name} with {type(value).__name__}")
    return number


@dataclass(frozen=True)
class LearnedVariance:
    """A variance that the model chooses: log Sigma = low + (high - low) (v + 1) / 2, v its further C channels.

    low, high: logarithms, finite; (-1, 1) makes v log Sigma itself. Source: Nichol, Dhariwal 2021, eq. 15.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if not math.isfinite(as_float(value)):
                raise ValueError(f"{name}: expected the logarithm of a variance, got {value!r}")
            object.__setattr__(self, name, as_float(value))


Variance = float | LearnedVariance


class Output:
    """What model(x, level) returns inside a solver: .denoised is D (clipped), .noise is E, taken before the clip."""

    __slots__ = ("_gaussian", "_noise", "denoised")

    def __init__(self, denoised: Any, noise: Callable[[], Any], gaussian: Callable[[Any, Variance, Any], Any]) -> None:
        self.denoised, self._noise, self._gaussian = denoised, noise, gaussian

    @property
    def noise(self) -> Any:
        return self._noise()

    def gaussian(self, mean: Any, variance: Variance, z: Any) -> Any:
        """x' ~ N(mean, Sigma), the state of the next evaluation or the result: mean + sqrt(Sigma) z.

        variance: Sigma, a number >= 0 or LearnedVariance. z: noise(i); None: the mean, and Sigma serves classifier
        guidance alone, which shifts it by Sigma grad log p(y | x).
        """
        if not isinstance(variance, LearnedVariance):
            variance = number("variance", variance, or_else=" or LearnedVariance(low, high)")
        return self._gaussian(mean, variance, z)


@dataclass
class Live:
    """A value that the solver kept alive while it called the model: its form then, under a serial number."""

    serial: int
    vector: Floats


class Trace:
    """The record of one symbolic run: R evaluations, their inputs and levels, and the result."""

    def __init__(self, path: NoisePath, *, editable: bool, clipped: bool) -> None:
        self.path, self.editable, self.clipped = path, editable, clipped
        self.atoms: list[tuple[str, int]] = []  # (kind, row): x, z, edit, D, E
        self.inputs: list[Floats] = []  # [R] forms of the model's inputs, edits included
        self.known: list[int] = []  # [R] atoms known when evaluation i is called, its edit included
        self.levels: list[Level] = []
        self.live: list[list[Live]] = []
        self.variances: dict[int, Variance] = {}  # Sigma of the rows that end in a gaussian
        self.drawn: dict[int, Floats] = {}  # the forms that these draw
        self.result: Floats
        self._forms: weakref.WeakValueDictionary[int, Form] = weakref.WeakValueDictionary()
        self._serial = 0

    @property
    def row(self) -> int:
        """The row being computed: the number of evaluations so far."""
        return len(self.inputs)

    def register(self, form: Form) -> int:
        self._serial += 1
        self._forms[self._serial] = form
        return self._serial

    def atom(self, kind: str) -> Form:
        self.atoms.append((kind, self.row))
        vector = np.zeros(len(self.atoms))
        vector[-1] = 1.0
        return Form(self, vector)

    def model(self, x: Any, level: int | Level) -> Output:
        if not isinstance(x, Form):
            raise TraceError(f"row {self.row}: model(x, level) needs a state as x, got {type(x).__name__}")
        here = self.path.level(level) if not isinstance(level, Level) else level
        if not here.sigma > 0:
            raise TraceError(
                f"row {self.row}: the model is evaluated at sigma > 0, got level {level} with sigma={here.sigma}"
            )
        if self.editable:  # the caller's edit is an in-place change of the very tensor that the model is given
            edit = self.atom("edit")
            x.vector = (x + edit).vector
        self.known.append(len(self.atoms))
        alive = [form for form in self._forms.values() if form is not x]  # in the order of creation
        self.live.append([Live(form.serial, form.vector) for form in alive[-KEPT:]])
        self.levels.append(here)
        vector, row = x.vector, self.row
        self.inputs.append(vector)
        self.atoms.append(("D", row))
        denoised, gaussian = Form(self, _unit(len(self.atoms))), functools.partial(self._gaussian, row)
        if not self.clipped:
            # E of the input as it was, whatever the solver does with its variable meanwhile
            return Output(denoised, lambda: (Form(self, vector) - denoised * here.alpha) / here.sigma, gaussian)
        self.atoms.append(("E", row))
        noise = Form(self, _unit(len(self.atoms)))
        return Output(denoised, lambda: noise, gaussian)

    def noise(self, step: int = 0) -> Form:
        return self.atom("z")

    def _gaussian(self, evaluation: int, mean: Any, variance: Variance, z: Any) -> Form:
        """Records row evaluation + 1. A learned sqrt(Sigma) belongs to the row: z itself is in the form then."""
        row = self.row
        if row != evaluation + 1 or row in self.drawn:
            raise TraceError(f"row {row}: a row has one gaussian, made of the evaluation before it; got another")
        if not isinstance(mean, Form) or not (z is None or isinstance(z, Form)):
            kind = type(z if isinstance(mean, Form) else mean).__name__
            raise TraceError(f"row {row}: gaussian needs a state as mean and noise(i) or None as z, got {kind}")
        draws = [j for j in range(self.known[-1], len(self.atoms)) if self.atoms[j][0] == "z"]
        if z is not None and not any(np.array_equal(z.vector, _unit(j + 1)) for j in draws):
            raise TraceError(f"row {row}: the z of a gaussian is noise(i), drawn in this row and as it was drawn")
        if any(mean.vector[j : j + 1].any() for j in draws):
            raise TraceError(f"row {row}: the mean of a gaussian holds noise of this row, besides its variance")
        size = 1.0 if isinstance(variance, LearnedVariance) else math.sqrt(variance)
        x = mean if z is None else mean + z * size
        self.variances[row], self.drawn[row] = variance, x.vector
        return x

    def check_drawn(self) -> None:
        """TraceError if what a gaussian drew is not what the next evaluation sees (before an edit), or the result."""
        for row, vector in self.drawn.items():
            form, size, stop = self.result, len(vector), None
            if row < len(self.inputs):
                form, stop = self.inputs[row], self.known[row] - self.editable
            if not np.array_equal(form[:size], vector) or form[size:stop].any():
                raise TraceError(f"row {row}: what a gaussian draws is the state of the next evaluation, or the result")


def _unit(length: int) -> Floats:
    vector = np.zeros(length)
    vector[-1] = 1.0
    return vector


def trace(
    solver: Callable[..., Any], path: NoisePath, *, clipped: bool = False, editable: bool = False, **options: Any
) -> Trace:
    """Run `solver(model, x, path, noise=..., **options)` on symbols and return the record."""
    record = Trace(path, editable=editable, clipped=clipped)
    x = record.atom("x")
    result = solver(record.model, x, path.drawing(record.noise), noise=record.noise, **options)
    if not isinstance(result, Form):
        raise TraceError(f"row {record.row}: a solver returns its final state, got {type(result).__name__}")
    if not record.inputs:
        raise TraceError("a solver must call model(x, level) at least once")
    record.result = result.vector
    record.check_drawn()
    return record
