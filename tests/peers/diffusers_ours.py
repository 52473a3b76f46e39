"""pyguide on a peer's grid: what test_peers_diffusers*.py compare. diffusers is not needed.

`Run` is what a run of a scheduler leaves to compare with, live or stored; `Ours` is pyguide on its grid.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import pyguide
from pyguide import schedules, solvers
from pyguide.schedules import VariancePreserving

from .common import SEED, SHAPE, Network, draw
from .diffusers_cases import EDM, TABLE, Case

DRAWS = 100
Array = NDArray[np.float64]
F32, F64 = torch.float32, torch.float64
TIMES, UNIT = Network(time_scale=1 / 150), Network(time_scale=1.0)


class TellsAsThePeer(VariancePreserving):
    """A schedule that tells its model, at the peer's levels between grid points, the peer's own timesteps.

    Both interpolate in a table of log sigma, the peer in its float32 one, which leaves the fourth decimal open.
    """

    def __init__(self, alphas_cumprod: Any, inner: Array) -> None:
        super().__init__(alphas_cumprod)
        self.inner = [(-math.log(sigma), timestep) for sigma, timestep in inner.tolist()]

    def timestep_at(self, lam: float) -> float:
        own = super().timestep_at(lam)
        for level, timestep in self.inner:
            if abs(level - lam) < 1e-9:
                assert abs(timestep - own) < 2e-3
                return timestep
        return own


@dataclass
class Run:
    """A peer's run. x: the state at its end. The rest is the grid that the scheduler used, in float64.

    told [N]: timesteps of its points. sigmas [N+1]: its sigmas there, the end included; of TABLE's schedulers [1], the
    end alone. inner [n, 2]: sigma / alpha and timestep of evaluations between points. scale: the state at the start is
    standard normal times this. table: alphas_cumprod, for schedulers that have it.
    """

    x: torch.Tensor
    told: Array
    sigmas: Array
    inner: Array
    scale: float
    table: Array | None


class Ours:
    """pyguide in a case: the peer's grid as our path, from the same numbers."""

    def __init__(self, case: Case, run: Run) -> None:
        self.case, self.run = case, run

    @property
    def normals(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Initial noise, image-to-image's image, and what the steps add, one after another."""
        return draw(1), draw(2), normals()

    @cached_property
    def path(self) -> pyguide.NoisePath:
        """The grid of the scheduler, from its own timesteps and sigmas."""
        case, config, told, sigmas = self.case, self.case.config, self.run.told, self.run.sigmas
        if case.scheduler in EDM:
            low, high, data = (0.3, 500.0, 1.0) if case.scheduler.startswith("Cosine") else (0.002, 80.0, 0.5)
            span = config.get("sigma_min", low), config.get("sigma_max", high), config.get("sigma_data", data)
            schedule: schedules.Schedule = schedules.edm(*span)
        elif case.flows:
            schedule = schedules.flow()
        elif case.scheduler == "IPNDM":
            schedule = schedules.scaled_linear()  # says nothing here: levels and timesteps are given
        else:
            schedule = TellsAsThePeer(self.run.table, self.run.inner)
        if case.scheduler in TABLE:
            path = schedule.path(timesteps=told, final_sigma="zero" if sigmas[-1] == 0 else "min")
            assert abs(path.sigma[-1] - sigmas[-1] * path.alpha[-1]) < 1e-12
            return path
        path, s = schedule.path(sigmas=sigmas[:-1], timesteps=told), float(sigmas[-1])
        if s == 0:
            return path
        alpha = 1 - s if case.flows else 1.0 if case.scheduler in EDM else 1 / math.hypot(1, s)
        end = {"alpha": alpha, "sigma": s if case.flows else s * alpha}
        return replace(path, **{key: np.append(getattr(path, key)[:-1], value) for key, value in end.items()})

    def network(self, x: Any, t: Any) -> Any:
        net = UNIT if self.case.scheduler in (*EDM, "IPNDM") else TIMES
        return -net(x, t) if self.case.negated else net(x, t)

    @property
    def options(self) -> dict[str, Any]:
        """Ours; the peer takes indices of steps that its grid does not have, we do not."""
        options = dict(self.case.options)
        if "disable_corrector" in options:
            options["disable_corrector"] = [k for k in options["disable_corrector"] if k < self.path.steps]
        return options

    def compiled(self, path: pyguide.NoisePath) -> pyguide.Plan:
        case = self.case
        return pyguide.compile(case.solver, path, prediction=case.prediction, clip=case.clip, **self.options)

    @cached_property
    def plan(self) -> pyguide.Plan:
        return self.compiled(self.path)

    def start(self, dtype: Any, path: pyguide.NoisePath | None = None) -> Any:
        noise, image = (normal.to(dtype) for normal in self.normals[:2])
        return (path or self.path).noise_at(image, noise) if self.case.strength < 1 else noise * self.run.scale

    def noises(self, plan: pyguide.Plan, dtype: Any) -> Any:
        """What the peer drew for the noisy rows: it draws in every step, also where its noise has no weight."""
        steps = [int(plan.step[row - 1]) for row in plan.stochastic_rows]
        taken = range(len(steps)) if self.case.draws > 1 else steps
        return [self.normals[2][k].to(dtype) for k in taken] or None

    def sample(self, plan: pyguide.Plan, dtype: Any, path: pyguide.NoisePath | None = None, **settings: Any) -> Any:
        sampler = pyguide.Sampler(self.network, plan, **settings)
        return sampler(self.start(dtype, path), noises=self.noises(plan, dtype))

    def solve(self, network: Any = None, path: pyguide.NoisePath | None = None) -> Any:
        """The solver run with float64 tensors."""
        case, drawn, every = self.case, itertools.count(), self.normals[2].double()
        return solvers.sample(
            case.solver,
            network or self.network,
            self.start(F64, path),
            path or self.path,
            prediction=case.prediction,
            clip=case.clip,
            noise=lambda step: every[next(drawn) if case.draws > 1 else step],
            **self.options,
        )


@cache
def normals() -> torch.Tensor:
    """What a generator of the peer's seed draws, one after another."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([torch.randn(SHAPE, generator=generator) for _ in range(DRAWS)])
