"""Checks of what schedules and grids are given: each raises ValueError with the argument, what came and the rule."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence

import numpy as np

from ..path import Floats


def _is_positive(value: object) -> bool:
    """A finite number above 0, of any numeric type but bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return 0 < float(value) < math.inf


def _numbers(name: str, values: Sequence[float] | Floats) -> Floats:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a sequence of numbers, got {values!r}") from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: expected a sequence of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: every value must be finite, got {array}")
    return array


def _descending(name: str, values: Floats) -> None:
    if not (values >= 0).all():
        raise ValueError(f"{name}: expected values >= 0, got {values.min():g}")
    if not (values[1:] < values[:-1]).all():
        i = int(np.argmin(values[1:] < values[:-1]))
        raise ValueError(
            f"{name}: expected strictly descending values, got {values[i]:g} then {values[i + 1]:g} at step {i}"
        )


def _integer(name: str, value: object, low: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = low - 1
    if number < low or isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    return number


def _finite(name: str, value: object, positive: bool = False) -> float:
    """A finite number, positive where asked; strings and booleans are none."""
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name}: expected a {'positive' if positive else 'finite'} number, got {value!r}")
    return number


def _in_range(name: str, values: Floats, high: float) -> None:
    if not ((values >= 0) & (values <= high)).all():
        raise ValueError(f"{name}: expected values in [0, {high:g}], got {values.max():g} to {values.min():g}")


def _count(steps: int | None, timesteps: Floats | None, sigmas: Floats | None) -> int:
    for name, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        if given is None:
            continue
        if steps is not None and steps != len(given):
            raise ValueError(f"{name}: {len(given)} values were given for steps={steps}")
        steps = len(given)
    if timesteps is not None and sigmas is not None and len(timesteps) != len(sigmas):
        raise ValueError(f"timesteps: {len(timesteps)} values were given beside {len(sigmas)} sigmas")
    return _integer("steps", steps, 1)
