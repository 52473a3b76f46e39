"""Checks of the arrays and counts that schedules and grids are given: ValueError naming the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..checks import as_float, whole
from ..path import Floats


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


def _finite(name: str, value: object, positive: bool = False) -> float:
    """A finite number, positive where asked; strings and booleans are none."""
    number = as_float(value)
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
    return whole("steps", steps, 1)
