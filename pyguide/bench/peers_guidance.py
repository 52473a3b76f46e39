"""Who is measured by the suite `guidance`: whole loops around a model, every method by pyguide and by its peers.

A contender is `run(model, noise, generator) -> samples` as in peers.py: DDIM, all K branches of the method in one call
model(x [K B, C, *], t) -> [K B, C, *], unconditional first. The peers are unmodified diffusers, PyTorch by hand, and
torch.compile of that.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

from .. import guidance
from ..backends import Backend
from ..compiler import compile as compiled_plan
from ..plan import Plan
from ..sampler import Sampler
from .cases import CASES, SCALE
from .extras import missing, require
from .peers import Network, Tensor

RESCALE, ETA, RADIUS, MOMENTUM, ALPHA, NEGATIVE = 0.7, 0.5, 15.0, -0.5, 1.0, 1.5
QUANTILE, LIMIT = 0.995, 10.0
SOLVER = CASES["ddim"]  # the scheduler of diffusers that takes the least time
Combined = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (step, timestep, uncond, cond) -> guided output
Stocks = Callable[[int], Combined]  # steps -> what combines the branches, in one run after another


@dataclass(frozen=True)
class Method:
    """One method.

    ours: pyguide's. lines: PyTorch's G from u, c, n [B, N], or [B, L, C] for the tokens, along the last dim; `average`
    is the array that it keeps, if `keeps`. stock: diffusers' own code, None where it has none; decomposes: it takes the
    singular values of [2, N] in float32.
    """

    name: str
    ours: Callable[[], Any]
    lines: tuple[str, ...]
    stock: Stocks | None = None
    branches: tuple[str, ...] = ("uncond", "cond")
    keeps: bool = False
    bounded: bool = False  # dynamic thresholding of the clean sample
    tokens: bool = False  # of [B, L, C], moments by token
    decomposes: bool = False
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, steps: int) -> Plan:
        return _plan(steps, self.bounded)

    @property
    def has_stock(self) -> bool:
        """Whether the installed diffusers has code of its own."""
        return self.stock is not None and missing("diffusers") is None and missing("diffusers.guiders") is None


@cache
def _plan(steps: int, apart: bool) -> Plan:
    """apart: the noise as the model gave it beside the bounded clean sample, as DDIMScheduler has it."""
    return compiled_plan(SOLVER.solver, SOLVER.path(steps), prediction=SOLVER.prediction, noise_apart=apart)


# ---- diffusers ------------------------------------------------------------------------------------------------------
def _pipeline(rescale: float) -> Stocks:
    """The lines of its pipelines, and the function that they call."""

    def made(steps: int) -> Combined:
        rescaled = importlib.import_module("diffusers.guiders.guider_utils").rescale_noise_cfg

        def combined(step: int, t: Tensor, uncond: Tensor, cond: Tensor) -> Tensor:
            noise_pred = uncond + SCALE * (cond - uncond)
            return rescaled(noise_pred, cond, guidance_rescale=rescale) if rescale > 0.0 else noise_pred

        return combined

    return made


def _guider(name: str, *, flat: bool = False, **config: Any) -> Stocks:
    """A guider, driven as its pipelines' loop does. flat: one that fails for images, which then are [B, C, H W]."""

    def made(steps: int) -> Combined:
        kind, log = getattr(importlib.import_module("diffusers.guiders"), name), logging.getLogger("diffusers")
        level = log.level
        log.setLevel(logging.ERROR)  # each says that it is experimental
        guider = kind(**config)
        log.setLevel(level)

        def combined(step: int, t: Tensor, uncond: Tensor, cond: Tensor) -> Tensor:
            shape = cond.shape
            if flat and len(shape) > 3:
                uncond, cond = uncond.flatten(2), cond.flatten(2)
            guider.set_state(step=step, num_inference_steps=steps, timestep=t)
            batches = guider.prepare_inputs({"branch": ("cond", "uncond")})
            for batch in batches:
                batch.noise_pred = cond if batch.branch == "cond" else uncond
            return guider(batches).pred.view(shape)

        return combined

    return made


def _qwen_image(steps: int) -> Combined:
    """Lines of QwenImagePipeline.__call__, which stand in no function of their own."""
    torch = require("torch")

    def combined(step: int, t: Tensor, neg_noise_pred: Tensor, noise_pred: Tensor) -> Tensor:
        comb_pred = neg_noise_pred + SCALE * (noise_pred - neg_noise_pred)
        cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
        noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
        return comb_pred * (cond_norm / noise_norm)

    return combined


# ---- the methods ----------------------------------------------------------------------------------------------------
def rescaled(m: Any) -> Any:
    """A user's function of the moments: CFG(SCALE, rescale=RESCALE)."""
    u, c = m["uncond"], m["cond"]
    guided = u + m.scale * (c - u)
    return guided * (RESCALE * (c.std() / guided.std()) + (1 - RESCALE))


_CFG = f"G = u + {SCALE} * (c - u)"
_RESCALED = (_CFG, f"G = G * ({RESCALE} * c.std(-1, keepdim=True) / G.std(-1, keepdim=True) + {1 - RESCALE})")
_SUM = ".sum(-1, keepdim=True)"
_LENGTHS = (_CFG, f"G = G * ((c * c){_SUM} / (G * G){_SUM}).sqrt()")
_THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": QUANTILE, "sample_max_value": LIMIT}
CFG, RESCALED, ZERO_STAR, PROJECTED = "CFG", "CFG rescale", "CFG-Zero*", "APG"
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(CFG, lambda: guidance.CFG(SCALE), (_CFG,), _pipeline(0.0)),
        Method(RESCALED, lambda: guidance.CFG(SCALE, rescale=RESCALE), _RESCALED, _pipeline(RESCALE)),
        Method(
            ZERO_STAR,
            lambda: guidance.CFGZeroStar(SCALE, zero_init_steps=0),  # steps whose output is zero have nothing to time
            (f"u = u * ((c * u){_SUM} / ((u * u){_SUM} + 1e-8))", _CFG),
            _guider("ClassifierFreeZeroStarGuidance", guidance_scale=SCALE, zero_init_steps=0),
        ),
        Method(
            PROJECTED,
            lambda: guidance.APG(SCALE, eta=ETA, norm_threshold=RADIUS, momentum=MOMENTUM),
            (
                f"d = c - u + {MOMENTUM} * average",
                "average.copy_(d)",
                f"f = ({RADIUS} / (d * d){_SUM}.sqrt()).clamp(max=1)",
                f"along = (d * c){_SUM} / (c * c){_SUM}",
                f"G = c + {SCALE - 1} * f * (d - {1 - ETA} * along * c)",
            ),
            _guider(
                "AdaptiveProjectedGuidance",
                guidance_scale=SCALE - 1,
                use_original_formulation=True,
                adaptive_projected_guidance_momentum=MOMENTUM,
                adaptive_projected_guidance_rescale=RADIUS,
                eta=ETA,
            ),
            keeps=True,
        ),
        Method(
            "tangential",
            lambda: guidance.TangentialCFG(SCALE),
            (
                f"across, half = (c * u){_SUM}, ((c - u) * (c + u)){_SUM} / 2",
                "r = (half * half + across * across).sqrt()",
                "u = across / (2 * r) * c + (0.5 - half / (2 * r)) * u",
                _CFG,
            ),
            _guider("TangentialClassifierFreeGuidance", guidance_scale=SCALE),
            decomposes=True,
        ),
        Method(
            "magnitude-aware",
            lambda: guidance.MagnitudeAwareCFG(SCALE, ALPHA),
            (
                "d = c - u",
                f"far = ((d * d){_SUM} / (u * u){_SUM}).sqrt()",
                f"G = u + (1 + {SCALE - 1} * torch.exp(-{ALPHA} * far)) * d",
            ),
            _guider("MagnitudeAwareGuidance", flat=True, guidance_scale=SCALE, alpha=ALPHA),
        ),
        Method("norm of a sample", lambda: guidance.NormPreservingCFG(SCALE), _LENGTHS),
        Method("norm of a token", lambda: guidance.NormPreservingCFG(SCALE, -1), _LENGTHS, _qwen_image, tokens=True),
        Method(
            "Perp-Neg",
            lambda: guidance.PerpNeg(SCALE, NEGATIVE),
            (
                "p, q = c - u, n - u",
                f"along = (q * p){_SUM} / (p * p){_SUM}",
                f"G = u + {SCALE} * (p - {NEGATIVE} * (q - along * p))",
            ),
            branches=("uncond", "cond", "negative"),
        ),
        Method(
            "thresholding",
            lambda: guidance.DynamicThresholding(guidance.CFG(SCALE), QUANTILE, 1.0, limit=LIMIT),
            (_CFG,),
            _pipeline(0.0),
            bounded=True,
            scheduler=_THRESHOLDING,
        ),
        Method(
            "custom",
            lambda: guidance.CustomGuidance(("uncond", "cond"), rescaled, scale=SCALE),
            _RESCALED,
            _pipeline(RESCALE),
        ),
    )
}


# ---- the contenders -------------------------------------------------------------------------------------------------
class Pyguide:
    """The Sampler, as any user calls it. plain: with CFG in place of the method, on the same plan."""

    def __init__(self, method: Method, steps: int, *, plain: bool = False, backend: Backend = "auto") -> None:
        self.plan, self.backend = method.plan(steps), backend
        self.guidance = guidance.CFG(SCALE) if plain else method.ours()
        self.conds: dict[str, Any] = {name: {} for name in (("uncond", "cond") if plain else method.branches)}

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor:
        return Sampler(model, self.plan, self.guidance, backend=self.backend)(noise, conds=self.conds)


class Stock:
    """The unmodified DDIMScheduler and the guidance of diffusers, in the loop of its pipelines."""

    def __init__(self, method: Method, steps: int) -> None:
        assert method.stock is not None
        self.combined, self.steps = method.stock(steps), steps
        kind = getattr(require("diffusers"), SOLVER.stock)
        self.scheduler = kind(**SOLVER.stock_options, **method.scheduler)

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor:
        torch, scheduler = require("torch"), self.scheduler
        scheduler.set_timesteps(self.steps, device=noise.device)
        latents = noise * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            uncond, cond = model(model_input, t).chunk(2)
            guided = self.combined(i, t, uncond, cond)
            latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        return latents


class Written:
    """Guidance and step as one function of PyTorch, in place, the next model input written by one broadcast copy.

    Its coefficients are computed beforehand: numbers, and for torch.compile (`backend`) one tensor a row, so that none
    recompiles. static: sizes are constants of the generated code, else symbols; the quantile, which is interpolated
    between two of the largest values (topk, faster than torch.quantile's sort), needs them as constants.
    """

    def __init__(self, method: Method, steps: int, *, backend: str | None = None, static: bool = False) -> None:
        self.method, self.backend, self.static = method, backend, static or method.bounded
        plan = method.plan(steps)
        rows = [SimpleNamespace(**row._asdict()) for row in plan.rows[1:]]
        if plan.slots != 1 or any(row.c_in != 1 for row in rows[:-1]):
            raise ValueError("plan: has terms that this function does not")
        if method.bounded:
            self.coefficients = [[r.a_x, r.a_g, r.T[0][0], r.d[0], r.e[0]] for r in rows]
        else:
            self.coefficients = [[r.T[0][0] + r.d[0] * r.a_x, r.d[0] * r.a_g + r.e[0]] for r in rows]
        self.timesteps = plan.timestep.tolist()

    def run(self, model: Network, noise: Tensor, generator: Any = None) -> Tensor:
        torch, method = require("torch"), self.method
        batch, K = len(noise), len(method.branches)
        sizes = tuple(noise.shape) if method.tokens else (batch, noise[0].numel())
        step = _function(_source(method, sizes[-1]), sizes if self.static else (len(sizes),), self.backend)
        x = noise.clone().view(sizes)
        given = x.expand(K, *sizes).contiguous()
        batched, kept = given.view(K * batch, *noise.shape[1:]), [torch.zeros_like(x)] * method.keeps
        column = torch.tensor(self.timesteps, dtype=torch.int64, device=noise.device)
        times = list(column[:, None].repeat(1, K * batch))
        rows = self.coefficients
        if self.backend is not None:
            rows = list(torch.tensor(rows, dtype=x.dtype, device=x.device))
        for k, t in zip(rows, times):
            step(k, x, model(batched, t).view(K, *sizes), given, *kept)
        return x.view(noise.shape)


def _source(method: Method, size: int) -> str:
    """The text of the function. size: N of a sample, which the quantile counts from."""
    names = ("u", "c", "n")[: len(method.branches)]
    kept = ", average" if method.keeps else ""
    lines = [f"def step(k, x, out, given{kept}):", f"{', '.join(names)} = out.unbind(0)", *method.lines]
    if method.bounded:
        at = QUANTILE * (size - 1)
        above = size - int(at)  # of the values not below the lower neighbour
        lines += [
            "D = k[0] * x + k[1] * G",
            f"top = D.abs().topk({above}, dim=-1).values",
            f"low, high = top[:, {above - 1} :], top[:, {max(above - 2, 0)} : {max(above - 1, 1)}]",
            f"b = (low + {at - int(at)} * (high - low)).clamp(1.0, {LIMIT})",
            "D = torch.maximum(torch.minimum(D, b), -b) / b",
            "x.copy_(k[2] * x + k[3] * D + k[4] * G)",
        ]
    else:
        lines.append("x.copy_(k[0] * x + k[1] * G)")
    return "\n    ".join([*lines, "given.copy_(x.expand_as(given))"]) + "\n"


_KNOWN: dict[tuple[str, tuple[int, ...], str | None], Any] = {}


def _function(source: str, sizes: tuple[int, ...], backend: str | None) -> Any:
    """The function of a text, by a backend of torch.compile. sizes: those that are constants, or their number alone."""
    key = (source, sizes if backend else (), backend)
    if key not in _KNOWN:
        torch = require("torch")
        scope: dict[str, Any] = {"torch": torch}
        # a code object of its own: the guards of one never make another one slower
        exec(compile(source, f"<guidance {len(_KNOWN)}>", "exec"), scope)
        step = scope["step"]
        if backend is not None:
            step = torch.compile(step, fullgraph=True, dynamic=len(sizes) == 1, backend=backend)
        _KNOWN[key] = step
    return _KNOWN[key]
