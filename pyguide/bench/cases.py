"""The samplers that are measured: pyguide's plan, and the stock diffusers scheduler that computes the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from .. import schedules
from ..compiler import compile
from ..path import NoisePath
from ..plan import Plan
from .extras import require

SCALE = 5.0  # of the classifier-free guidance in every measurement of the step
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Case:
    """One sampler. grid: how its timesteps are spread ("whole": the rounded linspace of multistep solvers)."""

    name: str
    solver: str
    grid: Literal["leading", "whole", "flow"]
    stock: str  # the class in diffusers
    stock_options: Mapping[str, Any] = field(default_factory=dict)
    stochastic: bool = False

    @property
    def prediction(self) -> str:
        return "flow" if self.grid == "flow" else "epsilon"

    def path(self, steps: int) -> NoisePath:
        """The grid that the stock scheduler uses, in float64."""
        if self.grid == "flow":
            return schedules.flow().path(steps, spacing="linspace")
        if self.grid == "leading":
            return schedules.scaled_linear().path(steps, spacing="leading")
        return schedules.scaled_linear().path(timesteps=np.linspace(0, 999, steps + 1).round()[:0:-1].tolist())

    def plan(self, steps: int) -> Plan:
        return _plan(self.name, steps)

    def scheduler(self, steps: int) -> Any:
        """The stock scheduler with its timesteps set; ImportError without diffusers."""
        kind = getattr(require("diffusers"), self.stock)
        scheduler = kind(**self.stock_options)
        scheduler.set_timesteps(steps)
        return scheduler


@cache
def _plan(name: str, steps: int) -> Plan:
    case = CASES[name]
    return compile(case.solver, case.path(steps), prediction=case.prediction)


_LEADING = {**BETAS, "timestep_spacing": "leading"}
_WHOLE = {**BETAS, "timestep_spacing": "linspace"}
CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case("ddim", "ddim", "leading", "DDIMScheduler", {**_LEADING, "clip_sample": False}),
        Case("flow_euler", "euler", "flow", "FlowMatchEulerDiscreteScheduler"),
        Case("dpmpp_2m", "dpmpp_2m", "whole", "DPMSolverMultistepScheduler", _WHOLE),
        Case("unipc", "unipc", "whole", "UniPCMultistepScheduler", _WHOLE),
        Case("euler", "euler", "leading", "EulerDiscreteScheduler", _LEADING),
        Case("heun", "heun", "leading", "HeunDiscreteScheduler", _LEADING),
        Case("euler_ancestral", "euler_ancestral", "leading", "EulerAncestralDiscreteScheduler", _LEADING, True),
    )
}
DEFAULT = ("ddim", "flow_euler", "dpmpp_2m", "unipc")
