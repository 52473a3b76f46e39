"""The stored runs of diffusers' schedulers, and pyguide on their grids from their numbers; diffusers is not needed.

distance is max |a - b| / max |b|. For every case, on the peer's own grid, its timesteps and sigmas as numbers:

    float32   |pyguide - peer| <= max(1e-5, 1.5 |peer - peer in float64|), the latter the largest of four starts
    float64   |pyguide - peer| <= 1e-9, for the compiled plan and for the solver run with tensors: the same formulas
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyguide

from .common import distance
from .diffusers_cases import Case
from .diffusers_ours import F32, F64, Ours, Run

FILE = Path(__file__).with_name("diffusers.npz")
EXACT, CLOSE = 1e-9, 1e-5


class Stored(Ours):
    """A stored run, and the comparison with it as a verdict on any plan."""

    def __init__(self, name: str) -> None:
        file, index = contents(), list(CASES).index(name)
        parts = ("told", "sigmas", "inner")
        before, own = file["lengths"][:index].sum(axis=0), file["lengths"][index]
        told, sigmas, inner = (file[key][a : a + n] for key, a, n in zip(parts, before, own))
        k, ends = int(file["table"][index]), np.append(0, file["table_lengths"].cumsum())
        table = None if k < 0 else file["tables"][ends[k] : ends[k + 1]]
        self.peer = {dtype: torch.from_numpy(file[str(dtype)[6:]][index]) for dtype in (F32, F64)}
        self.bound = {F32: max(CLOSE, 1.5 * float(file["rounding"][index])), F64: EXACT}
        super().__init__(CASES[name], Run(self.peer[F64], told, sigmas, inner, float(file["scale"][index]), table))

    @property
    def normals(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        start, later = (torch.from_numpy(contents()[name]) for name in ("start", "noises"))
        return start[0], start[1], later

    def agrees(self, plan: pyguide.Plan, dtype: Any) -> bool:
        return distance(self.sample(plan, dtype), self.peer[dtype]) <= self.bound[dtype]


@cache
def contents() -> dict[str, Any]:
    with np.load(FILE) as file:
        return dict(file)


META: dict[str, Any] = json.loads(str(contents()["meta"]))
CASES = {name: Case(**values) for name, values in META["cases"].items()}
stored = cache(Stored)
