"""The stored runs with Perp-Neg's code; see make_perp_neg.py for what the file holds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE = Path(__file__).with_name("perp_neg.npz")
CASES = {"usual": (7.5, 1.0), "strong": (4.0, 2.5), "weak": (9.0, 0.25), "scale-1": (1.0, 1.5)}  # scale, negative scale


@cache
def contents() -> dict[str, Any]:
    with np.load(FILE) as file:
        return dict(file)


def stored(name: str) -> tuple[torch.Tensor, tuple[float, float], torch.Tensor]:
    """(the start, (scale, negative scale), the result) in float64."""
    file = contents()
    cases = json.loads(str(file["meta"]))["cases"]
    assert {key: tuple(value) for key, value in cases.items()} == CASES, "run make_perp_neg.py again"
    result = file["float64"][list(CASES).index(name)]
    return torch.from_numpy(file["start"]), CASES[name], torch.from_numpy(result)
