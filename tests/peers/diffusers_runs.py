"""Runs of diffusers' schedulers, unmodified, and of pyguide on the same grid: what test_peers_diffusers.py compares.

A scheduler is driven as a pipeline drives it: latents times init_noise_sigma, scale_model_input, the network, step;
image-to-image by add_noise, a slice of the timesteps and set_begin_index. In float32 nothing is touched, and noise
comes from torch.Generators with the same seed on both sides.

In float64 the scheduler's code is unmodified too, and it is given

    its own tables alphas_cumprod and sigmas, widened: the same numbers, no longer rounding what is computed from them;
    latents as `Wide`, a tensor that stays float64 where a scheduler writes sample.to(torch.float32);
    the float32 run's noises, in place of randn_tensor (a float64 generator draws other ones).

"The peer's own distance from float64" is that between these two runs: of the peer's arithmetic, on the peer's numbers.
pyguide has no part in it, and its float64 results are compared with the second run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

import pyguide
from pyguide import schedules

from .common import Network

SHAPE = (2, 3, 4, 4)
SEED = 7
RATIO = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")  # their x is the state over alpha
FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
TIMES = Network(time_scale=1 / 150)
UNIT = Network(time_scale=1.0)


class Wide(torch.Tensor):
    """A float64 tensor that a cast to float32 leaves as it is."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = kwargs.get("dtype", args[0] if args else None)
        return self if wanted is torch.float32 else super().to(*args, **kwargs)


SOLVERS = {
    "DDIM": "ddim",
    "EulerDiscrete": "euler",
    "EulerAncestralDiscrete": "euler_ancestral",
    "HeunDiscrete": "heun",
    "DPMSolverMultistep": "dpmpp_2m",
    "UniPCMultistep": "unipc",
    "FlowMatchEulerDiscrete": "euler",
    "FlowMatchHeunDiscrete": "heun",
    "EDMEuler": "euler",
}
PREDICTIONS = {"v_prediction": "v", "flow_prediction": "flow", "sample": "sample", "epsilon": "epsilon"}


@dataclass(frozen=True)
class Case:
    """One configuration of a scheduler and what it is in pyguide.

    scheduler, config, steps: the scheduler's name without "Scheduler", its arguments, set_timesteps' first. options: of
    our solver. own: (schedule, arguments of its path), where our names name the same grid. step: further arguments of
    the scheduler's step. given: sigmas that its user passes. strength: image-to-image. solver: ours, if not the usual.
    """

    scheduler: str
    config: dict[str, Any]
    steps: int
    options: dict[str, Any] = field(default_factory=dict)
    own: tuple[schedules.Schedule, dict[str, Any]] | None = None
    step: dict[str, Any] = field(default_factory=dict)
    given: list[float] | None = None
    strength: float = 1.0
    solver: str = ""

    @property
    def network(self) -> Network:
        return UNIT if self.scheduler == "EDMEuler" else TIMES

    @property
    def clip(self) -> float | None:
        clips = self.config.get("clip_sample", self.scheduler == "DDIM")
        return self.config.get("clip_sample_range", 1.0) if clips else None

    @property
    def prediction(self) -> str:
        if self.scheduler == "EDMEuler":
            return "edm"
        return "flow" if self.scheduler in FLOW else PREDICTIONS[self.config.get("prediction_type", "epsilon")]

    def make(self) -> Any:
        """The scheduler, with its timesteps set."""
        scheduler = getattr(diffusers, f"{self.scheduler}Scheduler")(**self.config)
        scheduler.set_timesteps(
            **({"num_inference_steps": self.steps} if self.given is None else {"sigmas": self.given})
        )
        return scheduler

    def own_path(self) -> pyguide.NoisePath:
        assert self.own is not None
        schedule, arguments = self.own
        return schedule.path(self.steps, strength=self.strength, **arguments)

    def plan(self, path: pyguide.NoisePath) -> pyguide.Plan:
        solver = self.solver or SOLVERS[self.scheduler]
        return pyguide.compile(solver, path, prediction=self.prediction, clip=self.clip, **self.options)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def widen(scheduler: Any) -> None:
    for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
        if isinstance(getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())


def run_peer(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """The scheduler's result as a state (times alpha at the end, where its x is over alpha)."""
    scheduler, wide = case.make(), dtype == torch.float64
    if wide:
        widen(scheduler)
    generator = torch.Generator().manual_seed(SEED)
    arguments = dict(case.step)
    if "generator" in scheduler.step.__annotations__:
        arguments["generator"] = generator

    def replay(shape: Any, generator: Any, device: Any, dtype: Any) -> torch.Tensor:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    tensor = (lambda x: x.to(dtype).as_subclass(Wide)) if wide else (lambda x: x)
    begin = (case.steps - int(case.steps * case.strength)) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if case.strength < 1:
        add = scheduler.scale_noise if case.scheduler in FLOW else scheduler.add_noise
        arguments_of_add = (
            (timesteps[:1], tensor(draw(1))) if case.scheduler in FLOW else (tensor(draw(1)), timesteps[:1])
        )
        x = add(tensor(draw(2)), *arguments_of_add)
    else:
        x = tensor(draw(1)) * getattr(scheduler, "init_noise_sigma", 1.0)
    module = sys.modules[type(scheduler).__module__]
    patched = (
        mock.patch.object(module, "randn_tensor", replay)
        if wide and hasattr(module, "randn_tensor")
        else mock.MagicMock()
    )
    with torch.no_grad(), patched:
        for t in timesteps:
            inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(case.network(inputs, t), t, x, return_dict=False, **arguments)[0]
    assert x.dtype == dtype
    x = x.as_subclass(torch.Tensor)
    return x * end_alpha(case, scheduler)


def end_alpha(case: Case, scheduler: Any) -> float:
    return float((1 + scheduler.sigmas[-1].double() ** 2) ** -0.5) if case.scheduler in RATIO else 1.0


def peer_grid(case: Case) -> pyguide.NoisePath:
    """The grid of the scheduler as our path, from its own timesteps and sigmas."""
    s = case.make()
    told, strength = s.timesteps.double(), case.strength
    if s.order == 2:  # Heun's schedulers list their inner points twice
        told = told[[0, *range(1, len(told), 2)]]
    if case.scheduler == "DDIM":
        end = "zero" if float(s.final_alpha_cumprod) == 1 else "min"
        schedule = schedules.from_alphas_cumprod(s.alphas_cumprod.double().tolist())
        return schedule.path(timesteps=told.tolist(), final_sigma=end, strength=strength)
    sigmas = s.sigmas.double()
    if s.order == 2:
        sigmas = sigmas[[0, *range(1, len(sigmas) - 1, 2), -1]]
    if case.scheduler == "EDMEuler":
        schedule = schedules.edm(s.config.sigma_min, s.config.sigma_max, s.config.sigma_data)
    elif case.scheduler in FLOW or s.config.get("use_flow_sigmas"):
        schedule = schedules.flow()
    else:
        schedule = schedules.from_alphas_cumprod(s.alphas_cumprod.double().tolist())
    end = "zero" if sigmas[-1] == 0 else "min"
    path = schedule.path(sigmas=sigmas[:-1].tolist(), timesteps=told.tolist(), final_sigma=end, strength=strength)
    if end == "zero":
        return path
    # the peer's smallest sigma is its table's, rounded once more
    assert abs(path.sigma[-1] / path.alpha[-1] / float(sigmas[-1]) - 1) < 2**-22
    last = 1 / np.hypot(1, float(sigmas[-1]))
    return replace(path, alpha=[*path.alpha[:-1], last], sigma=[*path.sigma[:-1], last * float(sigmas[-1])])


def start(case: Case, path: pyguide.NoisePath, dtype: torch.dtype) -> torch.Tensor:
    """The state that the scheduler starts from."""
    noise = draw(1).to(dtype)
    if case.strength < 1:
        return path.noise_at(draw(2).to(dtype), noise)
    scheduler = case.make()
    if dtype == torch.float64:
        widen(scheduler)
    peer = float(getattr(scheduler, "init_noise_sigma", 1.0))
    return noise * (peer * float(path.alpha[0]) if case.scheduler in RATIO else peer)


def supplied(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The first draws of the peer's float32 generator, in another dtype."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(count)]


def run_ours(
    case: Case, path: pyguide.NoisePath, dtype: torch.dtype, plan: Any = None, **settings: Any
) -> torch.Tensor:
    """The compiled plan on a path. float32: a generator like the peer's; float64: the noises that one drew."""
    plan = plan or case.plan(path)
    source: dict[str, Any] = {"generator": torch.Generator().manual_seed(SEED)}
    if dtype == torch.float64:
        source = {"noises": supplied(len(plan.stochastic_rows), dtype)}
    return pyguide.Sampler(case.network, plan, **settings)(start(case, path, dtype), **source)
