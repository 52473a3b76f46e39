"""Makes kdiffusion.npz: what k-diffusion's samplers, unmodified, return for a small network and recorded noises.

    git clone https://github.com/crowsonkb/k-diffusion
    git -C k-diffusion checkout 4601bf085320592473f681a62808ed873d17fad5
    python make_kdiffusion.py k-diffusion

k-diffusion itself is neither installed nor copied: its package pulls in much that its samplers do not need. This loads
k_diffusion/sampling.py and utils.py from a checkout without changes, with empty stand-ins for those of their imports
that are not installed (torchsde and torchdiffeq, which only samplers that are not run here use; torchvision). The
noises are injected where the code draws them: by `noise_sampler`, and in place of torch.randn_like during a run.

Every case is run in float32 and in float64, with the same numbers: sigmas, noises and the start are float32 values.
Stored: `meta` (JSON: the commit, torch's version, the cases), `start` and `noises` [40] (standard normal, of every
case), and per case `<name>.sigmas`, `<name>.float32`, `<name>.float64`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import Network

SHAPE = (2, 3, 4, 4)
VP_MIN, VP_MAX = (
    0.029167158151720367,
    14.614641229333644,
)  # of the scaled-linear schedule of latent diffusion, in float64

# name: (sampler, kind of network, (grid, steps, its arguments), options)
#   edm: D = c_skip x + c_out F(c_in x, log(s) / 4), sigma_data 1/2
#   epsilon, v, sample: the network sees x / sqrt(1 + s^2), the state of a variance-preserving model
EDM = {"sigma_min": 0.002, "sigma_max": 80.0}
VP = {"sigma_min": VP_MIN, "sigma_max": VP_MAX}
SHORT = {"sigma_min": 0.05, "sigma_max": 40.0}
CHURN = {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}

CASES: dict[str, tuple[str, str, tuple[str, int, dict[str, float]], dict[str, float]]] = {
    "euler-edm-karras": ("euler", "edm", ("karras", 20, EDM), {}),
    "euler-epsilon-karras": ("euler", "epsilon", ("karras", 25, VP), {}),
    "euler-v-exponential": ("euler", "v", ("exponential", 10, VP), {}),
    "ancestral-edm-karras": ("euler_ancestral", "edm", ("karras", 20, EDM), {}),
    "ancestral-epsilon-karras": ("euler_ancestral", "epsilon", ("karras", 25, VP), {}),
    "ancestral-sample-vp": ("euler_ancestral", "sample", ("vp", 10, {}), {}),
    "ancestral-v-eta": ("euler_ancestral", "v", ("exponential", 10, VP), {"eta": 0.5, "s_noise": 1.003}),
    "ancestral-edm-min": ("euler_ancestral", "edm", ("karras-min", 10, SHORT), {}),
    "heun-edm-karras": ("heun", "edm", ("karras", 18, EDM), {}),
    "heun-epsilon-karras": ("heun", "epsilon", ("karras", 10, VP), {}),
    "heun-v-vp": ("heun", "v", ("vp", 20, {}), {}),
    "heun-edm-churn": ("heun", "edm", ("karras", 18, EDM), CHURN),
    "heun-edm-most-churn": (
        "heun",
        "edm",
        ("exponential", 10, {"sigma_min": 0.01, "sigma_max": 50.0}),
        {"s_churn": 1e3},
    ),
    "heun-edm-min": ("heun", "edm", ("karras-min", 5, SHORT), {}),
    "dpmpp_2m-edm-karras": ("dpmpp_2m", "edm", ("karras", 20, EDM), {}),
    "dpmpp_2m-edm-5": ("dpmpp_2m", "edm", ("karras", 5, EDM), {}),
    "dpmpp_2m-epsilon-karras": ("dpmpp_2m", "epsilon", ("karras", 25, VP), {}),
    "dpmpp_2m-v-exponential": ("dpmpp_2m", "v", ("exponential", 10, VP), {}),
    "dpmpp_2m-sample-vp": ("dpmpp_2m", "sample", ("vp", 20, {}), {}),
    "dpmpp_2m-edm-min": ("dpmpp_2m", "edm", ("karras-min", 20, SHORT), {}),
}


def load(checkout: Path) -> tuple[Any, str]:
    """(k_diffusion.sampling, commit) of an unmodified checkout."""
    git = ["git", "-C", str(checkout)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    changes = subprocess.run(
        [*git, "status", "--porcelain", "k_diffusion"], check=True, capture_output=True, text=True
    ).stdout
    if changes:
        raise SystemExit(f"the checkout is modified:\n{changes}")
    for name in ("torchsde", "torchdiffeq", "torchvision", "torchvision.transforms", "PIL", "safetensors"):
        try:
            importlib.import_module(name)
        except ImportError:
            stub = types.ModuleType(name)
            stub.__getattr__ = lambda attribute: mock.MagicMock(name=attribute)  # type: ignore[method-assign]
            sys.modules[name] = stub
    package = types.ModuleType("k_diffusion")  # without its __init__, which imports everything
    package.__path__ = [str(checkout / "k_diffusion")]
    sys.modules["k_diffusion"] = package
    return importlib.import_module("k_diffusion.sampling"), commit


def grid(sampling: Any, name: str, steps: int, arguments: dict[str, float]) -> torch.Tensor:
    """k-diffusion's own sigmas [steps + 1], float32; "-min" ends at the smallest sigma instead of 0."""
    make = getattr(sampling, f"get_sigmas_{name.removesuffix('-min')}")
    return make(steps + 1, **arguments)[:-1] if name.endswith("-min") else make(steps, **arguments)


def denoiser(kind: str) -> Any:
    network = Network(time_scale=1.0)

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        s = sigma[:, None, None, None]
        time = sigma.log() / 4
        if kind == "edm":
            total = s**2 + 0.25
            return x * 0.25 / total + network(x / total.sqrt(), time) * (s * 0.5 / total.sqrt())
        scale = 1 / (1 + s**2).sqrt()
        m = network(x * scale, time)
        return {"epsilon": lambda: x - s * m, "v": lambda: x * scale**2 - m * s * scale, "sample": lambda: m}[kind]()

    return model


def run(
    sampling: Any, name: str, sigmas: torch.Tensor, start: torch.Tensor, noises: torch.Tensor, dtype: Any
) -> torch.Tensor:
    sampler, kind, _, options = CASES[name]
    sigmas, start, noises = (array.to(dtype) for array in (sigmas, start, noises))
    x = start * (sigmas[0] if kind == "edm" else (1 + sigmas[0] ** 2).sqrt())
    step = iter(noises)
    extra = {}
    if sampler == "euler_ancestral":
        extra["noise_sampler"] = lambda sigma, sigma_next: next(step)
    with mock.patch.object(torch, "randn_like", side_effect=lambda x: next(step)):
        out = getattr(sampling, f"sample_{sampler}")(denoiser(kind), x, sigmas, disable=True, **extra, **options)
    assert out.dtype == dtype
    assert out.isfinite().all()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Make kdiffusion.npz from a checkout of k-diffusion.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("kdiffusion.npz"))
    arguments = parser.parse_args()
    sampling, commit = load(arguments.checkout)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator)
    noises = torch.randn((40, *SHAPE), generator=generator)
    stored: dict[str, Any] = {"start": start.numpy(), "noises": noises.numpy()}
    for name, (_, _, (points, steps, limits), _) in CASES.items():
        sigmas = grid(sampling, points, steps, limits)
        stored[f"{name}.sigmas"] = sigmas.numpy()
        for dtype in (torch.float32, torch.float64):
            stored[f"{name}.{str(dtype).removeprefix('torch.')}"] = run(
                sampling, name, sigmas, start, noises, dtype
            ).numpy()
        gap = np.abs(stored[f"{name}.float32"] - stored[f"{name}.float64"]).max()
        print(f"{name:26s} {steps:3d} steps, float32 from float64 {gap:.1e}")
        assert math.isfinite(gap)
    meta = {"commit": commit, "torch": torch.__version__, "cases": CASES}
    np.savez_compressed(arguments.out, meta=json.dumps(meta), **stored)
    print(f"{arguments.out.name}: {arguments.out.stat().st_size} bytes, k-diffusion {commit}")


if __name__ == "__main__":
    main()
