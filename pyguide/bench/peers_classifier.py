"""Who is measured by the suite `classifier`: whole loops around a model and a classifier, all of the same samples.

A contender is run(model, classifier, noise, generator) -> samples: model(x, t) -> [B, C, *], or [B, 2 C, *] with a
learned variance; classifier(x, t) -> logits [B, CLASSES], differentiable. Everyone differentiates it by torch's
autograd; they differ in what seeds its backward pass and in what becomes of the gradient.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..backends import Backend
from ..guidance import ClassifierGuidance
from ..guidance.classifier import Form
from ..guidance.forms import guide
from ..integrations.guided_diffusion import Diffusion
from ..plan import Plan
from ..sampler import Sampler
from .extras import require

Tensor = Any
Network = Callable[[Any, Any], Tensor]

CLASSES = 1000
SCALE = 2.0
FILE = Path("guided_diffusion") / "gaussian_diffusion.py"  # what a checkout of openai/guided-diffusion has


@dataclass(frozen=True)
class Case:
    """One sampler with the flags of guided-diffusion: the linear schedule, clipped, epsilon."""

    name: str
    use_ddim: bool = False
    learn_sigma: bool = False

    @property
    def form(self) -> Form:
        return "score" if self.use_ddim else "mean"

    def plan(self, steps: int) -> Plan:
        diffusion = Diffusion(timestep_respacing=str(steps), learn_sigma=self.learn_sigma)
        return diffusion.plan(use_ddim=self.use_ddim)


CASES = {
    case.name: case
    for case in (Case("ddpm"), Case("ddpm learned_range", learn_sigma=True), Case("ddim", use_ddim=True))
}


class Contender(Protocol):
    """A sampling loop, with everything that does not depend on the data prepared."""

    def run(self, model: Network, classifier: Network, noise: Tensor, generator: Any = None) -> Tensor: ...


def labels(noise: Tensor) -> Tensor:
    """A class for each sample, [B]."""
    return require("torch").arange(len(noise), device=noise.device) * 37 % CLASSES


def differentiate(classifier: Network, x: Tensor, t: Tensor, seed: Callable[[Tensor], Tensor]) -> Tensor:
    """What nobody can do without: the forward pass, its seed from the logits, the backward pass."""
    torch = require("torch")
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        logits = classifier(leaf, t)
    return torch.autograd.grad(logits, leaf, seed(logits.detach()))[0]


class Pyguide:
    """The Sampler, as any user calls it."""

    def __init__(self, case: Case, steps: int, backend: Backend = "auto") -> None:
        self.plan, self.form, self.backend = case.plan(steps), case.form, backend

    def run(self, model: Network, classifier: Network, noise: Tensor, generator: Any = None) -> Tensor:
        seeds = 0 if generator is None and self.plan.stochastic_rows else None
        guidance = ClassifierGuidance(classifier, SCALE, form=self.form)
        sampler = Sampler(model, self.plan, guidance, backend=self.backend)
        return sampler(noise, cond={"labels": labels(noise)}, seeds=seeds, generator=generator)


class Stock:
    """The loops of openai/guided-diffusion, unmodified, with the cond_fn of its scripts/classifier_sample.py."""

    def __init__(self, case: Case, steps: int, checkout: Path) -> None:
        stock, respace = (_stock(checkout, name) for name in ("gaussian_diffusion", "respace"))
        kinds = stock.ModelVarType
        self.diffusion = respace.SpacedDiffusion(
            use_timesteps=respace.space_timesteps(1000, str(steps)),
            betas=stock.get_named_beta_schedule("linear", 1000),
            model_mean_type=stock.ModelMeanType.EPSILON,
            model_var_type=kinds.LEARNED_RANGE if case.learn_sigma else kinds.FIXED_LARGE,
            loss_type=stock.LossType.MSE,
        )
        self.loop = self.diffusion.ddim_sample_loop if case.use_ddim else self.diffusion.p_sample_loop

    def run(self, model: Network, classifier: Network, noise: Tensor, generator: Any = None) -> Tensor:
        th: Any = require("torch")
        F = th.nn.functional

        def cond_fn(x: Tensor, t: Tensor, y: Tensor = None) -> Tensor:
            assert y is not None
            with th.enable_grad():
                x_in = x.detach().requires_grad_(True)
                logits = classifier(x_in, t)
                log_probs = F.log_softmax(logits, dim=-1)
                selected = log_probs[range(len(logits)), y.view(-1)]
                return th.autograd.grad(selected.sum(), x_in)[0] * SCALE

        def model_fn(x: Tensor, t: Tensor, y: Tensor = None) -> Tensor:
            assert y is not None
            return model(x, t)

        with th.random.fork_rng(devices=[]):  # it draws from the global generator
            if generator is not None:
                th.set_rng_state(generator.get_state())
            return self.loop(
                model_fn,
                tuple(noise.shape),
                noise=noise,
                clip_denoised=True,
                model_kwargs={"y": labels(noise)},
                cond_fn=cond_fn,
                device=noise.device,
            )


def _stock(checkout: Path, name: str) -> Any:
    """A module of the checkout."""
    sys.path.insert(0, str(checkout.absolute()))
    try:
        return importlib.import_module(f"{FILE.parent}.{name}")
    finally:
        sys.path.pop(0)


def not_there(checkout: Path) -> str | None:
    """Why a folder is no checkout of guided-diffusion, None if it is one."""
    if (checkout / FILE).is_file():
        return None
    return f"expected a checkout of openai/guided-diffusion, and there is no {checkout / FILE}"


class Program:
    """The guided plan for the PyTorch contenders, in the fewest operations that its rows have:

        D = clip(a_x x + a_g out)        x' = T x + d D + q S g + n sqrt(S) z

    with S = exp(var_lo + (var_hi - var_lo) (v + 1) / 2) for a learned variance v, else 1. (ddim with the re-derived
    noise estimate and the score form is of this kind too: its q is one number a row.)
    """

    def __init__(self, case: Case, steps: int) -> None:
        plan = case.plan(steps)
        plan = guide(plan, case.form, np.ones(plan.evaluations, bool)).plan
        self.rows, self.learned, self.timesteps = plan.rows[1:], plan.learned_variance, plan.timestep.tolist()
        self.noisy = any(row.n[0] for row in self.rows)
        if plan.slots != 1 or any(row.e[0] for row in self.rows):
            raise ValueError(f"solver: {case.name} has terms that this program does not")

    def times(self, noise: Tensor) -> list[Tensor]:
        """The timestep of each evaluation, [B], on the device of the noise."""
        torch = require("torch")
        column = torch.tensor(self.timesteps, dtype=torch.int64, device=noise.device)
        return list(column[:, None].repeat(1, len(noise)))


class Eager:
    """PyTorch by hand: every operation in place or into a buffer, the seed by softmax and scatter."""

    def __init__(self, case: Case, steps: int) -> None:
        self.program = Program(case, steps)

    def run(self, model: Network, classifier: Network, noise: Tensor, generator: Any = None) -> Tensor:
        torch, learned, C = require("torch"), self.program.learned, noise.shape[1]
        x, y = noise.clone(), labels(noise)[:, None]
        D, S, z = (torch.empty_like(x) for _ in range(3))
        scale = torch.full_like(y, SCALE, dtype=x.dtype)

        def seed(logits: Tensor) -> Tensor:
            return torch.softmax(logits, -1).mul_(-SCALE).scatter_add_(1, y, scale)

        with torch.no_grad():
            for row, t in zip(self.program.rows, self.program.times(noise)):
                out = model(x, t)
                g = differentiate(classifier, x, t, seed)
                q, n = row.q[0], row.n[0]
                epsilon = out[:, :C] if learned else out
                torch.mul(x, row.a_x, out=D).add_(epsilon, alpha=row.a_g).clamp_(row.clip_lo, row.clip_hi)
                x.mul_(row.T[0][0]).add_(D, alpha=row.d[0])
                if learned:
                    half = 0.5 * (row.var_hi - row.var_lo)
                    torch.mul(out[:, C:], half, out=S).add_(row.var_lo + half).exp_()
                    x.addcmul_(S, g, value=q)
                    if n:
                        x.addcmul_(S.sqrt_(), z.normal_(generator=generator), value=n)
                else:
                    x.add_(g, alpha=q)
                    if n:
                        x.add_(z.normal_(generator=generator), alpha=n)
        return x


class Compiled:
    """torch.compile of everything that is not the models: one function for the seed, between the classifier's forward
    and its backward pass, and one for the step, in place. Its coefficients are a tensor a row, so that none recompiles.

    static: sizes are constants of the generated code, else symbols. The noise is drawn before the step, by normal_:
    inductor's own numbers, drawn in the step, took it five times as long (torch 2.13).
    """

    def __init__(self, case: Case, steps: int, *, static: bool = False, backend: str = "inductor") -> None:
        self.program, self.static, self.backend = Program(case, steps), static, backend
        self.coefficients = [require("torch").tensor(_coefficients(self.program, row)) for row in self.program.rows]

    def run(self, model: Network, classifier: Network, noise: Tensor, generator: Any = None) -> Tensor:
        torch, program = require("torch"), self.program
        sizes = tuple(noise.shape) if self.static else ()
        step = _function(_source(program), sizes, self.backend)
        seeding = _function(_SEED, sizes[:1], self.backend)
        coefficients = [k.to(noise.device) for k in self.coefficients]
        x, y = noise.clone(), labels(noise)[:, None]
        flat = x.view(len(x), -1)
        z = (torch.empty_like(flat),) if program.noisy else ()
        classes, scale = torch.arange(CLASSES, device=x.device), torch.tensor(SCALE, device=x.device)

        def seed(logits: Tensor) -> Tensor:
            return seeding(logits, y, classes, scale)

        with torch.no_grad():
            for k, t in zip(coefficients, program.times(noise)):
                out = model(x, t)
                g = differentiate(classifier, x, t, seed)
                for normal in z:
                    normal.normal_(generator=generator)
                step(k, flat, out.view(len(x), -1), g.view(len(x), -1), *z)
        return x


class Alone:
    """Nobody's work: the model, and the classifier with its backward pass from a seed that lies ready."""

    def __init__(self, case: Case, steps: int) -> None:
        self.program = Program(case, steps)

    def run(self, model: Network, classifier: Network, noise: Tensor, generator: Any = None) -> Tensor:
        torch = require("torch")
        ready = torch.ones((len(noise), CLASSES), device=noise.device)
        with torch.no_grad():
            for t in self.program.times(noise):
                model(noise, t)
                differentiate(classifier, noise, t, lambda logits: ready)
        return noise


_SEED = """def seed(logits, labels, classes, scale):
    return scale * ((classes == labels).to(logits.dtype) - torch.softmax(logits, -1))
"""


def _source(program: Program) -> str:
    """The text of the step, its coefficients k in the order of `_coefficients`."""
    lines = ["def step(k, x, out, g, z):" if program.noisy else "def step(k, x, out, g):"]
    epsilon, gradient, noise = "out", "k[4] * g", "k[5] * z"
    if program.learned:
        lines += ["    epsilon, v = out.chunk(2, 1)", "    S = torch.exp(k[6] + k[7] * v)"]
        epsilon, gradient, noise = "epsilon", "k[4] * S * g", "k[5] * torch.sqrt(S) * z"
    lines.append(f"    D = (k[0] * x + k[1] * {epsilon}).clamp(-1, 1)")
    lines.append(f"    x.copy_(k[2] * x + k[3] * D + {gradient}" + (f" + {noise})" if program.noisy else ")"))
    return "\n".join(lines) + "\n"


def _coefficients(program: Program, row: Any) -> list[float]:
    half = 0.5 * (row.var_hi - row.var_lo)
    own = [row.a_x, row.a_g, row.T[0][0], row.d[0], row.q[0], row.n[0]]
    return own + [row.var_lo + half, half] * program.learned


_KNOWN: dict[tuple[str, tuple[int, ...], str], Any] = {}


def _function(source: str, sizes: tuple[int, ...], backend: str) -> Any:
    """The compiled function of a text; sizes: those that are constants, if any."""
    key = (source, sizes, backend)
    if key not in _KNOWN:
        torch = require("torch")
        scope: dict[str, Any] = {"torch": torch}
        # a code object of its own: the guards of one never make another one slower
        exec(compile(source, f"<classifier guidance {len(_KNOWN)}>", "exec"), scope)
        (function,) = (value for name, value in scope.items() if name in ("seed", "step"))
        _KNOWN[key] = torch.compile(function, fullgraph=True, dynamic=not sizes, backend=backend)
    return _KNOWN[key]
