"""Suite `accuracy`: samplers around a model with 16-bit inputs and outputs, against the same sampler in float64.

The model itself is exact (float64 inside), so that what is measured is the sampler: what it makes of 16-bit outputs,
and the precision of the state that it carries from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .cases import CASES, Case
from .extras import missing, require
from .peers import Contender, Pyguide, Stock

SOLVERS = ("ddim", "dpmpp_2m", "unipc")
DTYPES = ("float16", "bfloat16")
STEPS = 50
SHAPE = (4, 4, 32, 32)
TRIM = 0.01  # share of the largest errors left out: elements that fell into the other mode of the data


class Mixture:
    """The exact epsilon of data from a mixture of two normal distributions per element, float64 inside.

        p(x0) = sum_k pi_k N(mu_k, spread^2),  epsilon = (x - alpha E[x0 | x]) / sigma

    The unconditional branch has both modes, the conditional one mostly the mode that the element's sign asks for.
    """

    modes = (-1.0, 1.0)
    spread = 0.4

    def __init__(self, case: Case, batch: int, shape: Sequence[int]) -> None:
        torch = require("torch")
        path = case.path(STEPS)
        self.levels = {float(t): (float(a), float(s)) for t, a, s in zip(path.timestep, path.alpha, path.sigma)}
        wanted = torch.rand(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).lt(0.5)
        prior = torch.where(wanted, 0.7, 0.3).double().expand(batch, *shape)
        self.prior = torch.cat([torch.full_like(prior, 0.5), prior])

    def __call__(self, x: Any, t: Any) -> Any:
        torch = require("torch")
        alpha, sigma = self.levels[float(t.reshape(-1)[0])]
        wide, variance = x.double(), (alpha * self.spread) ** 2 + sigma**2
        odds = torch.log(self.prior) - torch.log1p(-self.prior)
        centres = [wide - alpha * mode for mode in self.modes]
        odds = odds + (centres[0] ** 2 - centres[1] ** 2) / (2 * variance)
        second = torch.sigmoid(odds)
        gain = alpha * self.spread**2 / variance
        clean = sum(p * (mode + gain * d) for p, mode, d in zip((1 - second, second), self.modes, centres))
        return ((wide - alpha * clean) / sigma).to(x.dtype)


def trimmed_rms(error: Any, trim: float = TRIM) -> float:
    """Root mean square of the errors without the largest share `trim` of them."""
    values = np.sort(np.abs(np.asarray(error, np.float64).ravel()))
    kept = values[: len(values) - int(trim * len(values))]
    return float(np.sqrt(np.mean(kept**2)))


def run(solvers: Sequence[str] = SOLVERS) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what was measured, its rows).

    A row: suite, solver, dtype, contender, steps, rms, ratio (rms of stock over that of pyguide, or None).
    """
    torch = require("torch")
    for name in solvers:
        case = CASES[name]
        for dtype in DTYPES:
            start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
            model = Mixture(case, SHAPE[0], SHAPE[1:])
            exact = Pyguide(case, STEPS).run(model, start.double())
            found: dict[str, Contender] = {"pyguide": Pyguide(case, STEPS)}
            if missing("diffusers") is None:
                found["diffusers"] = Stock(case, STEPS)
            errors = {who: trimmed_rms(one.run(model, start).double() - exact) for who, one in found.items()}
            yield (
                f"{name} {dtype}",
                [
                    {
                        "suite": "accuracy",
                        "solver": name,
                        "dtype": dtype,
                        "contender": who,
                        "steps": STEPS,
                        "rms": rms,
                        "ratio": errors["diffusers"] / errors["pyguide"] if "diffusers" in errors else None,
                    }
                    for who, rms in errors.items()
                ],
            )
