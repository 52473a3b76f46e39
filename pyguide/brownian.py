"""Brownian motion over the noise levels of one run, refined where a solver asks for it.

k-diffusion's SDE solvers evaluate between grid points and draw the noise of the inner and of the whole step from one
Brownian motion W in the time s = sigma / alpha. Its increments are linear in independent normals: of neighbouring
intervals they are independent, and given W at r and t, its value at s between them is that of the Brownian bridge
(Karatzas, Shreve 1991, section 5.6.B):

    W(s) - W(r) = (s - r)/(t - r) (W(t) - W(r)) + sqrt((s - r)(t - s)/(t - r)) z
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

SAME = 1e-12  # relative distance of two times that are one: a gap of rounding size would draw a normal of its own


class Piece(NamedTuple):
    """(W(low) - W(high)) / sqrt(high - low): a unit increment in the direction of a run, from more to less noise."""

    low: float
    high: float
    unit: Any


class Brownian:
    """Unit-variance increments of one Brownian motion; draws a normal only for what earlier calls leave open.

    noise(step): a fresh standard normal. step(time): the solver step that the time lies in; it is what noise is told,
    and a piece that ends before the previous step is forgotten, so that a long run does not keep all of its noises.
    An object belongs to one run: `NoisePath.drawing` makes a new one for each, and threads share none.
    """

    def __init__(self, noise: Callable[[int], Any], step: Callable[[float], int]) -> None:
        self._noise, self._step = noise, step
        self._pieces: list[Piece] = []  # disjoint, from more to less noise
        self._forgotten = math.inf  # pieces above this time were known once

    def __call__(self, t0: float, t1: float) -> Any:
        """(W(t1) - W(t0)) / sqrt(|t1 - t0|), for t0 and t1 in either order; the sign turns with the order.

        t0, t1: noise levels sigma / alpha in [0, inf]; an increment to pure noise, at infinity, has no part that comes
        from finite times. Raises ValueError if they are equal, negative or NaN, or above what is still known.
        """
        times = self._known(float(t0)), self._known(float(t1))
        low, high = min(times), max(times)
        if not (0 <= low < high <= math.inf):
            raise ValueError(f"brownian: expected two different noise levels sigma / alpha >= 0, got {t0} and {t1}")
        if self._forgotten < high:
            raise ValueError(
                f"brownian: a run goes from more to less noise; the motion above {self._forgotten:g} is forgotten, "
                f"got {t0} and {t1}"
            )
        step = self._step(high * (1 - 1e-9))  # just inside the interval: a step begins at its noisy end
        self._forget(step)
        self._split(low, step)
        self._split(high, step)
        parts = [piece.unit * weight for piece, weight in self._fill(low, high, step)]
        unit = parts[0]
        for part in parts[1:]:
            unit = unit + part
        return unit if times[0] > times[1] else -unit

    def _known(self, time: float) -> float:
        """The time as an earlier call gave it, if they differ by rounding."""
        for piece in self._pieces:
            for edge in (piece.low, piece.high):
                if math.isclose(edge, time, rel_tol=SAME):
                    return edge
        return time

    def _forget(self, step: int) -> None:
        """Drop what ends before the step before this one."""
        while self._pieces and self._step(self._pieces[0].low * (1 + 1e-9)) < step - 1:
            self._forgotten = self._pieces.pop(0).low

    def _split(self, time: float, step: int) -> None:
        """Cut the piece that holds `time` in two: a rotation of its unit increment and a fresh normal.

        The normal acts on W(time) with a positive sign. A piece that begins at infinity is left as it is: nothing that
        lies at finite times has a part in it.
        """
        for k, (low, high, unit) in enumerate(self._pieces):
            if low < time < high:
                parts = [Piece(time, high, unit)]
                if high < math.inf:
                    above, below = math.sqrt((high - time) / (high - low)), math.sqrt((time - low) / (high - low))
                    z = self._noise(step)
                    parts = [
                        Piece(time, high, unit * above + z * below),
                        Piece(low, time, unit * below - z * above),
                    ]
                self._pieces[k : k + 1] = parts
                return

    def _fill(self, low: float, high: float, step: int) -> list[tuple[Piece, float]]:
        """(piece, square root of its share of the time) that make up (low, high), those drawn now included."""
        inside = [piece for piece in self._pieces if low <= piece.low and piece.high <= high]
        edges = [high, *(edge for piece in inside for edge in (piece.high, piece.low)), low]
        for top, bottom in zip(edges[::2], edges[1::2], strict=True):
            if top > bottom and not (high == math.inf > top):  # of an infinite time, a finite one has no share
                inside.append(Piece(bottom, top, self._noise(step) * 1.0))  # a copy: the caller may reuse its array
                self._pieces.append(inside[-1])
        self._pieces.sort(key=lambda piece: -piece.low)
        inside.sort(key=lambda piece: -piece.low)
        if high == math.inf:
            return [(inside[0], 1.0)]
        return [(piece, math.sqrt((piece.high - piece.low) / (high - low))) for piece in inside]
