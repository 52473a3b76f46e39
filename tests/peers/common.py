"""What the parity tests and the scripts that store vectors share: a network, a distance, mutated plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyguide.launch import place_samples
from pyguide.layout import TIMESTEP, weights_width
from pyguide.ops import step
from pyguide.plan import Plan

SHAPE = (2, 3, 4, 4)
SEED = 7  # of the noise that stochastic samplers add


def draw(seed: int) -> torch.Tensor:
    """The first normals of a torch generator: seed 1 is the initial noise, 2 the image of image-to-image."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class Network:
    """m = W1 tanh(W0 x + neighbours + b + sin(t time_scale f)) + 0.6 x: smooth, nonlinear, mixing channels and pixels.

    x [B, 3, H, W], t a number or [B]. Its numbers are written down, not drawn: the same network under every torch.
    """

    def __init__(self, time_scale: float) -> None:
        k = torch.arange(12, dtype=torch.float64)
        self.inner = torch.sin(1.7 * k + 0.3).reshape(4, 3) * 0.6
        self.outer = torch.cos(2.3 * k + 0.9).reshape(3, 4) * 0.5
        self.bias = torch.sin(torch.arange(4, dtype=torch.float64) + 0.5)
        self.frequency = torch.tensor([1.0, 0.6, 1.9, 0.35], dtype=torch.float64) * time_scale

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        inner, outer, bias, frequency = (w.to(x.dtype) for w in (self.inner, self.outer, self.bias, self.frequency))
        time = torch.as_tensor(t).to(x.dtype).reshape(-1, 1) * frequency
        hidden = torch.einsum("dc,bchw->bdhw", inner, x + 0.3 * x.roll(1, -1) * x.roll(1, -2).tanh())
        return (
            torch.einsum("cd,bdhw->bchw", outer, torch.tanh(hidden + (bias + time.sin())[:, :, None, None])) + 0.6 * x
        )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|, in float64; infinite where either is not finite, so that no comparison passes on NaN."""
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return float((a - b).abs().max() / b.abs().max())


def mutations(
    plan: Plan, count: int, reached: AbstractSet[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Tables that differ from the plan's in one coefficient, multiplied by 1.001: `count`, or all if they are fewer.

    reached: (row, 2) and (row, 3) where some element of D lies on the lower and on the upper bound of the clip. Left
    out is what provably cannot change the result: zeros; a_x and a_g of a row that does not use D; a bound that no
    element reaches; c_in and timestep of the last row, which makes no model input (they are zero).
    """
    M = plan.slots
    names = ["a_x", "a_g", "clip_lo", "clip_hi", "c_in", "timestep", "var_lo", "var_hi"]
    names += [f"T{r}{c}" for r in range(M) for c in range(M)] + [f"{name}{r}" for name in "denq" for r in range(M)]
    places = []
    for i, row in enumerate(plan.table):
        uses_denoised = row[8 + M * M : 8 + M * M + M].any()
        for j in np.flatnonzero((row != 0) & np.isfinite(row)).tolist():
            if (j < 2 and not uses_denoised) or (j in (2, 3) and (i, j) not in reached):
                continue
            places.append((i, j))
    chosen = np.random.default_rng(0).permutation(len(places))[:count]
    for i, j in (places[k] for k in sorted(chosen.tolist())):
        table = plan.table.copy()
        table[i, j] *= 1 + 1e-3
        yield f"{names[j]} of row {i}", table


def mutants(plan: Plan, count: int, reached: AbstractSet[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, Plan]]:
    """`mutations` as plans; a sampler takes its timesteps from `plan.timestep`, so that they are mutated there too."""
    for label, table in mutations(plan, count, reached):
        yield label, replace(plan, table=table, timestep=table[:-1, TIMESTEP])


def results(plan: Plan, tables: Sequence[Any], network: Any, start: torch.Tensor, noises: Any) -> torch.Tensor:
    """What each of the tables, variants of the plan's, makes of `start` [B, C, *]: [n, B, C, *], in float64.

    All at once: the kernel runs every sample at its own row of its own table. noises: one for each noisy row.
    """
    copies, M, rows = len(tables) * len(start), plan.slots, plan.evaluations + 1
    state = torch.full((M, copies, *start.shape[1:]), math.nan, dtype=torch.float64)
    state[0] = start.repeat(len(tables), 1, 1, 1)
    inputs, times = torch.empty_like(state[0]), torch.empty(copies, dtype=torch.float64)
    placed = place_samples(copies, rows, M, None, 0)
    placed["table"] = np.repeat(np.arange(len(tables)), len(start)) * plan.table.size
    samples = torch.from_numpy(placed.view(np.int64).reshape(copies, -1))
    weights = torch.zeros(rows, weights_width(1, M, 0), dtype=torch.float64)
    weights[:, 0] = 1.0
    table, here = torch.from_numpy(np.stack(tables)), torch.arange(copies, dtype=torch.int32)[:, None]
    drawn = dict(zip(plan.stochastic_rows, noises or (), strict=True))
    outputs: list[torch.Tensor] = []
    for i in range(rows):
        z = drawn[i].repeat(len(tables), 1, 1, 1) if i in drawn else None
        target = here if i < plan.evaluations else torch.full_like(here, -1)
        step(state, [inputs], [times], samples, outputs, table, weights.flatten(), here, target, noise=z)
        outputs = [network(inputs, times)] if i < plan.evaluations else []
    return state[0].reshape(len(tables), *start.shape)
