"""The stored runs of guided-diffusion's loops; see make_guided_diffusion.py for what the file holds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .guided_diffusion_cases import Case, Tensor

FILE = Path(__file__).with_name("guided_diffusion.npz")


@cache
def contents() -> dict[str, Any]:
    with np.load(FILE) as file:
        return dict(file)


META: dict[str, Any] = json.loads(str(contents()["meta"]))
CASES = {name: Case(**values) for name, values in META["cases"].items()}


def place(name: str) -> int:
    return list(CASES).index(name)


def result(name: str, dtype: torch.dtype) -> Tensor:
    """What the code returned: as it is in float32, with its casts lifted in float64."""
    return torch.from_numpy(contents()[str(dtype).removeprefix("torch.")][place(name)])


def told(name: str) -> Any:
    """[evaluations] float64: the timesteps that the model and the classifier were told."""
    lengths = contents()["told_lengths"]
    begin = lengths[: place(name)].sum()
    return contents()["told"][begin : begin + lengths[place(name)]]


def recorded(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the start, the normals that steps drew, in order), the same of every run."""
    start, noises = (torch.from_numpy(contents()[name]).to(dtype) for name in ("start", "noises"))
    return start, noises
