"""Whole runs of methods that need moments through the Triton kernels, against their equations run with arrays."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from guidance_methods import METHODS, Net, conds, start

import pyguide
from pyguide import DynamicThresholding, Sampler, schedules

PLAN = pyguide.compile("dpmpp_2m", schedules.scaled_linear().path(3, offset=1))
QUICK = ("apg tokens", "interval")
CASES = {
    **METHODS,
    "thresholded": DynamicThresholding(METHODS["apg"], 0.9),
    "thresholded tokens": DynamicThresholding(METHODS["apg tokens"], 0.9),
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_run_gives_what_the_equation_gives(name: str) -> None:
    guidance, x = CASES[name], start(2, 2, 4, 6)
    inner: Any = getattr(guidance, "guidance", guidance)
    results = [
        Sampler(Net(), PLAN, guidance, backend=backend)(x, conds=conds(inner, 2)) for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
