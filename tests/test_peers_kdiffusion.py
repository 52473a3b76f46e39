"""pyguide against k-diffusion's samplers, unmodified: results stored by tests/peers/make_kdiffusion.py.

Their x is our state over alpha, their sigma is sigma / alpha. Start, noises and sigmas are float32 numbers, the same on
both sides and in both precisions, so that what is compared is arithmetic. distance is max |a - b| / max |b|.

    float64   the solver run with tensors, and the compiled plan: 1e-9 from the peer in float64
    float32   the compiled plan: at most 1e-5, or 1.5 times the peer's own distance from its float64
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peers.common import Network, distance, mutants  # noqa: E402

import pyguide  # noqa: E402
from pyguide import schedules, solvers  # noqa: E402

STORED = np.load(Path(__file__).parent / "peers" / "kdiffusion.npz")
META = json.loads(str(STORED["meta"]))
NETWORK = Network(time_scale=1.0)
EXACT, CLOSE = 1e-9, 1e-5


class Case:
    """One stored run: its grid as our path, its options, and its results."""

    def __init__(self, name: str) -> None:
        self.sampler, self.kind, (self.points, self.steps, self.limits), self.options = META["cases"][name]
        self.sigmas = STORED[f"{name}.sigmas"].astype(np.float64)
        self.peer = {dtype: torch.from_numpy(STORED[f"{name}.{dtype}"]) for dtype in ("float32", "float64")}
        self.prediction = self.kind
        last = self.sigmas[-1]
        end = "zero" if last == 0 else "min"
        if self.kind == "edm":
            schedule = schedules.edm(last or 0.002, self.sigmas[0] + 1)
        else:
            schedule = schedules.scaled_linear()
        told = np.log(self.sigmas[:-1]) / 4
        self.path = schedule.path(sigmas=self.sigmas[:-1], timesteps=told, final_sigma=end)
        assert self.path.alpha[-1] == 1

    def noises(self, dtype: Any, draws: int) -> list[Any]:
        """The noises that the peer used: it draws one a step, and leaves those of steps without noise unused."""
        every = torch.from_numpy(STORED["noises"]).to(dtype)
        ratio = self.sigmas[:-1]
        used = [
            i for i, s in enumerate(ratio) if self.options.get("s_tmin", 0) <= s <= self.options.get("s_tmax", np.inf)
        ]
        return [every[i] for i in used[:draws]]

    def start(self, dtype: Any) -> Any:
        return torch.from_numpy(STORED["start"]).to(dtype) * (self.sigmas[0] if self.kind == "edm" else 1.0)

    def plan(self, path: Any = None) -> Any:
        return pyguide.compile(self.sampler, path or self.path, prediction=self.prediction, **self.options)

    def sample(self, plan: Any, dtype: Any, **settings: Any) -> Any:
        noises = self.noises(dtype, len(plan.stochastic_rows)) if plan.stochastic_rows else None
        return pyguide.Sampler(NETWORK, plan, **settings)(self.start(dtype), noises=noises)

    def bound(self, dtype: str) -> float:
        return EXACT if dtype == "float64" else max(CLOSE, 1.5 * distance(self.peer["float32"], self.peer["float64"]))

    def agrees(self, plan: Any, dtype: str) -> bool:
        """The comparison of this file, as a verdict on any plan."""
        return distance(self.sample(plan, getattr(torch, dtype)), self.peer[dtype]) <= self.bound(dtype)


@pytest.fixture(params=META["cases"], scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_vectors_say_where_they_come_from() -> None:
    assert META["commit"] == "4601bf085320592473f681a62808ed873d17fad5"
    assert {entry[0] for entry in META["cases"].values()} == {"euler", "euler_ancestral", "heun", "dpmpp_2m"}


def test_solver_in_float64(case: Case) -> None:
    """The solver functions are the peer's formulas: the reference sampler repeats its float64 results."""
    every = torch.from_numpy(STORED["noises"]).double()
    x = solvers.sample(
        case.sampler, NETWORK, case.start(torch.float64), case.path, prediction=case.prediction,
        noise=lambda step: every[step], **case.options,
    )  # fmt: skip
    assert distance(x, case.peer["float64"]) <= EXACT


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plan(case: Case, dtype: str, backend: str) -> None:
    x = case.sample(case.plan(), getattr(torch, dtype), backend=backend)
    assert distance(x, case.peer[dtype]) <= case.bound(dtype)


def test_numpy(case: Case) -> None:
    """numpy arrays run through the same kernel."""
    plan = case.plan()
    noises = (
        [z.numpy() for z in case.noises(torch.float32, len(plan.stochastic_rows))] if plan.stochastic_rows else None
    )
    network = lambda x, t: NETWORK(torch.from_numpy(x), torch.from_numpy(t)).numpy()  # noqa: E731
    x = pyguide.Sampler(network, plan)(case.start(torch.float32).numpy(), noises=noises)
    assert distance(torch.from_numpy(x), case.peer["float32"]) <= case.bound("float32")


@pytest.mark.parametrize("name", [n for n, entry in META["cases"].items() if entry[2][0] in ("karras", "exponential")])
def test_own_names_make_the_same_grid(name: str) -> None:
    """Karras and exponential by our names: k-diffusion's, up to the float32 of its ramp.

    The ramp, its product and its sum are each rounded by 2^-24 of the largest s^(1/7), then comes the seventh power.
    """
    case = Case(name)
    if case.kind == "edm":
        schedule = schedules.edm(case.limits["sigma_min"], case.limits["sigma_max"])
    else:
        schedule = schedules.scaled_linear()
    path = schedule.path(case.steps, sigmas=case.points)
    rounding = 2.0**-24 * (7 * 3 * (case.sigmas[0] / case.sigmas[-2]) ** (1 / 7) + 4)
    np.testing.assert_allclose(path.sigma[:-1] / path.alpha[:-1], case.sigmas[:-1], rtol=rounding)
    if case.kind == "edm":  # elsewhere k-diffusion's wrapper, not its grid, says what the model is told
        x = case.sample(case.plan(path), torch.float32)
        assert distance(x, case.peer["float32"]) <= case.bound("float32")


EULER_MUTATED = ("euler-v-exponential", "ancestral-v-eta", "ancestral-edm-min")
OTHER_MUTATED = ("heun-edm-churn", "heun-v-vp", "dpmpp_2m-edm-karras", "dpmpp_2m-epsilon-karras")


@pytest.mark.parametrize("name", EULER_MUTATED + OTHER_MUTATED)
def test_a_mutated_coefficient_is_found(name: str) -> None:
    """One coefficient times 1.001: the comparisons of test_plan fail for at least 99 of 100 coefficients.

    float32's limit alone sees 55 to 90 of 100: many move the result by less than 1e-5. float64's sees all.
    """
    case = Case(name)
    plan = case.plan()
    assert case.agrees(plan, "float32")
    assert case.agrees(plan, "float64")
    survivors, tried = [], 0
    for label, mutant in mutants(plan, 80):
        tried += 1
        if case.agrees(mutant, "float32") and case.agrees(mutant, "float64"):
            survivors.append(label)
    assert tried >= 30
    assert len(survivors) <= 0.01 * tried, f"{len(survivors)} of {tried} not found: {survivors}"
