"""What the parity tests and the scripts that store vectors share: a network, a distance, mutated plans."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np
import torch

from pyguide.plan import Plan


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


def mutants(plan: Plan, count: int, reached: AbstractSet[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, Plan]]:
    """Plans that differ from `plan` in one coefficient, multiplied by 1.001: `count` of them, or all if they are fewer.

    reached: (row, 2) and (row, 3) where some element of D lies on the lower and on the upper bound of the clip. Left
    out is what provably cannot change the result: zeros; a_x and a_g of a row that does not use D; a bound that no
    element reaches; c_in and timestep of the last row, which makes no model input (they are zero). The timestep is
    mutated in `plan.timestep`, where a sampler takes it from.
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
        table, timestep = plan.table.copy(), plan.timestep.copy()
        table[i, j] *= 1 + 1e-3
        if names[j] == "timestep":
            timestep[i] *= 1 + 1e-3
        yield f"{names[j]} of row {i}", replace(plan, table=table, timestep=timestep)
