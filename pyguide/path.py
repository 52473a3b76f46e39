"""The grid of one sampling run: noise levels from the noisiest to the cleanest, and what the model is told there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .brownian import Brownian

if TYPE_CHECKING:
    from .schedules import Schedule

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """One noise level: x = alpha x0 + sigma noise, lam = log(alpha / sigma), and the timestep the model is told.

    step: the solver step that starts here, the index of a grid point; None for a level inside a step.
    """

    alpha: float
    sigma: float
    lam: float
    timestep: float
    step: int | None = field(default=None, compare=False)


def log_ratio(alpha: Floats, sigma: Floats) -> Floats:
    """lam = log(alpha / sigma), -inf and +inf at the two ends."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(alpha) - np.log(sigma), np.float64)


@dataclass(frozen=True, eq=False)
class NoisePath:
    """A grid of N steps: N + 1 levels, the last one is where the sampler ends.

    alpha, sigma, lam: [N+1] float64. timestep: [N] what the model is told at each grid point.
    init_scale: standard deviation of the state at the first grid point, as pure noise: 1 on variance-preserving and
    flow paths, the largest sigma on edm paths.
    made: the arguments of `Schedule.path` that made it.
    """

    alpha: Floats
    sigma: Floats
    timestep: Floats
    schedule: Schedule
    init_scale: float = 1.0
    made: Mapping[str, Any] | None = None
    lam: Floats = field(init=False)
    _increments: Brownian | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma", "timestep"):
            array = np.array(getattr(self, name), np.float64)
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: every value must be finite, got {array}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        lam = log_ratio(self.alpha, self.sigma)
        lam.setflags(write=False)
        object.__setattr__(self, "lam", lam)
        if len(self.timestep) < 1 or self.alpha.shape != self.sigma.shape or len(self.alpha) != len(self.timestep) + 1:
            raise ValueError(
                f"a path of N >= 1 steps has N + 1 levels, got {len(self.timestep)} timesteps, {len(self.alpha)} levels"
            )
        if not (lam[1:] > lam[:-1]).all():
            i = int(np.argmin(lam[1:] > lam[:-1]))
            ratio = np.exp(-lam[i : i + 2])
            raise ValueError(
                f"the grid must go strictly from more to less noise, got sigma/alpha {ratio[0]:g} then {ratio[1]:g} "
                f"at step {i}"
            )

    @property
    def steps(self) -> int:
        """N, the number of solver steps."""
        return len(self.timestep)

    def level(self, index: int) -> Level:
        """The level at a grid index, 0 .. N (the end point has no model call: its timestep is the schedule's there)."""
        if not 0 <= index <= self.steps:
            raise IndexError(f"level: grid index must be in [0, {self.steps}], got {index}")
        lam = float(self.lam[index])
        timestep = self.timestep[index] if index < self.steps else self.schedule.timestep_at(lam)
        return Level(float(self.alpha[index]), float(self.sigma[index]), lam, float(timestep), index)

    def at(self, lam: float) -> Level:
        """The level at any lam, between grid points too; the timestep is interpolated in log sigma as peers do."""
        lam = float(lam)
        if math.isnan(lam):
            raise ValueError("at: lam must be a number, got nan")
        try:
            alpha, sigma = self.schedule.alpha_sigma(lam)
        except OverflowError:
            sigma = math.inf
        if sigma == math.inf:
            raise ValueError(f"at: this schedule has no level of finite sigma at lam={lam}")
        return Level(alpha, sigma, lam, self.schedule.timestep_at(lam))

    def at_timestep(self, timestep: float) -> Level:
        """The level at which the model is told `timestep`, whole or fractional; ValueError on edm paths."""
        alpha, sigma = self.schedule.levels_of_timesteps(np.array([timestep], np.float64))
        return Level(float(alpha[0]), float(sigma[0]), float(log_ratio(alpha, sigma)[0]), float(timestep))

    def remade(self, **changes: Any) -> NoisePath:
        """The path that `Schedule.path` makes with some of its arguments changed."""
        if self.made is None:
            raise ValueError(f"path: it was built from arrays, so that {', '.join(changes)} cannot be changed")
        return self.schedule.path(**{**self.made, **changes})

    def drawing(self, noise: Callable[[int], Any]) -> NoisePath:
        """This path for one run, whose `brownian` draws through noise(step)."""
        ratio = np.exp(-self.lam)

        def step(s: float) -> int:
            return int(np.clip(np.searchsorted(-ratio, -s, side="right") - 1, 0, self.steps - 1))

        run = replace(self)
        object.__setattr__(run, "_increments", Brownian(noise, step))
        return run

    def brownian(self, t0: float, t1: float) -> Any:
        """Inside a solver: (W(t1) - W(t0)) / sqrt(|t1 - t0|) of the run's Brownian motion W, a unit normal.

        t0, t1: noise levels s = sigma / alpha, as k-diffusion's noise samplers take them. Increments of overlapping
        intervals are correlated, of disjoint ones independent; new normals come from the solver's noise(i).
        """
        if self._increments is None:
            raise ValueError("brownian: this path belongs to no run; a solver is given one that does")
        return self._increments(t0, t1)

    def noise_at(self, x0: Any, noise: Any) -> Any:
        """alpha[0] x0 + sigma[0] noise: the state that image-to-image starts from. x0, noise: [B, C, *] arrays."""
        if getattr(x0, "shape", None) != getattr(noise, "shape", None):
            raise ValueError(
                f"noise: shape {getattr(noise, 'shape', None)} must equal x0's {getattr(x0, 'shape', None)}"
            )
        return x0 * float(self.alpha[0]) + noise * float(self.sigma[0])
