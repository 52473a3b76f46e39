"""Checks of single arguments: ValueError naming the argument, what came and what was expected."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def number(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    finite: bool = True,
    or_else: str = "",
) -> float:
    """The number as a float: at least low (more than it if `above`), at most high, and not infinite if `finite`.

    Python's and numpy's numbers and arrays of no dimension are numbers; bool, NaN, strings and larger arrays are not.
    or_else: what else the argument may be, for the message.
    """
    found = as_float(value)
    if (low < found if above else low <= found) and found <= high and not (finite and math.isinf(found)):
        return found
    if high < math.inf:
        wanted = f"a number in {'(' if above else '['}{low:g}, {high:g}]"
    else:
        wanted = f"a {'finite ' if finite else ''}number" + (
            f" {'>' if above else '>='} {low:g}" if low > -math.inf else ""
        )
    raise ValueError(f"{name}: expected {wanted}{or_else}, got {_shown(value)}")


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The integer from low to high, if there is one; 2.0 and True are no integers."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < low or (high is not None and found > high):
        wanted = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an integer {wanted}, got {_shown(value)}")
    return found


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """The string, if it is one of those allowed."""
    if not isinstance(value, str) or value not in allowed:
        *others, last = (f'"{text}"' for text in allowed)
        raise ValueError(f"{name}: expected {', '.join(others)} or {last}, got {_shown(value)}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False, Python's or numpy's; 0, 1 and None are neither."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {_shown(value)}")
    return bool(value)


def as_float(value: Any) -> float:
    """NaN for what is no number."""
    if not isinstance(value, numbers.Real):
        try:
            array = np.asarray(value)
        except (TypeError, ValueError, RuntimeError):  # ragged lists, tensors that numpy cannot read
            return math.nan
        if array.ndim > 0 or array.dtype.kind not in "iuf":
            return math.nan
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, ValueError):  # signalling NaN of decimals, integers beyond float64
        return math.nan


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", ())
    return f"{type(value).__name__} of shape {tuple(shape)}" if len(shape) else repr(value)
