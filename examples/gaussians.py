"""Three Gaussians whose scores are known: classifier and classifier-free guidance side by side, in one PNG.

    pip install pyguide[bench]                           # brings torch, for the classifier's gradient, and matplotlib
    python examples/gaussians.py --out gaussians.png

Data x | c ~ N(mu_c, width^2 I), c = 1, 2, 3 alike, diffused to x_t = alpha x + sigma noise. Everything that a network
would be trained for is then a formula, with v = alpha^2 width^2 + sigma^2:

    conditional model    epsilon(x_t, c) = sigma (x_t - alpha mu_c) / v
    classifier           p(c | x_t) = softmax of -|x_t - alpha mu_c|^2 / (2 v) over c
    unconditional model  epsilon(x_t) = sum_c p(c | x_t) epsilon(x_t, c)

By Bayes' rule -sigma grad log p(c | x_t) = epsilon(x_t, c) - epsilon(x_t), so that with strength w these are one and
the same sampler, and the last three rows of the figure the same samples:

    classifier guidance of the unconditional model, scale 1 + w
    classifier guidance of the conditional model,   scale w
    classifier-free guidance,                       scale 1 + w

The first row is figure 2 of Ho and Salimans 2022, the densities p(x | c) p(c | x)^w, each normalised, added up. They
are there to be compared with: the samplers follow the guided score at every noise level, and their samples do not have
this density.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

import pyguide

SCHEDULE = pyguide.schedules.cosine()
POWER = torch.from_numpy(SCHEDULE.levels_of_timesteps(np.arange(1000.0))[0] ** 2)  # alpha^2 at every timestep
ANGLE = torch.pi * torch.tensor([1 / 2, 7 / 6, 11 / 6], dtype=torch.float64)
MEANS = torch.stack([ANGLE.cos(), ANGLE.sin()], dim=1)  # [3, 2]
WIDTH = 0.5
NULL = 3  # the label of the unconditional branch
COLORS = ("tab:red", "tab:green", "tab:blue")
REACH = 3.0  # the panels show [-REACH, REACH]^2


def noised(x: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """x_t - alpha mu_c [n, 3, 2] and v [n, 1], from alpha^2 [n]."""
    power = power[:, None]
    return x[:, None] - power[..., None].sqrt() * MEANS, power * WIDTH**2 + (1 - power)


def log_likelihood(x: Tensor, power: Tensor) -> Tensor:
    """log p(x_t | c) [n, 3], without what all classes have in common."""
    gap, variance = noised(x, power)
    return -gap.square().sum(-1) / (2 * variance)


def classifier(x: Tensor, t: Tensor) -> Tensor:
    """Logits [n, 3] of p(c | x_t); pyguide takes their gradient with autograd."""
    return log_likelihood(x, POWER[t.long()])


def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """epsilon [n, 2]: conditional, or unconditional where the label is NULL."""
    power = POWER[t.long()]
    gap, variance = noised(x, power)
    posterior = torch.softmax(classifier(x, t), dim=1)
    certain = torch.nn.functional.one_hot(labels, NULL + 1)[:, :NULL].to(x.dtype)
    shares = torch.where(labels[:, None] == NULL, posterior, certain)
    score = -(shares[..., None] * gap).sum(1) / variance
    return -(1 - power).sqrt()[:, None] * score


def samples(w: float, count: int, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """By method, `count` samples of each class in the order of the classes, [3 count, 2]; all start from one noise."""
    labels = torch.arange(3).repeat_interleave(count)
    noise = torch.randn(3 * count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plan = pyguide.compile("dpmpp_2m", SCHEDULE.path(steps, spacing="trailing"), prediction="epsilon")
    cond, uncond = {"labels": labels}, {"labels": torch.full_like(labels, NULL)}

    on_unconditional = pyguide.ClassifierGuidance(classifier, 1 + w, cfg=pyguide.CFG(0.0))
    on_conditional = pyguide.ClassifierGuidance(classifier, w)
    free = pyguide.CFG(1 + w)
    return {
        "CG, unconditional\nmodel, scale 1 + w": pyguide.Sampler(model, plan, on_unconditional)(
            noise, cond=cond, uncond=uncond
        ),
        "CG, conditional\nmodel, scale w": pyguide.Sampler(model, plan, on_conditional)(noise, cond=cond),
        "CFG, scale 1 + w": pyguide.Sampler(model, plan, free)(noise, cond=cond, uncond=uncond),
    }


def densities(w: float, points: int = 121) -> Tensor:
    """p(x | c) p(c | x)^w on a grid, each class normalised: [3, points, points], the first axis of a class being y."""
    line = torch.linspace(-REACH, REACH, points, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    likelihood = log_likelihood(torch.stack([x, y], -1).reshape(-1, 2), torch.ones(points**2, dtype=torch.float64))
    tilted = likelihood + w * torch.log_softmax(likelihood, dim=1)
    return torch.softmax(tilted, dim=0).T.reshape(3, points, points)


def draw(strengths: list[float], count: int, steps: int) -> tuple[Figure, float]:
    """The figure, and the largest distance between two methods' samples from the same noise."""
    figure = Figure(figsize=(2.0 * len(strengths) + 0.4, 8.2), layout="constrained")
    axes = figure.subplots(4, len(strengths), squeeze=False, sharex=True, sharey=True)
    farthest = 0.0
    for column, w in zip(axes.T, strengths):
        column[0].set_title("w = 0: no guidance" if w == 0 else f"w = {w:g}")
        shades = LinearSegmentedColormap.from_list("shades", ["white", "black"])
        column[0].imshow(densities(w).sum(0), origin="lower", extent=(-REACH, REACH, -REACH, REACH), cmap=shades)
        results = samples(w, count, steps)
        for axis, x in zip(column[1:], results.values()):
            for color, cloud in zip(COLORS, x.split(count)):
                axis.plot(*cloud.T, ".", color=color, markersize=2, markeredgewidth=0)
        found = torch.stack(list(results.values()))
        farthest = max(farthest, float((found - found[0]).abs().max()))
    for axis, name in zip(axes[:, 0], ("p(x | c) p(c | x)$^w$\nsummed over c", *results)):
        axis.set_ylabel(name)
    for axis in axes.flat:
        axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], aspect="equal")
    return figure, farthest


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw three Gaussians under classifier and classifier-free guidance.")
    parser.add_argument("--out", type=Path, default=Path("gaussians.png"), help="the PNG to write")
    parser.add_argument("--samples", type=int, default=400, help="of each class, in every panel")
    parser.add_argument("--steps", type=int, default=50, help="of the solver, DPM-Solver++(2M)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0], help="w of each column")
    arguments = parser.parse_args()
    figure, farthest = draw(arguments.strengths, arguments.samples, arguments.steps)
    figure.savefig(arguments.out, dpi=80, format="png", metadata={"Software": None})
    print(f"{arguments.out}: the three samplers' results from the same noise differ by at most {farthest:.1e}")


if __name__ == "__main__":
    main()
