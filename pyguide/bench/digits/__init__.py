"""A small real model: guided diffusion of handwritten digits (8 x 8), in two predictions, with an independent judge.

`load` gives the denoiser, `load_classifier` the classifier that can guide it, `load_upsampler` the second stage (16 x
16), `judge.evaluate` measures samples; `python -m pyguide.bench.digits.train` trains them all again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pyguide.extras import require

if TYPE_CHECKING:
    from pyguide.bench.digits.classifier import DigitsClassifier
    from pyguide.bench.digits.net import DigitsNet
    from pyguide.bench.digits.upsampler import Upsampler

Kind = Literal["epsilon", "velocity"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Name = Literal["epsilon", "velocity", "classifier", "upsampler"]
NAMES: tuple[Name, ...] = get_args(Name)  # of the files
NULL = 10  # the label of the unconditional branch
SHAPE = (1, 8, 8)  # [C, H, W] of a sample, in [-1, 1]
LARGE = (1, 16, 16)  # of the second stage

Net = TypeVar("Net")


def load(kind: Kind) -> DigitsNet:
    """The trained network of one prediction type: float32, in eval mode, on the CPU, without gradients.

    Args:
        kind: "epsilon" (cosine schedule, DDPM timesteps 0..999) or "velocity" (flow, timestep = 1000 sigma).

    Raises:
        ValueError: another kind, or a weights file that holds another one.
        ImportError: torch or safetensors is missing.
    """
    weights = _weights(_checked(kind))
    from pyguide.bench.digits.net import DigitsNet

    return _ready(DigitsNet(kind), weights)


def load_classifier(kind: Kind) -> DigitsClassifier:
    """The noise-aware classifier for the denoiser of that kind: classifier(x [B, 1, 8, 8], t [B]) -> logits [B, 10].

    One set of weights for both kinds. As `load` in everything else.
    """
    _checked(kind)
    weights = _weights("classifier")
    from pyguide.bench.digits.classifier import DigitsClassifier

    return _ready(DigitsClassifier(kind), weights)


def load_upsampler() -> Upsampler:
    """The second stage: net(x [B, 1, 16, 16], t [B], low_res [B, 1, 8, 8]) -> epsilon, on the cosine schedule.

    As `load` in everything else.
    """
    weights = _weights("upsampler")
    from pyguide.bench.digits.upsampler import Upsampler

    return _ready(Upsampler(), weights)


def weights_path(name: Name) -> Path:
    """Where the weights of a model lie beside this file."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    return Path(__file__).with_name(f"{name}.safetensors")


def _checked(kind: Kind) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def _weights(name: Name) -> dict[str, Any]:
    path = weights_path(name)
    safetensors = require("safetensors")  # before torch: its extra brings both
    require("torch")
    with safetensors.safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["pyguide"])
        stored = facts.get("model", facts.get("prediction"))  # the denoisers' files say what they predict
        if stored != name:
            raise ValueError(f"{path.name} holds a {stored} model, not {name}")
        return {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a mapping)


def _ready(net: Net, weights: dict[str, Any]) -> Net:
    module: Any = net
    module.load_state_dict(weights)
    module.eval().requires_grad_(False)
    return net
