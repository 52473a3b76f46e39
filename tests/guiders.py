"""The peers' code of guidance methods, unmodified, as functions of the branches, and whole runs with them.

A peer is `combined(step, *outputs) -> guided output`. The guiders of the installed diffusers are driven as its modular
pipelines drive them; statements that stand inside a pipeline's __call__ are compiled from its source as they are there
(`statements`). `PEERS` translate our options to theirs. A run is a plan around a network: pyguide's method chooses and
combines the branches on the one side, the peer's code makes a single branch's output of them on the other.

Casts to float32 in the peers' code (CFG-Zero*, tangential, Z-Image) are all calls of Tensor.float, which leaves float64
as it is while a peer runs, unless `casts=True`.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

import pyguide
from pyguide import schedules

Tensor = torch.Tensor
Combined = Callable[..., Tensor]
Interval = tuple[float, float]

STEPS, SHAPE = 20, (3, 4, 6, 5)
PATH = schedules.scaled_linear().path(STEPS, offset=1)
PLANS = {
    "ddim": pyguide.compile("ddim", PATH),
    "flow": pyguide.compile("dpmpp_2m", schedules.flow(3.0).path(STEPS), prediction="flow"),
}
VALUES = {"uncond": [0.1, 0.0, -0.2], "cond": [0.9, -0.7, 1.3], "negative": [-0.5, 0.8, 0.2]}
ALWAYS = (0.0, 1.0)


def noise(shape: Sequence[int] = SHAPE, seed: int = 0) -> Tensor:
    """In float64, of numbers that float32 has."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class Net:
    """A nonlinear function of x, its neighbours, the time and the condition, another one at every element; counts the
    rows that it is called for."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: Tensor, t: Tensor, value: Tensor) -> Tensor:
        self.rows += len(x)
        place = torch.arange(x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
        column = (-1, *[1] * (x.ndim - 1))
        y, time = value.to(x.dtype).reshape(column), (t.to(x.dtype) / 200).reshape(column)
        inside = 0.8 * x + 0.3 * x.roll(1, -1) * x.roll(1, 1).tanh() + y * torch.sin(0.7 * place)
        return torch.tanh(inside + torch.cos(time)) + 0.4 * y * torch.cos(1.1 * place + time)


def told(names: Sequence[str], values: Mapping[str, list[float]] = VALUES) -> dict[str, Any]:
    return {name: {"value": torch.tensor(values[name], dtype=torch.float64)} for name in names}


def ours(guidance: Any, plan: Any, start: Tensor, net: Any = None, backend: str = "reference") -> Tensor:
    """The run with a method of pyguide."""
    conds = told(getattr(guidance, "branches", ("uncond", "cond")))
    return pyguide.Sampler(net or Net(), plan, guidance, backend=backend)(start, conds=conds)


def theirs(
    combined: Combined,
    plan: Any,
    start: Tensor,
    names: Sequence[str] = ("uncond", "cond"),
    casts: bool = False,
    net: Any = None,
    values: Mapping[str, list[float]] = VALUES,
) -> Tensor:
    """The run with a peer's code as the only branch."""
    net, conds, steps = net or Net(), told(names, values), itertools.count()

    def guided(x: Tensor, t: Tensor) -> Tensor:
        outputs = [net(x, t, conds[name]["value"]) for name in names]
        with contextlib.nullcontext() if casts else lifted():
            return combined(next(steps), *outputs)

    return pyguide.Sampler(guided, plan, backend="reference")(start)


@contextlib.contextmanager
def lifted() -> Iterator[None]:
    """Tensor.float leaves float64 as it is."""
    narrow = torch.Tensor.float

    def kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if x.dtype == torch.float64 else narrow(x, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "float", kept):
        yield


# ---- code of the peers ----------------------------------------------------------------------------------------------
def guider(name: str, interval: Interval = ALWAYS, **config: Any) -> Combined:
    """A guider of diffusers, driven as a pipeline's loop does: set_state, prepare_inputs, the model, the call."""
    from diffusers import guiders

    made = getattr(guiders, name)(start=interval[0], stop=interval[1], **config)

    def combined(step: int, uncond: Tensor, cond: Tensor) -> Tensor:
        made.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(step))
        batches = made.prepare_inputs({"branch": ("cond", "uncond")})
        for batch in batches:
            batch.noise_pred = {"cond": cond, "uncond": uncond}[batch.branch]
        return made(batches).pred

    return combined


def statements(file: Path, first: str, count: int) -> CodeType:
    """`count` statements of a file from the only one on that begins with `first`, compiled as they stand there."""
    tree = ast.parse(file.read_text())
    found = [
        body[i : i + count]
        for node in ast.walk(tree)
        for body in (getattr(node, "body", None), getattr(node, "orelse", None))
        if isinstance(body, list)
        for i, statement in enumerate(body)
        if ast.unparse(statement).startswith(first)
    ]
    assert len(found) == 1, f"{first!r} begins {len(found)} statements of {file.name}"
    return compile(ast.Module(found[0], []), str(file), "exec")


def pipeline(name: str, first: str, count: int) -> CodeType:
    """Statements of a pipeline of the installed diffusers, without importing it."""
    import diffusers

    return statements(Path(diffusers.__file__).parent / "pipelines" / name, first, count)


def run_code(code: CodeType, **names: Any) -> dict[str, Any]:
    names["torch"] = torch
    exec(code, names)
    return names


# ---- peers by our options -------------------------------------------------------------------------------------------
def cfg(scale: float, rescale: float = 0.0, interval: Interval = ALWAYS) -> Combined:
    return guider("ClassifierFreeGuidance", interval, guidance_scale=scale, guidance_rescale=rescale)


def stable_diffusion(scale: float, rescale: float) -> Combined:
    """StableDiffusionPipeline: its lines, and the function rescale_noise_cfg that they call."""
    file = "stable_diffusion/pipeline_stable_diffusion.py"
    rescale_noise_cfg = run_code(pipeline(file, "def rescale_noise_cfg", 1))["rescale_noise_cfg"]
    code = pipeline(file, "if self.do_classifier_free_guidance:\n    noise_pred_uncond", 2)
    settings = SimpleNamespace(do_classifier_free_guidance=True, guidance_scale=scale, guidance_rescale=rescale)

    def combined(step: int, uncond: Tensor, cond: Tensor) -> Tensor:
        names = {"self": settings, "rescale_noise_cfg": rescale_noise_cfg}
        return run_code(code, noise_pred=torch.cat([uncond, cond]), **names)["noise_pred"]

    return combined


def apg(
    scale: float,
    eta: float = 1.0,
    norm_threshold: float = 0.0,
    momentum: float | None = None,
    norm_dim: Any = None,
    base: str = "cond",
    rescale: float = 0.0,
    interval: Interval = ALWAYS,
) -> Combined:
    """Its original formulation, c + w (...), has w = scale - 1; without a momentum it has no buffer."""
    return guider(
        "AdaptiveProjectedGuidance",
        interval,
        guidance_scale=scale - 1 if base == "cond" else scale,
        use_original_formulation=base == "cond",
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=norm_threshold,
        adaptive_projected_guidance_norm_dim=norm_dim,
        eta=eta,
        guidance_rescale=rescale,
    )


def zero_star(
    scale: float, zero_init_steps: int = 1, rescale: float = 0.0, interval: Interval = ALWAYS, original: bool = False
) -> Combined:
    return guider(
        "ClassifierFreeZeroStarGuidance",
        interval,
        guidance_scale=scale - original,
        zero_init_steps=zero_init_steps,
        guidance_rescale=rescale,
        use_original_formulation=original,
    )


def tangential(scale: float, rescale: float = 0.0, interval: Interval = ALWAYS, original: bool = False) -> Combined:
    return guider(
        "TangentialClassifierFreeGuidance",
        interval,
        guidance_scale=scale - original,
        guidance_rescale=rescale,
        use_original_formulation=original,
    )


def magnitude_aware(
    scale: float, alpha: float = 8.0, rescale: float = 0.0, interval: Interval = ALWAYS, original: bool = False
) -> Combined:
    return guider(
        "MagnitudeAwareGuidance",
        interval,
        guidance_scale=scale - original,
        alpha=alpha,
        guidance_rescale=rescale,
        use_original_formulation=original,
    )


def qwen_image(scale: float, dim: int) -> Combined:
    """QwenImagePipeline's true CFG: latents are [B, tokens, channels], and norms are those of tokens."""
    assert dim == -1
    code = pipeline("qwenimage/pipeline_qwenimage.py", "comb_pred = neg_noise_pred + ", 4)

    def combined(step: int, uncond: Tensor, cond: Tensor) -> Tensor:
        return run_code(code, noise_pred=cond, neg_noise_pred=uncond, true_cfg_scale=scale)["noise_pred"]

    return combined


def lumina2(scale: float, dim: int) -> Combined:
    """Lumina2Pipeline's cfg_normalization: latents are [B, C, H, W], and norms are over the last axis all the same."""
    assert dim == -1
    code = pipeline("lumina2/pipeline_lumina2.py", "noise_pred = noise_pred_uncond + guidance_scale", 2)

    def combined(step: int, uncond: Tensor, cond: Tensor) -> Tensor:
        names = {"noise_pred_cond": cond, "noise_pred_uncond": uncond, "guidance_scale": scale}
        return run_code(code, cfg_normalization=True, **names)["noise_pred"]

    return combined


def z_image(scale: float, limit: float) -> Combined:
    """ZImagePipeline's cfg_normalization, sample by sample; its guidance_scale is w = scale - 1."""
    code = pipeline("z_image/pipeline_z_image.py", "for j in range(actual_batch_size):\n    pos", 1)

    def combined(step: int, uncond: Tensor, cond: Tensor) -> Tensor:
        names = {"pos_out": list(cond), "neg_out": list(uncond), "current_guidance_scale": scale - 1}
        settings = SimpleNamespace(_cfg_normalization=limit)
        out = run_code(code, self=settings, actual_batch_size=len(cond), noise_pred=[], **names)
        return torch.stack(out["noise_pred"])

    return combined
