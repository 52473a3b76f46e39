"""What the tests of classifier guidance share: a classifier and a model in any dtype, and the gradient as torch has
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import pyguide
from pyguide import schedules

CLASSES = 5
SHAPE = (2, 3, 3)  # [C, H, W]
PIXELS = 18
STEPS = 6
LABELS = torch.tensor([1, 4, 0])
COND = {"labels": LABELS}


class Classifier(torch.nn.Module):
    """Logits of a noisy x and its time: smooth, and different for every class, pixel and time."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(torch.randn(PIXELS, 12, generator=generator, dtype=torch.float64) / 4)
        self.last = torch.nn.Parameter(torch.randn(12, CLASSES, generator=generator, dtype=torch.float64))
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Any, t: Any) -> Any:
        self.calls.append(tuple(x.shape))
        hidden = torch.tanh(x.flatten(1) @ self.first.to(x.dtype) + torch.sin(t.to(x.dtype) / 300)[:, None])
        return hidden @ self.last.to(x.dtype)


def model(x: Any, t: Any, labels: Any = None) -> Any:
    """A prediction of unit size that depends on x, the time and the label."""
    shift = 0.0 if labels is None else (labels.to(x.dtype) - 2)[:, None, None, None] / 5
    return torch.tanh(x * 0.7 + shift + torch.cos(t.to(x.dtype) / 200)[:, None, None, None])


def log_prob_grad(classifier: Callable[..., Any], x: Any, t: Any, labels: Any) -> Any:
    """grad of log p(labels | x) by torch alone."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        chosen = torch.log_softmax(classifier(leaf, t), -1)[range(len(leaf)), labels]
        return torch.autograd.grad(chosen.sum(), leaf)[0]


def noise(batch: int, dtype: Any = torch.float64, seed: int = 3) -> Any:
    return torch.randn((batch, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plan_of(solver: str = "ddim", **options: Any) -> Any:
    return pyguide.compile(solver, schedules.linear().path(STEPS, offset=1), **options)


def run(guidance: Any, backend: str = "reference", *, start: Any = None, cond: Any = COND, **settings: Any) -> Any:
    call = {name: settings.pop(name) for name in ("uncond", "conds", "seeds", "noises", "callback") if name in settings}
    sampler = pyguide.Sampler(
        settings.pop("net", model), settings.pop("plan", plan_of()), guidance, backend=backend, **settings
    )
    return sampler(noise(3) if start is None else start, cond=cond, **call)


def close(a: Any, b: Any) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-10, atol=1e-10))
