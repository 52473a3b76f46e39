"""Makes kdiffusion.npz: what k-diffusion's samplers, unmodified, return for a small network and recorded noises.

    git clone https://github.com/crowsonkb/k-diffusion
    git -C k-diffusion checkout 4601bf085320592473f681a62808ed873d17fad5
    python make_kdiffusion.py k-diffusion

k-diffusion itself is neither installed nor copied: its package pulls in much that its samplers do not need. This loads
sampling.py, external.py, layers.py and utils.py of k_diffusion from a checkout without changes, with empty stand-ins
for those of their imports that are not installed and that nothing run here uses. The noises are injected where the code
draws them: by `noise_sampler`, and in place of torch.randn_like during a run. A sampler whose noises of one step come
from one Brownian tree gets a Brownian motion made of the same recorded normals, see `Motion`.

Every case is run in float32 and in float64, with the same numbers: sigmas, noises and the start are float32 values.
Stored: `meta` (JSON: the commit, torch's version, the cases, their grids, and `wrong`: what goes wrong), `start` and
`noises` [100] (standard normal, of every case), `<grid>.sigmas`, and per case `<name>.float32`, `<name>.float64`.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import Network

GENERATOR = torch.Generator().manual_seed(0)
START = torch.randn((2, 3, 4, 4), generator=GENERATOR)
NOISES = torch.randn((100, 2, 3, 4, 4), generator=GENERATOR)

# (kind of network, kind of grid, steps, its arguments)
#   edm: preconditioned with sigma_data 1/2, told log(s) / 4
#   epsilon, v, sample: a variance-preserving model, told the timestep of latent diffusion's schedule
EDM = {"sigma_min": 0.002, "sigma_max": 80.0}
VP = {"sigma_min": 0.029167158151720367, "sigma_max": 14.614641229333644}  # the range of that schedule, in float64
SHORT = {"sigma_min": 0.05, "sigma_max": 40.0}
MIDDLE = {"sigma_min": 0.05, "sigma_max": 12.0}  # churn raises it to 16.97, beyond the schedule
GRIDS: dict[str, tuple[str, str, int, dict[str, float]]] = {
    "edm": ("edm", "karras", 20, EDM),
    "edm-5": ("edm", "karras", 5, EDM),
    "edm-50": ("edm", "karras", 50, EDM),
    "edm-min": ("edm", "karras-min", 6, SHORT),
    "edm-poly-min": ("edm", "polyexponential-min", 12, {**SHORT, "rho": 1.4}),
    "epsilon": ("epsilon", "karras", 25, VP),
    "epsilon-8": ("epsilon", "exponential", 8, MIDDLE),
    "epsilon-min": ("epsilon", "exponential-min", 12, VP),
    "v": ("v", "exponential", 10, VP),
    "v-poly": ("v", "polyexponential", 12, {**VP, "rho": 0.8}),
    "v-min": ("v", "karras-min", 6, VP),
    "sample": ("sample", "vp", 20, {}),
    "sample-min": ("sample", "vp-min", 10, {}),
}

CHURN = {"s_churn": 4.0, "s_tmin": 0.06, "s_tmax": 50.0, "s_noise": 1.003}
ALWAYS = {"s_churn": 1e3, "s_noise": 1.01}
HALF = {"eta": 0.5, "s_noise": 1.003}
ODE = {"eta": 0.0}
Options = dict[str, Any]

# sampler, its options, the grids
ZERO = ("edm", "edm-5", "epsilon", "v", "v-poly", "sample")
MIN = ("edm-min", "edm-poly-min", "epsilon-min", "v-min", "sample-min")
RUNS: list[tuple[str, Options, tuple[str, ...]]] = [
    ("euler", {}, ("edm", "edm-5", "epsilon", "v", "v-poly", "sample", "epsilon-min")),
    ("euler", CHURN, ("edm", "epsilon-8")),
    ("euler", ALWAYS, ("edm-min",)),
    ("euler_ancestral", {}, ("edm", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("euler_ancestral", HALF, ("edm-5", "v", "sample-min")),
    ("heun", {}, ("edm", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("heun", CHURN, ("edm", "epsilon-8", "edm-min")),
    ("heun", ALWAYS, ("edm-poly-min",)),
    ("dpm_2", {}, ("edm", "edm-50", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("dpm_2", CHURN, ("edm", "epsilon-8", "edm-min")),
    ("dpm_2", ALWAYS, ("edm-poly-min",)),
    ("dpm_2_ancestral", {}, ("edm", "edm-5", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("dpm_2_ancestral", HALF, ("edm", "v", "epsilon-min")),
    ("dpm_2_ancestral", ODE, ("epsilon-8", "edm-poly-min")),
    ("lms", {"order": 1}, ("edm-5", "v-min")),
    ("lms", {"order": 2}, ("edm", "v-poly", "edm-min")),
    ("lms", {"order": 3}, ("edm", "epsilon-8", "sample-min")),
    ("lms", {}, ("edm", "edm-5", "edm-50", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("dpmpp_2s_ancestral", {}, ("edm", "edm-5", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("dpmpp_2s_ancestral", HALF, ("edm", "v", "epsilon-min")),
    ("dpmpp_2s_ancestral", ODE, ("epsilon-8", "edm-poly-min")),
    ("dpmpp_sde", {}, ("edm", "edm-5", "edm-50", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("dpmpp_sde", HALF, ("edm", "v", "epsilon-min")),
    ("dpmpp_sde", {"r": 0.3}, ("edm-5", "v", "sample-min")),
    ("dpmpp_sde", {"r": 0.75, "eta": 0.8}, ("epsilon-8", "edm-poly-min")),
    ("dpmpp_sde", {"r": 1.0}, ("epsilon-8", "edm-min")),
    ("dpmpp_sde", ODE, ("epsilon-8", "v-min")),
    ("dpmpp_2m", {}, ("edm", "edm-5", "edm-50", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("dpmpp_2m_sde", {}, ("edm", "edm-5", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, ("edm", "edm-50", "epsilon-8", "sample", "edm-poly-min")),
    ("dpmpp_2m_sde", HALF, ("edm", "v", "epsilon-min")),
    ("dpmpp_2m_sde", {"solver_type": "heun", **HALF}, ("edm-5", "v-min")),
    ("dpmpp_2m_sde", ODE, ("epsilon-8", "edm-min")),
    ("dpmpp_3m_sde", {}, ("edm", "edm-5", "edm-50", "epsilon", "v-poly", "sample", "edm-min", "v-min")),
    ("dpmpp_3m_sde", HALF, ("edm", "v", "epsilon-min")),
    ("dpmpp_3m_sde", ODE, ("epsilon-8", "edm-poly-min")),
    ("dpm_solver_2", {}, ("edm-min", "edm-poly-min", "epsilon-min", "v-min", "sample-min")),
    ("dpm_solver_3", {}, ("edm-min", "edm-poly-min", "epsilon-min", "v-min", "sample-min")),
    ("dpm_fast", {"n": 9}, ("edm-min", "v-min")),
    ("dpm_fast", {"n": 13}, ("edm-min", "epsilon-min")),
    ("dpm_fast", {"n": 20}, ("epsilon-min", "edm-poly-min")),
]


def _label(options: Options) -> str:
    named = {id(CHURN): "churn", id(ALWAYS): "most-churn", id(HALF): "half"}
    return named.get(id(options)) or "-".join(f"{key}={value}" for key, value in options.items())


CASES: dict[str, tuple[str, str, Options]] = {
    "-".join(filter(None, (sampler, grid, _label(options)))): (sampler, grid, options)
    for sampler, options, grids in RUNS
    for grid in grids
}


class Motion:
    """The values of one Brownian motion at the times asked for, made of independent normals in the order of asking.

    W is 0 at the first time. A time t below all known ones adds the increment from the lowest, b; between two known
    times a < t < b the value is that of the Brownian bridge (Karatzas, Shreve 1991, section 5.6.B):

        W(t) = W(b) + sqrt(b - t) z
        W(t) = ((b - t) W(a) + (t - a) W(b)) / (b - a) + sqrt((t - a)(b - t) / (b - a)) z

    As a noise sampler it gives (W(s') - W(s)) / sqrt(|s - s'|), which is what k-diffusion's tree gives.
    """

    def __init__(self, normals: Iterator[torch.Tensor]) -> None:
        self.normals = normals
        self.known: dict[float, Any] = {}

    def value(self, time: float) -> tuple[float, Any]:
        """(the time as it was first asked for, W there): a rounded logarithm lies between two requests."""
        near = [t for t in self.known if math.isclose(t, time, rel_tol=1e-6)]
        if near:
            return near[0], self.known[near[0]]
        below, above = [t for t in self.known if t < time], [t for t in self.known if t > time]
        if not self.known:
            self.known[time] = 0.0
        elif not below:
            b = min(above)
            self.known[time] = self.known[b] + next(self.normals) * math.sqrt(b - time)
        else:
            a, b = max(below), min(above)
            mean = (self.known[a] * (b - time) + self.known[b] * (time - a)) / (b - a)
            self.known[time] = mean + next(self.normals) * math.sqrt((time - a) * (b - time) / (b - a))
        return time, self.known[time]

    def __call__(self, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        (s, start), (t, end) = self.value(float(sigma)), self.value(float(sigma_next))
        return (end - start) / math.sqrt(abs(s - t))


def load(checkout: Path) -> tuple[Any, str]:
    """(k_diffusion, commit) of an unmodified checkout, with .sampling, .external and .layers."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    changes = subprocess.run(
        [*git, "status", "--porcelain", "k_diffusion"], check=True, capture_output=True, text=True
    ).stdout
    if changes:
        raise SystemExit(f"the checkout is modified:\n{changes}")
    absent = ("torchsde", "torchdiffeq", "torchvision", "torchvision.transforms", "PIL", "safetensors", "dctorch")
    for name in (*absent, "einops"):
        try:
            importlib.import_module(name)
        except ImportError:
            stub = types.ModuleType(name)
            stub.__getattr__ = lambda attribute: mock.MagicMock(name=attribute)  # type: ignore[method-assign]
            sys.modules[name] = stub
    package = types.ModuleType("k_diffusion")  # without its __init__, which imports everything
    package.__path__ = [str(checkout / "k_diffusion")]
    sys.modules["k_diffusion"] = package
    for name in ("sampling", "external", "layers"):
        setattr(package, name, importlib.import_module(f"k_diffusion.{name}"))
    return package, commit


def sigmas_of(sampling: Any, name: str) -> torch.Tensor:
    """k-diffusion's own sigmas [steps + 1], float32; "-min" ends at the smallest sigma instead of 0."""
    _, points, steps, arguments = GRIDS[name]
    make = getattr(sampling, f"get_sigmas_{points.removesuffix('-min')}")
    return make(steps + 1, **arguments)[:-1] if points.endswith("-min") else make(steps, **arguments)


def denoiser(k_diffusion: Any, kind: str, dtype: Any) -> Any:
    """k-diffusion's wrapper of a network of that kind; for "sample", which it lacks, the network as it is."""
    by_sigma, by_time = Network(time_scale=1.0), Network(time_scale=1 / 150)
    if kind == "edm":
        return k_diffusion.layers.Denoiser(lambda x, sigma: by_sigma(x, sigma.log() / 4), sigma_data=0.5)
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = torch.from_numpy(np.cumprod(1 - beta)).to(dtype)
    if kind == "epsilon":
        return k_diffusion.external.DiscreteEpsDDPMDenoiser(by_time, alphas_cumprod, quantize=False)
    wrapped = k_diffusion.external.DiscreteVDDPMDenoiser(by_time, alphas_cumprod, quantize=False)
    if kind == "v":
        return wrapped
    return lambda x, sigma: by_time(x / (1 + sigma[:, None, None, None] ** 2).sqrt(), wrapped.sigma_to_t(sigma))


def run(
    k_diffusion: Any, sampler: str, kind: str, options: Options, sigmas: torch.Tensor, drawn: Iterator[torch.Tensor]
) -> torch.Tensor:
    """The result of one run from START, in the dtype of the sigmas; `drawn` are the normals that it may take."""
    sampling, dtype = k_diffusion.sampling, sigmas.dtype
    x = START.to(dtype) * (sigmas[0] if kind == "edm" else (1 + sigmas[0] ** 2).sqrt())
    model = denoiser(k_diffusion, kind, dtype)
    if sampler in ("dpm_solver_2", "dpm_solver_3"):  # its steps over the grid
        solver = sampling.DPMSolver(model)
        step, times = getattr(solver, f"{sampler}_step"), solver.t(sigmas)
        with torch.no_grad():
            for t, t_next in itertools.pairwise(times):
                x, _ = step(x, t, t_next)
        return x
    function = getattr(sampling, f"sample_{sampler}")
    if sampler == "dpm_fast":  # makes its own grid, in torch's default dtype, from the first to the last sigma
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return function(model, x, sigmas[-1].item(), sigmas[0].item(), disable=True, **options)
        finally:
            torch.set_default_dtype(before)
    extra = {}
    if sampler == "dpmpp_sde":
        extra["noise_sampler"] = Motion(drawn)
    elif sampler.endswith(("ancestral", "sde")):  # one draw a step: increments that do not overlap are independent
        extra["noise_sampler"] = lambda sigma, sigma_next: next(drawn)
    with mock.patch.object(torch, "randn_like", side_effect=lambda x: next(drawn)):
        return function(model, x, sigmas, disable=True, **extra, **options)


def wrong(k_diffusion: Any) -> dict[str, Any]:
    """What goes wrong in k-diffusion: an exception, or noises drawn of those that the method adds."""
    found: dict[str, Any] = {}
    for sampler in ("dpmpp_2m_sde", "dpmpp_3m_sde"):  # the step size is remembered also where there was none
        try:
            run(k_diffusion, sampler, "edm", {}, torch.tensor([10.0, 0.0]), iter(NOISES))
        except UnboundLocalError as error:
            found[f"{sampler}, one step to zero"] = type(error).__name__
    for name, sigmas, options, dtype in (  # a step that goes down to zero noise leaves out what brings it up again
        ("eta 1.5", [10.0, 5.0, 2.0, 1.0], {"eta": 1.5}, torch.float64),
        ("float64", [80.0, 0.01, 0.005, 0.002], {}, torch.float64),
        ("float32", [80.0, 0.01, 0.005, 0.002], {}, torch.float32),  # sqrt(1 - (0.01 / 80)^2) is 1
    ):
        left = iter(NOISES)
        run(k_diffusion, "dpm_2_ancestral", "edm", options, torch.tensor(sigmas, dtype=dtype), left)
        found[f"dpm_2_ancestral, {name}, noises of 3 steps"] = len(NOISES) - len(list(left))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Make kdiffusion.npz from a checkout of k-diffusion.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("kdiffusion.npz"))
    arguments = parser.parse_args()
    k_diffusion, commit = load(arguments.checkout)
    stored: dict[str, Any] = {"start": START.numpy(), "noises": NOISES.numpy()}
    for name, (sampler, grid, options) in CASES.items():
        sigmas = sigmas_of(k_diffusion.sampling, grid)
        stored[f"{grid}.sigmas"] = sigmas.numpy()
        for dtype in (torch.float32, torch.float64):
            drawn = iter(NOISES.to(dtype))
            out = run(k_diffusion, sampler, GRIDS[grid][0], options, sigmas.to(dtype), drawn)
            assert out.dtype == dtype
            assert out.isfinite().all(), name
            stored[f"{name}.{str(dtype).removeprefix('torch.')}"] = out.numpy()
        gap = np.abs(stored[f"{name}.float32"] - stored[f"{name}.float64"]).max()
        print(f"{name:44s} {len(sigmas) - 1:3d} steps, float32 from float64 {gap:.1e}")
    meta = {"commit": commit, "torch": torch.__version__, "cases": CASES, "grids": GRIDS, "wrong": wrong(k_diffusion)}
    np.savez_compressed(arguments.out, meta=json.dumps(meta), **stored)
    print(f"{arguments.out.name}: {arguments.out.stat().st_size} bytes, {len(CASES)} cases, k-diffusion {commit}")


if __name__ == "__main__":
    main()
