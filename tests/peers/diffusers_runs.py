"""Runs of diffusers' schedulers, unmodified: what make_diffusers.py stores, and what the live tests run again.

A scheduler is driven as a pipeline drives it: latents times init_noise_sigma, scale_model_input, the network, step;
image-to-image by add_noise, a slice of the timesteps and set_begin_index. In float32 nothing is touched, and noise
comes from a torch.Generator. Only the two schedulers that take their noise from torchsde's Brownian tree are handed
increments made of the same normals (`Motion`); where torchsde is missing their modules are loaded beside an empty one.

In float64 the scheduler's code is unmodified too, and it is given

    its own tables alphas_cumprod and sigmas, widened: the same numbers, no longer rounding what is computed from them;
    arrays that set_timesteps turns into tensors, and torch's default dtype, in float64: the same, for further tables;
    latents as `Wide`, a tensor that stays float64 where a scheduler writes sample.to(torch.float32);
    the float32 run's noises, in place of randn_tensor (a float64 generator draws other ones).

"The peer's own distance from float64" is that between these two runs: of the peer's arithmetic, on the peer's numbers.
pyguide has no part in it, and its float64 results are compared with the second run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from .common import SEED, SHAPE, draw
from .diffusers_cases import EDM, FLOW, TABLE, Case
from .diffusers_ours import TIMES, UNIT, Array, Run

BROWNIAN = {
    "DPMSolverSDE": "scheduling_dpmsolver_sde",
    "CosineDPMSolverMultistep": "scheduling_cosine_dpmsolver_multistep",
}
RATIO = (
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "LMSDiscrete",
    "DPMSolverSDE",
)  # their x is the state over alpha
INNER = ("KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")  # evaluate between grid points


class Wide(torch.Tensor):
    """A float64 tensor that a cast to float32 leaves as it is."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = kwargs.get("dtype", args[0] if args else None)
        return self if wanted is torch.float32 else super().to(*args, **kwargs)


class WideTorch:
    """torch, but tensors made from arrays, from lists and by sin (iPNDM's own table) go on in float64."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(torch, name)
        if name not in ("from_numpy", "tensor", "sin"):
            return function

        def wide(*args: Any, **kwargs: Any) -> torch.Tensor:
            made = function(*args, **kwargs)
            return made.double() if made.is_floating_point() else made

        return wide


class Motion:
    """(W(a) - W(b)) / sqrt(a - b) of one Brownian motion in sigma, walked from the noisiest level down.

    A normal for each level that it has not met; increments that overlap share those between their levels.
    """

    def __init__(self, normals: Iterator[torch.Tensor], dtype: torch.dtype) -> None:
        self.normals, self.dtype = normals, dtype
        self.walk: list[tuple[float, Any]] = []  # (level, W there, in float64), descending

    def at(self, sigma: float) -> Any:
        for level, value in self.walk:
            if abs(level - sigma) <= 1e-6 * level:  # as the scheduler's logarithm and exponential leave it
                return value
        if not self.walk:
            self.walk.append((sigma, 0.0))
        else:
            level, value = self.walk[-1]
            assert sigma < level
            self.walk.append((sigma, value + next(self.normals).double() * (level - sigma) ** 0.5))
        return self.walk[-1][1]

    def __call__(self, sigma: Any, sigma_next: Any) -> torch.Tensor:
        start, end = self.at(float(sigma)), self.at(float(sigma_next))
        unit = (end - start) / (float(sigma) - float(sigma_next)) ** 0.5
        return unit.as_subclass(Wide) if self.dtype == torch.float64 else unit.to(self.dtype)


def scheduler_class(name: str) -> Any:
    if name not in BROWNIAN:
        return getattr(diffusers, f"{name}Scheduler")
    absent = "torchsde" not in sys.modules and importlib.util.find_spec("torchsde") is None
    if absent:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        module = importlib.import_module(f"diffusers.schedulers.{BROWNIAN[name]}")
    finally:
        if absent:
            del sys.modules["torchsde"]
    return getattr(module, f"{name}Scheduler")


def make(case: Case, wide: bool = False) -> Any:
    """The scheduler, with its timesteps set; wide: with its tables in float64."""
    config = dict(case.config)
    if "tau_func" in config:
        strength = config["tau_func"]
        config["tau_func"] = lambda t: strength
    scheduler = scheduler_class(case.scheduler)(**config)
    count = {} if {"sigmas", "timesteps"} & set(case.call) else {"num_inference_steps": case.steps}
    module = sys.modules[type(scheduler).__module__]
    with mock.patch.object(module, "torch", WideTorch()) if wide else contextlib.nullcontext():
        scheduler.set_timesteps(**count, **case.call)
    if wide:
        for name in ("alphas_cumprod", "final_alpha_cumprod", "sigmas"):
            if isinstance(getattr(scheduler, name, None), torch.Tensor):
                setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def network(case: Case) -> Any:
    """What stands for the model: told timesteps up to 1000, or numbers around 1."""
    return UNIT if case.scheduler in (*EDM, "IPNDM") else TIMES


def grid(case: Case, s: Any) -> tuple[Array, Array]:
    """(told, sigmas) of Run, from a scheduler in float64."""
    told = np.asarray(s.timesteps.double())
    if case.scheduler in INNER:
        told = told[::2]
    elif s.order == 2:  # Heun's list their inner points twice
        told = told[[0, *range(1, len(told), 2)]]
    elif case.scheduler == "PNDM":
        told = np.asarray(s._timesteps[::-1], np.float64)
    if case.scheduler in TABLE:
        end = {"DDPM": 1.0, "LCM": 1.0, "TCD": float(s.alphas_cumprod[0])}.get(case.scheduler)
        end = float(s.final_alpha_cumprod) if end is None else end
        sigmas = np.sqrt([(1 - end) / end])
        assert not case.null
    else:
        sigmas = np.asarray(s.betas / s.alphas if case.scheduler == "IPNDM" else s.sigmas, np.float64)
        sigmas = np.append(sigmas[0], sigmas[1::2] if s.order == 2 else sigmas[1:])[: len(told) + 1]
        assert case.null == bool(0 < sigmas[-2] <= sigmas[-1] * (1 + 1e-6)), f"null: {sigmas[-2:]}"
    if case.null:
        told, sigmas = told[:-1], sigmas[:-1]
    return told[case.first :], sigmas if case.scheduler in TABLE else sigmas[case.first :]


def run(case: Case, dtype: torch.dtype, model: Any = None, seed: int = 0) -> Run:
    """The scheduler's result as a state (times alpha at the end, where its x is over alpha), and its grid.

    model: the network, if not the usual one. seed: added to those of the initial noise, the image and the noises.
    """
    wide = dtype == torch.float64
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        scheduler = make(case, wide)
        told, sigmas = grid(case, scheduler if wide else make(case, True))
        x, inner = _stepped(case, scheduler, dtype, model or network(case), seed)
    scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if case.scheduler in RATIO:
        scale /= float(np.hypot(1, sigmas[0]))
        x = x * float(1 / np.hypot(1, sigmas[-1]))
    table = getattr(scheduler, "alphas_cumprod", None)
    if case.flows or case.scheduler in (*EDM, "IPNDM"):
        table = None
    return Run(
        x,
        told,
        sigmas,
        np.array(inner, np.float64).reshape(-1, 2),
        1.0 if case.strength < 1 else scale,
        None if table is None else np.asarray(table, np.float64),
    )


def _stepped(
    case: Case, scheduler: Any, dtype: torch.dtype, model: Any, seed: int
) -> tuple[torch.Tensor, list[tuple[float, float]]]:
    wide, begin = dtype == torch.float64, case.first * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    tensor = (lambda x: x.to(dtype).as_subclass(Wide)) if wide else (lambda x: x)
    if case.strength < 1 and case.scheduler in FLOW:
        x = scheduler.scale_noise(tensor(draw(2 + seed)), timesteps[:1], tensor(draw(1 + seed)))
    elif case.strength < 1:
        x = scheduler.add_noise(tensor(draw(2 + seed)), tensor(draw(1 + seed)), timesteps[:1])
    else:
        x = tensor(draw(1 + seed)) * getattr(scheduler, "init_noise_sigma", 1.0)
    generator = torch.Generator().manual_seed(SEED + seed)
    normals = (torch.randn(SHAPE, generator=generator, dtype=torch.float32) for _ in itertools.count())
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = Motion(normals, dtype)
    arguments = dict(case.step)
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments["generator"] = generator
    module, inner = sys.modules[type(scheduler).__module__], []
    with contextlib.ExitStack() as stack:
        if wide:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(dtype)
            if hasattr(module, "randn_tensor"):
                replay = mock.Mock(side_effect=lambda *args, **kwargs: tensor(next(normals)))
                stack.enter_context(mock.patch.object(module, "randn_tensor", replay))
        for t in timesteps[: len(timesteps) - case.null]:
            if case.scheduler in INNER and not scheduler.state_in_first_order:
                scaled = scheduler.scale_model_input(tensor(torch.ones(1, 1, 1, 1)), t)
                inner.append((float((scaled.double() ** -2 - 1).sqrt()), float(t)))
            inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(model(inputs, t), t, x, return_dict=False, **arguments)[0]
    assert x.dtype == dtype
    return x.as_subclass(torch.Tensor), inner
