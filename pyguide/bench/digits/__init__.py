"""A small real model: guided diffusion of handwritten digits (8 x 8), in two predictions, with an independent judge.

`load` gives the network, `judge.evaluate` measures samples, `python -m pyguide.bench.digits.train` trains both again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from pyguide.extras import require

if TYPE_CHECKING:
    from pyguide.bench.digits.net import DigitsNet

Kind = Literal["epsilon", "velocity"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NULL = 10  # the label of the unconditional branch
SHAPE = (1, 8, 8)  # [C, H, W] of a sample, in [-1, 1]


def load(kind: Kind) -> DigitsNet:
    """The trained network of one prediction type: float32, in eval mode, on the CPU, without gradients.

    Args:
        kind: "epsilon" (cosine schedule, DDPM timesteps 0..999) or "velocity" (flow, timestep = 1000 sigma).

    Raises:
        ValueError: another kind, or a weights file that holds another one.
        ImportError: torch or safetensors is missing.
    """
    path = weights_path(kind)
    safetensors = require("safetensors")  # before torch: its extra brings both
    require("torch")
    from pyguide.bench.digits.net import DigitsNet

    with safetensors.safe_open(path, framework="pt") as file:
        stored = json.loads(file.metadata()["pyguide"])["prediction"]
        if stored != kind:
            raise ValueError(f"{path.name} holds a {stored} model, not {kind}")
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    net = DigitsNet(kind)
    net.load_state_dict(weights)
    net.eval().requires_grad_(False)
    return net


def weights_path(kind: Kind) -> Path:
    """Where the weights of `kind` lie beside this file."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return Path(__file__).with_name(f"{kind}.safetensors")
