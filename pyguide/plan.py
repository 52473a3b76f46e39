"""A compiled sampler: a table with a row per model evaluation, and what is known about it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import CLIP, HEAD, MAX_SLOTS, TIMESTEP, Row, row_width, split_row
from .path import Floats, Level

FORMAT = 2
_ARRAYS = ("timestep", "sigma", "alpha", "step", "variance", "table")
_SCALARS: dict[str, Any] = {
    "slots": int,
    "steps": int,
    "train_steps": int,
    "init_scale": (int, float),
    "residual": (int, float),
    "replay_error": (int, float),
    "solver": str,
    "prediction": str,
    "editable": bool,
    "integer_time": bool,
}


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler as numbers: immutable, hashable, thread-safe, on no device. Made by `pyguide.compile`.

    R model evaluations, M slots, R + 1 rows of W = 8 + M M + 4 M numbers each; see layout.py for a row and reference.py
    for what a row does. Row 0 runs before the first evaluation, row i consumes evaluation i - 1.
    """

    table: Floats  # [R+1, W] float64
    timestep: Floats  # [R] what the model is told
    sigma: Floats  # [R] noise standard deviation of the model's inputs
    alpha: Floats  # [R] their signal coefficient
    variance: Floats  # [R] Sigma of the Gaussian that row i + 1 draws x from; 1: learned, in the row; NaN: no Gaussian
    step: NDArray[np.int64]  # [R] the solver step that each evaluation belongs to
    end: tuple[float, float]  # (alpha, sigma) of the result
    slots: int  # M
    steps: int  # N
    residual: float  # certified: largest relative distance of the rows' linear forms from the solver's
    replay_error: float  # certified: largest relative distance from the solver itself, run in float64
    solver: str
    prediction: str
    editable: bool
    init_scale: float
    train_steps: int  # of the schedule, 0 where it has none (edm)
    integer_time: bool  # the timesteps are whole steps of a discrete schedule: models are told int64
    names: tuple[tuple[str, ...], ...] = field(default=())  # [R+1][M] what each slot holds after the row
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            array = np.array(getattr(self, name), np.int64 if name == "step" else np.float64)
            if name == "variance":
                array[np.isnan(array)] = np.nan  # one NaN: plans are compared by their bits
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        _validate(self)

    @property
    def evaluations(self) -> int:
        """R, the number of model evaluations."""
        return len(self.timestep)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows as named numbers."""
        return tuple(split_row(values, self.slots) for values in self.table)

    @cached_property
    def stochastic_rows(self) -> tuple[int, ...]:
        """The rows that add noise, in order; `noises` and generators are drawn from once for each."""
        return tuple(i for i, row in enumerate(self.rows) if any(row.n))

    @cached_property
    def learned_variance(self) -> bool:
        """Whether the model returns 2C channels, the second C of them v: Sigma of a row is then its own
        exp(var_lo + (var_hi - var_lo) (v + 1) / 2)."""
        return any(_learned(row) for row in self.rows)

    def level(self, index: int) -> Level:
        """The noise level of the input of evaluation `index`; index R is the result."""
        alpha, sigma = (*self.alpha.tolist(), self.end[0])[index], (*self.sigma.tolist(), self.end[1])[index]
        lam = math.log(alpha / sigma) if alpha > 0 and sigma > 0 else math.copysign(math.inf, alpha - sigma)
        return Level(alpha, sigma, lam, float(self.timestep[index]) if index < self.evaluations else 0.0)

    def _key(self) -> tuple[Any, ...]:
        scalars = (
            self.slots,
            self.steps,
            self.end,
            self.solver,
            self.prediction,
            self.editable,
            self.init_scale,
            self.train_steps,
            self.integer_time,
        )
        return (*scalars, *(getattr(self, name).tobytes() for name in _ARRAYS))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._key() == other._key()

    @cached_property
    def _hash(self) -> int:
        return hash(self._key())

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    # ---- JSON -------------------------------------------------------------------------------------------------
    def to_json(self) -> str:
        """The whole plan; numbers survive exactly, what is not finite is one of the strings "inf", "-inf" and "nan"."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in _ARRAYS:
            values[name] = _plain(values[name].tolist())
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of `to_json`; ValueError if the text is not one or its format is unknown. Nothing in it is run."""
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"text: expected the JSON of a plan, got {text[:40]!r} ({error})") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"text: expected a plan of format {FORMAT}, got format {found!r}")
        fields = set(cls.__dataclass_fields__)
        if set(values) != fields:
            raise ValueError(f"text: a plan has the fields {sorted(fields)}, got {sorted(values)}")
        try:
            for name in _ARRAYS:
                values[name] = np.array(_numbers(values[name]), np.float64)
            if (values["step"] != np.round(values["step"])).any():
                raise ValueError(f"step: expected integers, got {values['step']}")
            values["end"] = tuple(float(value) for value in values["end"])
            values["names"] = tuple(tuple(str(name) for name in row) for row in values["names"])
            for name, kind in _SCALARS.items():
                if not isinstance(values[name], kind) or (kind is not bool and isinstance(values[name], bool)):
                    raise TypeError(f"{name}: got {values[name]!r}")
            for name in ("init_scale", "residual", "replay_error"):
                values[name] = float(values[name])
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"text: a field of the plan is malformed: {error}") from None
        return cls(**values)

    # ---- printing ---------------------------------------------------------------------------------------------
    def __repr__(self) -> str:
        return (
            f"Plan({self.solver}, {self.prediction}, steps={self.steps}, evaluations={self.evaluations}, "
            f"slots={self.slots}, residual={self.residual:.0e}, replay_error={self.replay_error:.0e})"
        )

    def __str__(self) -> str:
        return "\n".join([repr(self), *self._lines()])

    def _lines(self) -> list[str]:
        """One line a row: where it lands, the clean sample, and each slot as a sum of what it reads."""
        lines = []
        for i, row in enumerate(self.rows):
            head = f"row {i:4d}"
            if i < self.evaluations:
                head += f"  step {self.step[i]:4d}  t {row.timestep:10.4f}"
                head += f"  sigma {self.sigma[i]:9.4g}  c_in {row.c_in:7.4g}"
            else:
                head += f"  result  sigma {self.end[1]:9.4g}"
            parts = []
            if any(row.d):
                clean = _sum([(row.a_x, "x"), (row.a_g, "G")])
                clipped = math.isfinite(row.clip_lo) or math.isfinite(row.clip_hi)
                parts.append(f"D = clip({clean}, {row.clip_lo:g}, {row.clip_hi:g})" if clipped else f"D = {clean}")
            z, g = ("sqrt(Sig) z", "Sig g") if _learned(row) else ("z", "g")
            if _learned(row):
                parts.append(f"log Sig = {row.var_lo:.5g} {row.var_hi - row.var_lo:+.5g} (v + 1)/2")
            for r in range(self.slots):
                terms = [(row.T[r][c], f"s{c}" if c else "x") for c in range(self.slots)]
                terms += [(row.d[r], "D"), (row.e[r], "U"), (row.n[r], z), (row.q[r], g)]
                if terms[r][0] == 1 and sum(c != 0 for c, _ in terms) == 1:
                    continue  # the slot keeps its value
                if any(c != 0 for c, _ in terms):
                    name = f"s{r}" if r else "x"
                    held = self.names[i][r] if r and i < len(self.names) else ""
                    parts.append(f"{name}{f' [{held}]' if held else ''} = {_sum(terms)}")
            lines.append(f"{head}  |  {';  '.join(parts) or 'x = x'}")
        return lines


def _learned(row: Row) -> bool:
    return row.var_lo != 0 or row.var_hi != 0


def _sum(terms: Sequence[tuple[float, str]]) -> str:
    parts = [f"{value:+.5g} {name}" if value != 1 else f"+{name}" for value, name in terms if value != 0]
    return " ".join(parts).removeprefix("+") or "0"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if math.isfinite(value) else repr(value)


def _numbers(value: Any) -> Any:
    return [_numbers(v) for v in value] if isinstance(value, list) else float(value)


def _validate(plan: Plan) -> None:
    """ValueError naming the field: a table from elsewhere must be as safe to run as one of our own."""
    R, M = plan.evaluations, plan.slots
    if plan.format != FORMAT:
        raise ValueError(f"format: expected {FORMAT}, got {plan.format}")
    if not 1 <= M <= MAX_SLOTS:
        raise ValueError(f"slots: expected 1 to {MAX_SLOTS}, got {M}")
    if R < 1:
        raise ValueError("timestep: a plan has at least one evaluation, got none")
    for name, shape in (("table", (R + 1, row_width(M))), *((name, (R,)) for name in _ARRAYS[1:-1])):
        if getattr(plan, name).shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {getattr(plan, name).shape}")
    if len(plan.end) != 2 or not np.isfinite(plan.end).all():
        raise ValueError(f"end: expected (alpha, sigma), finite, got {plan.end}")
    if plan.train_steps < 0:
        raise ValueError(f"train_steps: expected an integer >= 0, got {plan.train_steps}")
    if plan.steps < 1 or (plan.step < 0).any() or (plan.step >= plan.steps).any():
        raise ValueError(f"step: expected values in [0, steps={plan.steps}), got {plan.step}")
    for name in ("timestep", "sigma", "alpha", "init_scale", "residual", "replay_error"):
        if not np.isfinite(getattr(plan, name)).all():
            raise ValueError(f"{name}: every value must be finite, got {getattr(plan, name)}")
    if np.isinf(plan.variance).any() or (plan.variance < 0).any():
        raise ValueError(f"variance: expected values >= 0 and finite, or NaN where a row has none, got {plan.variance}")
    if plan.names and (len(plan.names) != R + 1 or any(len(row) != M for row in plan.names)):
        raise ValueError(f"names: expected {R + 1} rows of {M} names, got {plan.names}")
    if (plan.table[:R, TIMESTEP] != plan.timestep).any():
        raise ValueError(f"timestep: expected those of the table, {plan.table[:R, TIMESTEP]}, got {plan.timestep}")
    bounds = np.zeros(row_width(M), bool)
    bounds[CLIP] = True
    for i, row in enumerate(plan.table):
        if not np.isfinite(row[~bounds]).all() or not np.less(*row[CLIP]):
            raise ValueError(f"table: row {i} has a coefficient that is not finite, or an empty clip: {row}")
    first = plan.table[0]
    if first[:2].any() or first[HEAD + M * M : HEAD + M * M + 2 * M].any():
        raise ValueError("table: row 0 runs before any evaluation and cannot read a model output")
    written = {0}
    for i, row in enumerate(plan.rows):
        if _learned(row) and not (i and plan.variance[i - 1] == 1):
            raise ValueError(
                f"variance: row {i} learns its own, log Sig {row.var_lo} to {row.var_hi}; expected 1 beside it, got "
                f"{plan.variance[i - 1] if i else 'none: row 0 runs before any evaluation'}"
            )
        read = {c for r in range(M) for c in range(M) if row.T[r][c] != 0}
        if not read <= written:
            raise ValueError(f"table: row {i} reads slot {min(read - written)}, which no row before it has written")
        for r in range(M):
            if any((*row.T[r], row.d[r], row.e[r], row.n[r], row.q[r])):
                written.add(r)
