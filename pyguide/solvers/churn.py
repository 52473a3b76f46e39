"""Churn: noise added before a step, which then starts at a noisier level (Karras et al. 2022, algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..checks import number
from ..path import Level, NoisePath
from ..schedules import Flow


@dataclass(frozen=True)
class Churn:
    """In y = x/alpha and s = sigma/alpha:  s^ = s (1 + gamma),  y^ = y + sqrt(s^^2 - s^2) s_noise z,

    with gamma = min(s_churn / N, sqrt(2) - 1) where s_tmin <= s <= s_tmax, else 0. Not on flow paths, where adding
    noise also scales the data: ValueError, as for numbers below 0. Source: Karras et al. 2022, algorithm 2, lines 4-6.
    """

    path: NoisePath
    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_tmax"):
            object.__setattr__(self, name, number(name, getattr(self, name), finite=False))
        object.__setattr__(self, "s_noise", number("s_noise", self.s_noise))
        if self.s_tmin > self.s_tmax:
            raise ValueError(f"s_tmin: expected a number <= s_tmax = {self.s_tmax:g}, got {self.s_tmin:g}")
        if self.s_churn > 0 and isinstance(self.path.schedule, Flow):
            raise ValueError(
                "s_churn: churn is defined where noise can be added without scaling the data, not on flow paths"
            )

    def _gamma(self, here: Level) -> float:
        s = here.sigma / here.alpha if here.alpha > 0 else math.inf
        return min(self.s_churn / self.path.steps, math.sqrt(2) - 1) if self.s_tmin <= s <= self.s_tmax else 0.0

    def level(self, i: int) -> Level:
        """The level that step i starts from."""
        here = self.path.level(i)
        gamma = self._gamma(here)
        return replace(self.path.at(here.lam - math.log1p(gamma)), step=i) if gamma > 0 else here

    def add(self, x: Any, i: int, noise: Callable[[int], Any]) -> Any:
        """The state that step i starts from."""
        here, hat = self.path.level(i), self.level(i)
        gamma = self._gamma(here)
        if gamma == 0:
            return x
        # alpha^ / alpha and alpha^ s, which have limits at alpha = 0
        x = x * (hat.sigma / here.sigma / (1 + gamma))
        scale = hat.sigma / (1 + gamma) * math.sqrt(gamma * (2 + gamma)) * self.s_noise
        return x + noise(i) * scale if scale != 0 else x
