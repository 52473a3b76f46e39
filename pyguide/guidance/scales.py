"""Scales that change from step to step: functions of (step, steps), step = 0 .. steps - 1, for any method's `scale`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import number


@dataclass(frozen=True)
class Linear:
    """From `start` at the first step to `end` at the last one, in equal parts."""

    start: float
    end: float

    def __call__(self, step: int, steps: int) -> float:
        return self.start + (self.end - self.start) * _part(step, steps)


@dataclass(frozen=True)
class Cosine:
    """end + (start - end) (1 + cos(pi u)) / 2, u from 0 at the first step to 1 at the last one: slow at both ends."""

    start: float
    end: float

    def __call__(self, step: int, steps: int) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * _part(step, steps))) / 2


@dataclass(frozen=True)
class PowerCosine:
    """1 + scale (1 - cos(pi u^power)) / 2, u = step / steps: from no guidance at the first step to almost 1 + scale.

    The dynamic guidance of video pipelines (CogVideoX, power 5). The one in diffusers has a timestep of 0 .. 999 where
    its formula counts steps, and so jumps about; this is the formula.
    """

    scale: float
    power: float = 5.0

    def __post_init__(self) -> None:
        number("power", self.power)

    def __call__(self, step: int, steps: int) -> float:
        return 1 + self.scale * (1 - math.cos(math.pi * (step / steps) ** self.power)) / 2


@dataclass(frozen=True)
class Table:
    """One scale for each step. A list given as `scale` itself is one for each sample."""

    values: Sequence[float]

    def __call__(self, step: int, steps: int) -> float:
        if len(self.values) != steps:
            raise ValueError(f"scale: expected a table of {steps} values, one for each step, got {len(self.values)}")
        return float(self.values[step])


def _part(step: int, steps: int) -> float:
    return step / (steps - 1) if steps > 1 else 0.0
