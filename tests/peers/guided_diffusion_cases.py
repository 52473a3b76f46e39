"""The runs of guided-diffusion that are stored, and what both sides run them with: models, a classifier, draws.

Everything is a smooth function of x [B, 3, 4, 4], t [B] and the labels y [B], evaluated in the dtype of x; its numbers
are written down, not drawn. u = t / 1000 stands for the noise: cos(pi u / 2) falls as alpha does, so that the models
predict clean samples of size 1 and the classifier's gradient vanishes at pure noise, as those of trained ones do.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

SHAPE = (2, 3, 4, 4)
CLASSES = 4
LABELS = (3, 1)
DRAWS = 250  # the longest run
Tensor = torch.Tensor


@dataclass(frozen=True)
class Case:
    """One run: flags of guided-diffusion by their names, and three things that are none.

    learned: the model's extra channels are log Sigma itself (ModelVarType.LEARNED, which no flag asks for). scale: of
    the classifier's gradient, None without cond_fn. seed: of the start and of the noises.
    """

    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    timestep_respacing: str = "25"
    learn_sigma: bool = False
    sigma_small: bool = False
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    use_ddim: bool = False
    clip_denoised: bool = True
    eta: float = 0.0
    learned: bool = False
    scale: float | None = 8.0
    seed: int = 0

    def flags(self) -> dict[str, Any]:
        """What create_gaussian_diffusion and ours take, besides the number of diffusion steps."""
        names = ("noise_schedule", "timestep_respacing", "learn_sigma", "sigma_small", "predict_xstart")
        return {name: getattr(self, name) for name in (*names, "rescale_timesteps")}

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(name: str, **values: Any) -> None:
        assert name not in cases
        cases[name] = Case(**values)

    kinds: dict[str, dict[str, Any]] = {
        "small": {"sigma_small": True},
        "large": {},
        "learned": {"learn_sigma": True, "learned": True},
        "range": {"learn_sigma": True},
    }
    respacings = ("25", "10,10,5", "50", "ddim25", "100", "30,20", "ddim50", "20,0,5")
    k = 0
    for clip in (True, False):
        end = "" if clip else "-unclipped"
        for schedule in ("linear", "cosine"):
            shared: dict[str, Any] = {"noise_schedule": schedule, "clip_denoised": clip}
            for kind, values in kinds.items():
                add(f"p-{kind}-{schedule}{end}", timestep_respacing=respacings[k % 8], **shared, **values)
                k += 1
            for eta in (0.0, 0.5, 1.0):
                respacing = respacings[k % 8]
                add(f"ddim-{eta:g}-{schedule}{end}", timestep_respacing=respacing, use_ddim=True, eta=eta, **shared)
                k += 1
    long: dict[str, Any] = {"timestep_respacing": "250"}
    add("p-range-linear-250", learn_sigma=True, **long)
    add("p-large-cosine-250", noise_schedule="cosine", clip_denoised=False, **long)
    add("ddim-0-linear-250", use_ddim=True, **long)
    add("ddim-1-cosine-250", noise_schedule="cosine", use_ddim=True, eta=1.0, **long)
    every: dict[str, Any] = {"diffusion_steps": 50, "timestep_respacing": ""}
    for schedule in ("linear", "cosine"):
        add(f"p-range-{schedule}-all", noise_schedule=schedule, learn_sigma=True, **every)
    for kind, values in kinds.items():
        add(f"p-{kind}-xstart", predict_xstart=True, clip_denoised=kind != "small", **values)
    add("ddim-0-xstart", predict_xstart=True, use_ddim=True, timestep_respacing="ddim25")
    add("ddim-0.5-xstart-unclipped", predict_xstart=True, use_ddim=True, clip_denoised=False, eta=0.5)
    for steps, respacing in ((4000, "50"), (1000, "25"), (100, "25")):
        rescaled: dict[str, Any] = {"diffusion_steps": steps, "rescale_timesteps": True}
        add(f"p-range-rescaled-{steps}", timestep_respacing=respacing, learn_sigma=True, **rescaled)
    add("ddim-0-rescaled-4000", diffusion_steps=4000, rescale_timesteps=True, use_ddim=True, noise_schedule="cosine")
    add("ddim-0-range", use_ddim=True, learn_sigma=True)  # its variance channels are not used
    add("p-two-steps", timestep_respacing="2", sigma_small=True)
    add("p-strong", scale=40.0, learn_sigma=True)
    add("ddim-0-strong", scale=40.0, use_ddim=True)
    for name in ("p-large-linear", "p-range-cosine", "ddim-0-linear", "ddim-1-cosine-unclipped"):
        add(f"{name}-unguided", **{**asdict(cases[name]), "scale": None})
    return cases


CASES = _cases()


def draws(seed: int) -> tuple[Tensor, Tensor]:
    """(the start [*], the normals [DRAWS, *] that the steps draw, in order), float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator), torch.randn((DRAWS, *SHAPE), generator=generator)


def waves(shape: tuple[int, ...], step: float, start: float, size: float) -> Tensor:
    """Numbers that are written down: size sin(step k + start), float64."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (size * torch.sin(step * k + start)).reshape(shape)


MIX, GATE, SPREAD = waves((3, 3), 1.7, 0.3, 0.7), waves((3, 3), 2.3, 0.9, 0.6), waves((3, 3), 1.1, 2.0, 0.8)
CLASS_BIAS = waves((CLASSES, 3), 2.9, 0.4, 0.5)
INNER, OUTER = waves((6, 48), 1.3, 0.2, 0.25), waves((CLASSES, 6), 2.1, 0.7, 3.0)


def level(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u = t / 1000 and the sine and cosine of pi u / 2, each [B, 1, 1, 1] in the dtype of x."""
    u = t.to(x.dtype).reshape(-1, 1, 1, 1) / 1000
    return u, torch.sin(u * (math.pi / 2)), torch.cos(u * (math.pi / 2))


def mixed(weights: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("dc,bchw->bdhw", weights.to(x.dtype), x)


class Model:
    """The model of a case, called as guided-diffusion calls one: epsilon or x0, and with learn_sigma log Sigma too.

    bend = tanh(M x + 0.5 x roll(x) + u + b_y)       epsilon = s x + 0.8 c bend,    x0 = 0.3 c x + 1.3 bend
    """

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        u, s, c = level(x, t)
        bias = CLASS_BIAS.to(x.dtype)[y][:, :, None, None]
        neighbours = x.roll(1, -1)
        bend = torch.tanh(mixed(MIX, x) + 0.5 * neighbours * torch.tanh(mixed(GATE, x)) + u + bias)
        out = 1.3 * bend + 0.3 * c * x if self.case.predict_xstart else s * x + 0.8 * c * bend
        if not self.case.learn_sigma:
            return out
        spread = torch.tanh(mixed(SPREAD, neighbours) - bias)
        return torch.cat([out, 1.5 * spread + 2 * u - 5 if self.case.learned else 1.2 * spread], dim=1)


def classifier(x: Tensor, t: Tensor) -> Tensor:
    """Logits [B, CLASSES] of x as far as it is not noise: A tanh(c B x + u)."""
    u, _, c = level(x, t)
    return torch.tanh((c * x).flatten(1) @ INNER.T.to(x.dtype) + u.flatten(1)) @ OUTER.T.to(x.dtype)


class Gradient:
    """cond_fn(x, t, y): scale times the gradient of log p(y | x); it opens enable_grad itself, as scripts do."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            picked = torch.log_softmax(classifier(leaf, t), dim=-1).gather(1, y[:, None])
            (gradient,) = torch.autograd.grad(picked.sum(), leaf)
        return gradient * self.scale


def gradient_of(case: Case) -> Gradient | None:
    return None if case.scale is None else Gradient(case.scale)


def labels() -> Tensor:
    return torch.tensor(LABELS)


def distance(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max(1, |b|), element by element; infinite where either is not finite."""
    a, b = a.double(), b.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max())
