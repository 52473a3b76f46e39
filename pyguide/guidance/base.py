"""What every guidance method shares: a scale, the steps in which it acts, and the weights of each evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ..path import Floats
from ..plan import Plan

Scale = Any  # a number, an array [B], or a function (step, steps) -> number


class Scheduled(ABC):
    """A scale, and the steps in which it acts: what classifier-free and classifier guidance share.

    scale: a number, one per sample [B], or a function of (step, steps).
    interval: (a, b), the method acts in the steps with a <= step / steps < b.
    sigma_interval: (low, high), the same in noise levels: low < sigma <= high for the `plan.sigma` that the step starts
        at. Published intervals (Kynkaanniemi et al. 2024) are in sigma / alpha: s is s / sqrt(1 + s^2) on a
        variance-preserving path. All evaluations of a step are treated alike.
    """

    neutral: float  # the scale outside the intervals, at which the method does nothing

    def __init__(
        self,
        scale: Scale,
        *,
        interval: tuple[float, float] | None = None,
        sigma_interval: tuple[float, float] | None = None,
    ) -> None:
        for name, pair in (("interval", interval), ("sigma_interval", sigma_interval)):
            if pair is not None and not (np.shape(pair) == (2,) and pair[0] <= pair[1]):
                raise ValueError(f"{name}: expected (low, high) with low <= high, got {pair!r}")
        if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"interval: expected fractions of the steps in [0, 1], got {interval!r}")
        self.scale: Floats | Callable[[int, int], float] = scale if callable(scale) else _finite(scale)
        self.interval, self.sigma_interval = interval, sigma_interval

    def scales(self, plan: Plan, batch: int) -> Floats:
        """The scale of every evaluation and sample, [R, B] float64; `neutral` outside the intervals."""
        steps = plan.steps
        if callable(self.scale):
            values = {step: _finite(self.scale(step, steps)) for step in dict.fromkeys(plan.step.tolist())}
            if any(value.ndim for value in values.values()):
                raise ValueError("scale: a function of (step, steps) must return a number")
            column = np.array([float(values[step]) for step in plan.step.tolist()])
            table = np.broadcast_to(column[:, None], (plan.evaluations, batch))
        else:
            if self.scale.ndim and self.scale.shape != (batch,):
                raise ValueError(f"scale: expected a number or one per sample ({batch}), got shape {self.scale.shape}")
            table = np.broadcast_to(self.scale, (plan.evaluations, batch))
        acting = np.ones(plan.evaluations, bool)
        if self.interval is not None:
            part = plan.step / steps
            acting &= (part >= self.interval[0]) & (part < self.interval[1])
        if self.sigma_interval is not None:
            start = plan.sigma[np.searchsorted(plan.step, plan.step)]  # of the first evaluation of the step
            acting &= (start > self.sigma_interval[0]) & (start <= self.sigma_interval[1])
        return np.where(acting[:, None], table, self.neutral)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale})"


class Guidance(Scheduled):
    """Base class of the methods that combine the outputs of branches.

    scale: 1 is purely conditional, 0 purely unconditional, more is stronger; the papers' w is scale - 1. Outside
        `interval` and `sigma_interval` (see `Scheduled`) the method is purely conditional: the other branches are not
        run.
    space: where the branches are combined. For weights that sum to 1 the spaces are equal, each prediction being an
        affine map of the others at the same x.
    """

    neutral = 1.0
    branches: tuple[str, ...] = ("uncond", "cond")
    batched: bool = True

    def __init__(
        self,
        scale: Scale,
        *,
        interval: tuple[float, float] | None = None,
        sigma_interval: tuple[float, float] | None = None,
        space: Literal["model", "denoised", "v"] = "model",
    ) -> None:
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval)
        if space not in ("model", "denoised", "v"):
            raise ValueError(f'space: expected "model", "denoised" or "v", got {space!r}')
        self.space = space

    @abstractmethod
    def weights(self, scale: Floats) -> Floats:
        """Weights [..., K] of the branches at scales [...]; a weight of exactly 0 drops the branch."""


def _finite(scale: Any) -> Floats:
    if isinstance(scale, str):
        raise TypeError(f"scale: expected a number, one per sample, or a function (step, steps), got {scale!r}")
    values = np.array(scale.tolist() if hasattr(scale, "tolist") else scale, np.float64)
    if values.ndim > 1 or not np.isfinite(values).all():
        raise ValueError(f"scale: expected a finite number, one per sample, or a function, got {scale!r}")
    return values
