"""pyguide against diffusers' schedulers, unmodified: results stored by tests/peers/make_diffusers.py.

peers/diffusers_stored.py has the comparison and its limits. For every stored case, in float64 the solver run with
tensors and the compiled plan, in float32 the plan on every back end; and in float32 where our own names (spacing,
offset, final_sigma, sigmas, strength, shift) name the peer's grid. There the tables differ: diffusers computes
alphas_cumprod in float32, a thousand products that miss the float64 ones by up to 1e-6. The limit is the same.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peers.common import distance  # noqa: E402
from peers.diffusers_cases import AYS, NAMED  # noqa: E402
from peers.diffusers_covering import Design  # noqa: E402
from peers.diffusers_grid_dpm import DESIGNS, every_case  # noqa: E402
from peers.diffusers_ours import F32, F64  # noqa: E402
from peers.diffusers_stored import CASES, EXACT, META, stored  # noqa: E402

from pyguide import schedules  # noqa: E402

every = pytest.mark.parametrize("name", CASES)


@every
def test_float64(name: str) -> None:
    """The solver run with tensors (solvers.sample, the reference), and the compiled plan."""
    case = stored(name)
    assert distance(case.solve(), case.peer[F64]) <= EXACT, "the solver"
    assert distance(case.sample(case.plan, F64), case.peer[F64]) <= EXACT, "the plan"


@every
def test_float32(name: str) -> None:
    """The compiled plan on every back end."""
    case = stored(name)
    for backend in ("auto", "reference"):
        assert distance(case.sample(case.plan, F32, backend=backend), case.peer[F32]) <= case.bound[F32], backend


# ---- our own names ------------------------------------------------------------------------------------------------
def _sd(**path: Any) -> Callable[[int], Any]:
    return lambda steps: schedules.scaled_linear().path(steps, **path)


def _linear(**path: Any) -> Callable[[int], Any]:
    return lambda steps: schedules.linear().path(steps, **path)


def _flow(shift: float, **path: Any) -> Callable[[int], Any]:
    return lambda steps: schedules.flow(shift).path(steps, **path)


def _zero_snr(steps: int) -> Any:
    return schedules.scaled_linear(zero_snr=True).path(steps, spacing="trailing")


OFFSET, MIN = _sd(offset=1), _sd(offset=1, final_sigma="min")
TRAIL, TRAIL_MIN = _sd(spacing="trailing"), _sd(spacing="trailing", final_sigma="min")
OWN: dict[str, Callable[[int], Any]] = {
    "ddim-leading-min": MIN,
    "ddim-leading": _sd(),
    "ddim-clip-eta-half": _linear(),
    "ddim-clip-rederived-eta-1": _linear(),
    "ddim-clip-min": MIN,
    "ddim-clip-rederived-min": MIN,
    "ddim-v-zero-snr": _zero_snr,
    "ddim-v-zero-snr-eta-1": _zero_snr,
    "ddim-sample-eta-1": _linear(spacing="trailing"),
    "ddim-linspace": lambda steps: schedules.linear(train_steps=100).path(steps, spacing="linspace"),
    "ddim-v-cosine-clip": lambda steps: schedules.cosine().path(steps),
    "ddim-img2img": _sd(offset=1, final_sigma="min", strength=0.6),
    "ddpm-sigmoid": lambda steps: schedules.sigmoid().path(steps),
    "ddpm-clip-large": _linear(),
    "euler-v-leading": OFFSET,
    "euler-sample-trailing": TRAIL,
    "euler-karras": _sd(sigmas="karras"),
    "euler-exponential": _sd(sigmas="exponential"),
    "euler-beta": _sd(sigmas="beta"),
    "euler-min": TRAIL_MIN,
    "euler-img2img": _sd(offset=1, strength=0.8),
    "euler-given-timesteps": _sd(timesteps=AYS),
    "euler-given-sigmas": _sd(sigmas=NAMED["euler-given-sigmas"].call["sigmas"]),
    "ancestral-leading": OFFSET,
    "ancestral-v-trailing": TRAIL,
    "ancestral-img2img": _sd(offset=1, strength=0.5),
    "heun-v-trailing": TRAIL,
    "heun-sample-karras": _sd(sigmas="karras"),
    "heun-clip": OFFSET,
    "heun-img2img": _sd(offset=1, strength=0.5),
    "dpm2-leading": OFFSET,
    "dpm2-ancestral-leading": OFFSET,
    "dpm-sde-leading": OFFSET,
    "lms-karras": _sd(sigmas="karras"),
    "dpm-trailing": TRAIL,
    "dpm-min": TRAIL_MIN,
    "dpm-min-lower-order-final": TRAIL_MIN,
    "dpm-min-full-order": TRAIL_MIN,
    "dpm-1-is-ddim": TRAIL,
    "dpm-img2img": _sd(spacing="trailing", strength=0.6),
    "dpm-given-timesteps": _sd(timesteps=AYS),
    "unipc-1": TRAIL,
    "unipc-2": TRAIL,
    "unipc-3": TRAIL,
    "unipc-3-in-5-steps": TRAIL,
    "unipc-2-bh1-min": TRAIL_MIN,
    "unipc-3-bh1-min": TRAIL_MIN,
    "unipc-3-min-full-order": TRAIL_MIN,
    "unipc-img2img": _sd(spacing="trailing", strength=0.6),
    "deis-trailing": TRAIL_MIN,
    "sa-trailing": TRAIL_MIN,
    "plms-leading": MIN,
    "pndm-leading": MIN,
    "lcm-10": TRAIL,
    "tcd-5": TRAIL_MIN,
    "flow-euler": _flow(1.0, spacing="linspace"),
    "flow-euler-given": _flow(1.0),
    "flow-euler-shift-given-is-ddim": _flow(3.0),
    "flow-euler-img2img": _flow(3.0, strength=0.7),
    "flow-euler-dynamic": _flow(math.exp(NAMED["flow-euler-dynamic"].call["mu"])),
    "flow-heun": _flow(1.0, spacing="linspace"),
    "edm-karras": lambda steps: schedules.edm().path(steps),
    "edm-dpm": lambda steps: schedules.edm().path(steps),
    "edm-exponential": lambda steps: schedules.edm(0.01).path(steps, sigmas="exponential"),
}


@pytest.mark.parametrize("name", OWN)
def test_own_names(name: str) -> None:
    """Our names make the peer's grid, up to the float32 of its tables, and the same samples."""
    case, path = stored(name), OWN[name](NAMED[name].steps)
    # fractional timesteps are interpolated in a table, and Karras points start from sigma_min, which misses by 1.3e-5
    np.testing.assert_allclose(path.timestep, case.path.timestep, rtol=1e-6, atol=2e-3)
    np.testing.assert_allclose(path.sigma**2, case.path.sigma**2, rtol=3e-5, atol=2e-6)
    np.testing.assert_allclose(path.alpha**2, case.path.alpha**2, rtol=3e-5, atol=2e-6)
    assert distance(case.sample(case.compiled(path), F32, path), case.peer[F32]) <= case.bound[F32]


# ---- what is stored -----------------------------------------------------------------------------------------------
def test_the_stored_cases_are_those_of_the_tables() -> None:
    """peers/diffusers.npz was made from the cases as they stand: else run make_diffusers.py again."""
    cases = {name: json.loads(json.dumps(case.as_json())) for name, case in every_case().items()}
    assert {name: json.loads(json.dumps(case.as_json())) for name, case in CASES.items()} == cases
    assert all(META[name][0].isdigit() for name in ("diffusers", "torch", "numpy", "scipy"))


@pytest.mark.parametrize("design", DESIGNS, ids=[design.prefix for design in DESIGNS])
def test_every_two_values_that_can_meet_do(design: Design) -> None:
    """Of any two options: a pair of values that the sample lacks is in no case at all, as far as 500 tries tell."""
    chosen = design.sample
    assert all(design.name(labels) in CASES for labels in chosen)
    met = {pair for labels in chosen for pair in design.pairs(labels)}
    absent, random_ = [pair for pair in design.every_pair() if pair not in met], random.Random(1)
    assert len(absent) <= 0.06 * (len(met) + len(absent))
    for pair in absent:
        assert not design.completed(dict(pair), random_, tries=500), f"{sorted(pair)} can meet"
    for option, values in design.factors.items():
        assert {labels[option] for labels in chosen} == set(values)


def test_a_sample_of_a_small_design_is_complete() -> None:
    """Of `Design.sample` itself, against all choices of a design that is small enough to list."""
    factors = {option: {str(k): k for k in range(n)} for option, n in (("a", 3), ("b", 4), ("c", 2), ("d", 3))}
    design = Design("small", factors, lambda a, b, c, d: None if (a == b or (c and d == 2)) else (a, b, c, d))
    choices = [dict(zip(factors, labels)) for labels in itertools.product(*factors.values())]
    possible = {pair for labels in choices if design.case(labels) for pair in design.pairs(labels)}
    chosen = design.sample
    assert {pair for labels in chosen for pair in design.pairs(labels)} == possible
    assert 12 <= len(chosen) <= 20  # at least the pairs of the two largest options
    assert all(design.case(labels) for labels in chosen)
