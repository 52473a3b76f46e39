"""Brownian motion over the noise levels of one run, refined where a solver asks for it.

k-diffusion's SDE solvers evaluate between grid points and draw the noise of the inner and of the whole step from one
Brownian motion W in the time s = sigma / alpha. Its increments are linear in independent normals: of neighbouring
intervals they are independent, and given W over (s, t), its value at r between them is a Brownian bridge:

    W_r - W_s = (r - s)/(t - s) (W_t - W_s) + sqrt((r - s)(t - r)/(t - s)) z
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """The increment of W over (low, high), divided by its standard deviation sqrt(high - low)."""

    low: float
    high: float
    unit: Any


class Brownian:
    """Unit-variance increments of one Brownian motion; draws a normal only for what earlier calls leave open."""

    def __init__(self, noise: Callable[[int], Any], step: Callable[[float], int]) -> None:
        self._noise, self._step = noise, step
        self._pieces: list[Piece] = []  # disjoint, in ascending order

    def __call__(self, t0: float, t1: float) -> Any:
        """(W(t1) - W(t0)) / sqrt(|t1 - t0|), for t0 and t1 in either order; the sign turns with the order."""
        t0, t1 = float(t0), float(t1)
        low, high = min(t0, t1), max(t0, t1)
        if not 0 <= low < high:
            raise ValueError(f"brownian: expected two different noise levels sigma / alpha >= 0, got {t0} and {t1}")
        self._split(low)
        self._split(high)
        inside = self._fill(low, high)
        if len(inside) == 1:
            unit = inside[0].unit * 1.0
        else:
            unit = sum(piece.unit * math.sqrt(_share(piece, low, high)) for piece in inside)
        return unit if t0 > t1 else -unit

    def _split(self, time: float) -> None:
        """Cut the piece that holds `time` in two: a rotation of its unit increment and a fresh normal."""
        for k, (low, high, unit) in enumerate(self._pieces):
            if low < time < high:
                below = math.sqrt(_share(Piece(low, time, None), low, high))
                above = math.sqrt(_share(Piece(time, high, None), low, high))
                z = self._noise(self._step(high))
                self._pieces[k : k + 1] = [
                    Piece(low, time, unit * below + z * above),
                    Piece(time, high, unit * above - z * below),
                ]
                return

    def _fill(self, low: float, high: float) -> list[Piece]:
        """The pieces that make up (low, high), those drawn now included, from the noisy end to the clean one."""
        inside = [piece for piece in self._pieces if low <= piece.low and piece.high <= high]
        edges = [high, *(edge for piece in reversed(inside) for edge in (piece.high, piece.low)), low]
        for top, bottom in zip(edges[::2], edges[1::2], strict=True):
            if top > bottom:
                inside.append(Piece(bottom, top, self._noise(self._step(top))))
                self._pieces.append(inside[-1])
        self._pieces.sort(key=lambda piece: piece.low)
        return sorted(inside, key=lambda piece: -piece.low)


def _share(piece: Piece, low: float, high: float) -> float:
    """The part that a piece has of the time from low to high; all of it, if it reaches pure noise at infinity."""
    if high == math.inf:
        return 1.0 if piece.high == math.inf else 0.0
    return (piece.high - piece.low) / (high - low)
