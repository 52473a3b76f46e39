"""Where the last step of a run ends, beyond clean data and the smallest sigma: at a sigma of the caller's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyguide import schedules

SD, FLOW, EDM = schedules.scaled_linear(), schedules.flow(3.0), schedules.edm()


def end_of(path: Any) -> float:
    """In the unit of sigmas: sigma / alpha, on flow paths sigma."""
    return float(path.sigma[-1] if path.schedule is FLOW else path.sigma[-1] / path.alpha[-1])


def test_lists_of_schedulers_with_their_own_end() -> None:
    """N + 1 sigmas beside N timesteps: the last one is where the run ends, as in a scheduler's `sigmas`."""
    times, sigmas = [900.0, 500.0, 100.0], [10.0, 3.0, 0.5, 0.1]
    path = SD.path(timesteps=times, sigmas=sigmas)
    np.testing.assert_allclose(path.sigma / path.alpha, sigmas, rtol=1e-14)
    assert path.timestep.tolist() == times
    same = SD.path(timesteps=times, sigmas=sigmas[:-1], final_sigma=0.1)
    np.testing.assert_array_equal(same.sigma, path.sigma)
    zero = SD.path(timesteps=times, sigmas=[10.0, 3.0, 0.5, 0.0])
    assert zero.sigma[-1] == 0


@pytest.mark.parametrize(
    ("schedule", "arguments"),
    [
        (SD, {"steps": 6, "spacing": "trailing"}),
        (SD, {"timesteps": [999, 600, 300]}),
        (SD, {"sigmas": [10.0, 3.0, 1.0]}),
        (FLOW, {"steps": 6}),
        (EDM, {"sigmas": [80.0, 3.0, 1.0]}),
    ],
)
def test_a_run_that_ends_at_a_sigma_of_its_own(schedule: Any, arguments: dict[str, Any]) -> None:
    """As when a second model takes over: the grid is the same, but for its end."""
    path = schedule.path(**arguments, final_sigma=0.3)
    assert end_of(path) == pytest.approx(0.3, rel=1e-14)
    np.testing.assert_array_equal(path.sigma[:-1], schedule.path(**arguments).sigma[:-1])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "end", None, True])
def test_refusals(value: Any) -> None:
    with pytest.raises(ValueError, match=r'^final_sigma: expected "zero", "min" or a positive number, got'):
        SD.path(6, final_sigma=value)


def test_an_end_that_the_grid_is_past() -> None:
    with pytest.raises(ValueError, match=r"^final_sigma: 0.04 ends at sigma 0.04, where the last step would start"):
        SD.path(6, sigmas="karras", final_sigma=0.04)


def test_schedules_say_what_they_are() -> None:
    assert repr(SD) == "VariancePreserving(1000 training steps, sigma/alpha 0.0292 to 14.61)"
    assert repr(schedules.linear(zero_snr=True)).endswith("to inf)")
    assert repr(FLOW) == "Flow(shift=3, train_steps=1000, terminal=None)"
    assert repr(EDM) == "EDM(sigma_min=0.002, sigma_max=80, sigma_data=0.5)"
