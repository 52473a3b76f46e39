"""Prediction types: the exact output of every type, built from a known x0 and noise, is converted back to them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from samplers import clean_and_noise

from pyguide import Level, schedules
from pyguide.prediction import PREDICTIONS, conversion
from pyguide.solvers.registry import ArrayModel

PATHS = {
    "vp": schedules.scaled_linear().path(9, spacing="trailing"),
    "cosine": schedules.cosine().path(9, offset=3),
    "flow": schedules.flow(3.0).path(9, strength=0.9),
    "edm": schedules.edm(0.02, 30.0).path(9),
    "noise": schedules.linear(zero_snr=True).path(3, spacing="trailing"),
    "flow-noise": schedules.flow().path(3),
}
LEVELS = [(name, i) for name, path in PATHS.items() for i in range(path.steps)]


def exact_output(prediction: str, x0: Any, noise: Any, level: Level, sigma_data: float) -> Any:
    """What a perfect network would say, from each type's definition."""
    alpha, sigma = level.alpha, level.sigma
    if (
        prediction == "edm"
    ):  # F with c_skip y + c_out F = x0 for y = x / alpha, s = sigma / alpha (Karras et al. 2022, table 1)
        s, y = sigma / alpha, x0 + sigma / alpha * noise
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        return (x0 - c_skip * y) / (s * sigma_data / math.sqrt(s**2 + sigma_data**2))
    return {
        "epsilon": noise,
        "v": alpha * noise - sigma * x0,
        "sample": x0,
        "flow": noise - x0,
        "score": -noise / sigma,  # of N(alpha x0, sigma^2), whose mean the exact posterior is at this x
    }[prediction]


# at alpha = 0 an exact output does not exist for these: refused below
EXACT = [
    (prediction, name, index)
    for prediction in PREDICTIONS
    for name, index in LEVELS
    if PATHS[name].alpha[index] > 0 or prediction not in ("epsilon", "score", "edm")
]


@pytest.mark.parametrize(("prediction", "name", "index"), EXACT)
def test_exact_outputs_give_back_sample_and_noise(prediction: str, name: str, index: int) -> None:
    path, sigma_data = PATHS[name], 0.5
    level = path.level(index)
    x0, noise = np.random.default_rng(index).standard_normal((2, 50))
    x = level.alpha * x0 + level.sigma * noise
    m = exact_output(prediction, x0, noise, level, sigma_data)
    c = conversion(prediction, level, sigma_data)
    # one rounding of x or m, in the units of the result: D is known no better from epsilon at sigma / alpha = 100
    scale_D = abs(c.a_x) * np.abs(x) + abs(c.a_m) * np.abs(m)
    scale_E = abs(c.e_x) * np.abs(x) + abs(c.e_m) * np.abs(m)
    assert (np.abs(c.a_x * x + c.a_m * m - x0) <= 1e-12 * np.maximum(1, scale_D)).all()
    assert (np.abs(c.e_x * x + c.e_m * m - noise) <= 1e-12 * np.maximum(1, scale_E)).all()
    expected = 1 / math.sqrt(level.sigma**2 + (level.alpha * sigma_data) ** 2) if prediction == "edm" else 1
    assert c.c_in == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_is_what_the_clean_sample_leaves(prediction: str) -> None:
    """E = (x - alpha D) / sigma for any output, exact or not; e has no rounding of D in it (for epsilon it is m
    itself)."""
    for name, index in LEVELS:
        level = PATHS[name].level(index)
        if level.alpha == 0 and prediction in ("epsilon", "score"):
            continue
        c = conversion(prediction, level)
        assert c.e_x == pytest.approx((1 - level.alpha * c.a_x) / level.sigma, abs=1e-12)
        assert c.e_m == pytest.approx(-level.alpha * c.a_m / level.sigma, rel=1e-12, abs=1e-15)
    c = conversion("epsilon", PATHS["vp"].level(0))
    assert (c.e_x, c.e_m) == (0, 1)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.1])
def test_edm_in_the_terms_of_karras(sigma_data: float) -> None:
    path = PATHS["edm"]
    for i in range(path.steps):
        s = path.sigma[i]
        c = conversion("edm", path.level(i), sigma_data)
        root = s**2 + sigma_data**2
        assert c.a_x == pytest.approx(sigma_data**2 / root, rel=1e-14)  # c_skip
        assert c.a_m == pytest.approx(s * sigma_data / math.sqrt(root), rel=1e-14)  # c_out
        assert c.c_in == pytest.approx(1 / math.sqrt(root), rel=1e-14)


@pytest.mark.parametrize("prediction", ["v", "sample", "flow", "edm"])
def test_limit_of_pure_noise(prediction: str) -> None:
    """At alpha = 0, x is the noise; v = -x0, flow = noise - x0, and edm's c_out tends to sigma_data as sigma grows."""
    level = PATHS["noise"].level(0)
    assert (level.alpha, level.sigma) == (0, 1)
    x0, noise = np.random.default_rng(0).standard_normal((2, 20))
    c = conversion(prediction, level, 0.5)
    m = {"v": -x0, "sample": x0, "flow": noise - x0, "edm": x0 / 0.5}[prediction]
    np.testing.assert_allclose(c.a_x * noise + c.a_m * m, x0, atol=1e-15)
    np.testing.assert_allclose(c.e_x * noise + c.e_m * m, noise, atol=1e-15)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_pure_noise_is_refused_where_it_is_not_determined(prediction: str) -> None:
    with pytest.raises(ValueError, match=r"^prediction: .*alpha=0"):
        conversion(prediction, PATHS["noise"].level(0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_levels_are_refused(prediction: str) -> None:
    with pytest.raises(ValueError, match=r"^level: .*sigma > 0"):
        conversion(prediction, PATHS["vp"].level(9))


def test_unknown_predictions_are_refused() -> None:
    for name in ("x0", "eps", "", None, 3):
        with pytest.raises(ValueError, match=r"^prediction: expected one of epsilon, v, sample"):
            conversion(name, PATHS["vp"].level(0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [(-math.inf, math.inf), (-0.4, 0.7)])
def test_model_of_the_reference_run(prediction: str, clip: tuple[float, float]) -> None:
    """ArrayModel: input scaled by c_in, D clipped, E taken before the clip."""
    path, seen = PATHS["edm"], []

    def network(x: Any, t: Any) -> Any:
        seen.append((x.copy(), t))
        return np.sin(3 * x)

    x = 2 * np.random.default_rng(1).standard_normal((4, 3))
    out = ArrayModel(network, path, prediction, clip)(x, 2)
    alpha, sigma = path.alpha[2], path.sigma[2]
    c_in = 1 / math.sqrt(sigma**2 + 0.25) if prediction == "edm" else 1
    np.testing.assert_allclose(seen[0][0], c_in * x, rtol=1e-15)
    np.testing.assert_array_equal(seen[0][1], np.full(4, path.timestep[2]))
    clean, noise = clean_and_noise(prediction, x, np.sin(3 * seen[0][0]), alpha, sigma, 0.5)
    np.testing.assert_allclose(out.denoised, np.clip(clean, *clip), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(out.noise, noise, rtol=1e-12, atol=1e-12)
