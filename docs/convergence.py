"""The convergence plots of docs/solvers.md: runs on a mixture of three Gaussians whose denoiser is known exactly."""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pyguide import NoisePath, compile, schedules, solvers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gaussians import MEANS, SHARES, WIDTHS, denoiser, exact, network_of, uniform

START, END = 10.0, 0.05
STEPS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SAMPLES = 1 << 15


def mixture(rng: np.random.Generator, count: int, s: float) -> Any:
    """Samples of the data plus noise of standard deviation s."""
    part = rng.choice(len(MEANS), count, p=SHARES)
    return MEANS[part] + np.hypot(WIDTHS[part], s) * rng.standard_normal(count)


def wasserstein(a: Any, b: Any) -> float:
    """Distance of two samples of equal size on a line: the mean distance of their order statistics."""
    return float(np.abs(np.sort(a) - np.sort(b)).mean())


@cache
def target() -> Any:
    """Quantiles of the data at the last noise level, as many as samples: their distance from exact samples is the
    floor."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    width = np.hypot(WIDTHS, END)

    def quantile(p: float) -> float:
        return brentq(lambda y: float(SHARES @ norm.cdf((y - MEANS) / width)) - p, -12, 12)

    coarse = (np.arange(2048) + 0.5) / 2048
    points = np.array([quantile(p) for p in coarse])
    return np.interp((np.arange(SAMPLES) + 0.5) / SAMPLES, coarse, points)


@cache
def flow_map(s: float) -> tuple[Any, Any]:
    """(y, end of the ODE's solution through it) on a fine grid: the consistency function at one noise level."""
    y = np.linspace(-6, 6, 1501) * math.hypot(s, 1.0)
    return y, exact(y, s, 1e-3)


def consistency(y: Any, s: float) -> Any:
    points, ends = flow_map(s)
    return np.interp(y, points, ends)


def path_of(steps: int) -> NoisePath:
    """Equal steps in log sigma, with alpha = 1."""
    return schedules.edm(END, START).path(sigmas=uniform(steps, START, END)[:-1], final_sigma="min")


def ode_error(name: str, steps: int) -> tuple[int, float]:
    """(evaluations, rms error of the end point)"""
    path, x = path_of(steps), np.linspace(-1.4, 1.6, 7) * START
    out = solvers.sample(name, network_of(path), x, path, prediction="sample")
    return compile(name, path, prediction="sample").evaluations, float(np.sqrt(np.mean((out - truth()) ** 2)))


@cache
def truth() -> Any:
    return exact(np.linspace(-1.4, 1.6, 7) * START, START, END)


def law_error(name: str, steps: int, distilled: bool = False) -> tuple[int, float]:
    """(evaluations, Wasserstein distance between samples and the data's law at the last noise level)"""
    rng, path = np.random.default_rng(0), path_of(steps)
    out = solvers.sample(
        name,
        network_of(path, consistency if distilled else denoiser),
        mixture(rng, SAMPLES, START),
        path,
        prediction="sample",
        noise=lambda step: rng.standard_normal(SAMPLES),
    )
    return compile(name, path, prediction="sample").evaluations, wasserstein(out, target())


def plot(name: str, file: Path) -> None:
    """One PNG: error against evaluations, with ddim's beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entry = solvers.entry(name)
    noisy = bool(compile(name, path_of(24)).stochastic_rows)
    figure, axes = plt.subplots(figsize=(4.2, 2.9), layout="constrained")
    if noisy or entry.order is None:
        curve = [law_error(name, n, entry.order is None) for n in STEPS]
        grey = [law_error("ddim", n) for n in STEPS]
        draws = (mixture(np.random.default_rng(seed), SAMPLES, END) for seed in range(1, 33))
        floor = sorted(wasserstein(draw, target()) for draw in draws)
        axes.axhspan(floor[0], floor[-1], color="0.93", label="exact samples")
        axes.set_ylabel("Wasserstein distance")
    else:
        curve, grey = ([ode_error(which, n) for n in STEPS] for which in (name, "ddim"))
        axes.set_ylabel("rms error")
    axes.loglog(*zip(*grey), color="0.7", linewidth=1, label="ddim")
    axes.loglog(*zip(*curve), color="tab:blue", marker="o", markersize=3, label=name)
    if entry.order is not None and not noisy:
        evaluations, errors = (np.array(values) for values in zip(*curve))
        slope = errors[-1] * (evaluations[-1] / evaluations) ** entry.order
        axes.loglog(
            evaluations[-4:], slope[-4:] / 2, color="0.5", linestyle="--", linewidth=1, label=f"order {entry.started}"
        )
    ticks = [4, 8, 16, 32, 64, 128]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(2.6, 150)
    axes.minorticks_off()
    axes.set_xlabel("model evaluations")
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=100, metadata={"Software": None})
    plt.close(figure)
