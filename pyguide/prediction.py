"""What a network predicts, as linear maps: the clean sample D and the noise estimate E from the input x and the output
m.

    D = a_x x + a_m m        E = (x - alpha D) / sigma = e_x x + e_m m        network input = c_in x

| prediction | the output m is           | source                             |
|------------|---------------------------|------------------------------------|
| epsilon    | the noise                 | Ho et al. 2020, eq. 15             |
| v          | alpha noise - sigma x0    | Salimans, Ho 2022, appendix D      |
| sample     | x0                        |                                    |
| flow       | noise - x0                | Lipman et al. 2023; Liu et al. 2023|
| edm        | F of c_skip x + c_out F   | Karras et al. 2022, table 1        |
| score      | grad log p(x) = -E/sigma  | Song et al. 2021                   |

E has its own closed form, never (x - alpha D) / sigma computed from a rounded D: for epsilon it is exactly m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .path import Level

Prediction = Literal["epsilon", "v", "sample", "flow", "edm", "score"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


@dataclass(frozen=True)
class Conversion:
    """Coefficients of one level: D = a_x x + a_m m, E = e_x x + e_m m, network input = c_in x."""

    a_x: float
    a_m: float
    e_x: float
    e_m: float
    c_in: float


def check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        hint = {"v_prediction": " (diffusers' v_prediction is 'v')"}.get(prediction, "")
        raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}; got {prediction!r}{hint}")


def conversion(prediction: str, level: Level, sigma_data: float = 0.5) -> Conversion:
    """The coefficients at a level; ValueError where the prediction does not determine D (epsilon at alpha = 0)."""
    check_prediction(prediction)
    alpha, sigma = level.alpha, level.sigma
    if sigma <= 0:
        raise ValueError(f"level: a model is evaluated at sigma > 0, got sigma={sigma} (alpha={alpha})")
    if prediction in ("epsilon", "score") and alpha == 0:
        raise ValueError(
            f"prediction: {prediction!r} does not determine the clean sample at alpha=0 (pure noise), "
            "where only v, flow, sample and edm do"
        )
    if prediction == "epsilon":
        return Conversion(1 / alpha, -sigma / alpha, 0.0, 1.0, 1.0)
    if prediction == "score":
        return Conversion(1 / alpha, sigma * sigma / alpha, 0.0, -sigma, 1.0)
    if prediction == "v":
        power = alpha * alpha + sigma * sigma
        return Conversion(alpha / power, -sigma / power, sigma / power, alpha / power, 1.0)
    if prediction == "sample":
        return Conversion(0.0, 1.0, 1 / sigma, -alpha / sigma, 1.0)
    if prediction == "flow":
        total = alpha + sigma
        return Conversion(1 / total, -sigma / total, 1 / total, alpha / total, 1.0)
    # edm, on the state rescaled to alpha = 1: y = x / alpha, s = sigma / alpha, written without a division by alpha
    norm = math.hypot(sigma, alpha * sigma_data)
    c_skip = alpha * (sigma_data / norm) ** 2
    return Conversion(c_skip, sigma * sigma_data / norm, sigma / norm**2, -alpha * sigma_data / norm, 1 / norm)
