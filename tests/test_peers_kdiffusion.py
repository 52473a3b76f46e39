"""pyguide against k-diffusion's samplers, unmodified: results stored by tests/peers/make_kdiffusion.py.

Their x is our state over alpha, their sigma is sigma / alpha. Start, noises and sigmas are float32 numbers, the same on
both sides and in both precisions, so that what is compared is arithmetic. distance is max |a - b| / max |b|.

    float64   the solver run with tensors, and the compiled plan: 1e-9 from the peer in float64
    float32   the compiled plan: at most 1e-5, or 1.5 times the peer's own distance from its float64

sample_dpmpp_sde draws the two noises of a step from one Brownian motion. The stored runs made it of the recorded
normals, one for each new noise level; `path.brownian` is handed the same ones in the same order.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peers.common import Network, distance, mutants  # noqa: E402

import pyguide  # noqa: E402
from pyguide import NoisePath, schedules, solvers  # noqa: E402

STORED = np.load(Path(__file__).parent / "peers" / "kdiffusion.npz")
META = json.loads(str(STORED["meta"]))
NETWORKS = {"edm": Network(time_scale=1.0)}  # told log(s) / 4; the others a timestep
TIMES = Network(time_scale=1 / 150)
EXACT, CLOSE = 1e-9, 1e-5

# k-diffusion's names where ours differ; its classes' steps by the names of our solvers
OURS = {
    "dpm_2": "dpm2",
    "dpm_2_ancestral": "dpm2_ancestral",
    "dpm_solver_2": "dpm_solver_2s",
    "dpm_solver_3": "dpm_solver_3s",
}


class Case:
    """One stored run: its grid as our path, its options, and its results."""

    def __init__(self, name: str) -> None:
        self.sampler, grid, self.options = META["cases"][name]
        self.kind, self.points, self.steps, self.limits = META["grids"][grid]
        self.sigmas = STORED[f"{grid}.sigmas"].astype(np.float64)
        self.peer = {dtype: torch.from_numpy(STORED[f"{name}.{dtype}"]) for dtype in ("float32", "float64")}
        self.network = NETWORKS.get(self.kind, TIMES)
        self.path = path_over(self.kind, self.sigmas)

    @cached_property
    def parts(self) -> list[tuple[Any, NoisePath, dict[str, Any]]]:
        """(solver, path, options) of our runs, one after another; only dpm_fast is made of several."""
        if self.sampler != "dpm_fast":
            return [(OURS.get(self.sampler, self.sampler), self.path, self.options)]
        # as many steps of DPM-Solver-3 as n evaluations allow, equal in lam, then of -2 and of -1
        n = self.options["n"]
        orders = [3] * (n // 3 - 1) + [2, 1] if n % 3 == 0 else [3] * (n // 3) + [n % 3]
        s = np.exp(np.linspace(*np.log(self.sigmas[[0, -1]]), len(orders) + 1))
        parts, begin = [], 0
        for order, group in itertools.groupby(orders):
            end = begin + len(list(group))
            name = {1: "dpm_solver_1", 2: "dpm_solver_2s", 3: "dpm_solver_3s"}[order]
            parts.append((name, path_over(self.kind, s[begin : end + 1]), {}))
            begin = end
        return parts

    @cached_property
    def plans(self) -> list[Any]:
        return [pyguide.compile(f, path, prediction=self.kind, **options) for f, path, options in self.parts]

    def noises(self, dtype: Any, draws: int) -> list[Any]:
        """The noises that the peer used: with churn it draws one a step, and leaves those of other steps unused."""
        low, high = self.options.get("s_tmin", 0), self.options.get("s_tmax", np.inf)
        every = torch.from_numpy(STORED["noises"]).to(dtype)
        return [z for z, s in itertools.zip_longest(every, self.sigmas[:-1], fillvalue=low) if low <= s <= high][:draws]

    def start(self, dtype: Any) -> Any:
        return torch.from_numpy(STORED["start"]).to(dtype) * (self.sigmas[0] if self.kind == "edm" else 1.0)

    def solve(self) -> Any:
        """Our solver with float64 tensors; it takes the recorded noises in the order in which it draws."""
        x, noises = self.start(torch.float64), iter(self.noises(torch.float64, len(STORED["noises"])))
        for solver, path, options in self.parts:
            x = solvers.sample(
                solver, self.network, x, path, prediction=self.kind, noise=lambda step: next(noises), **options
            )
        return x / self.path.alpha[-1]

    def sample(self, plans: list[Any], dtype: Any, **settings: Any) -> Any:
        x = self.start(dtype)
        for plan in plans:
            noises = self.noises(dtype, len(plan.stochastic_rows)) if plan.stochastic_rows else None
            x = pyguide.Sampler(self.network, plan, **settings)(x, noises=noises)
        return x / float(self.path.alpha[-1])

    def bound(self, dtype: str) -> float:
        return EXACT if dtype == "float64" else max(CLOSE, 1.5 * distance(self.peer["float32"], self.peer["float64"]))

    def agrees(self, plans: list[Any], dtype: str) -> bool:
        """The comparison of this file, as a verdict on any plans."""
        return distance(self.sample(plans, getattr(torch, dtype)), self.peer[dtype]) <= self.bound(dtype)


def path_over(kind: str, s: Any) -> NoisePath:
    """The path over the given sigma / alpha; one that ends above 0 ends exactly there."""
    if kind == "edm":
        return schedules.edm(s[-1] or 0.002, s[0] + 1).path(sigmas=s[:-1], final_sigma="min" if s[-1] else "zero")
    schedule = schedules.scaled_linear()
    if s[-1] == 0:
        return schedule.path(sigmas=s)
    times = [schedule.timestep_at(lam) for lam in -np.log(s[:-1])]
    return NoisePath(1 / np.hypot(1, s), s / np.hypot(1, s), np.array(times), schedule)


@cache
def case_of(name: str) -> Case:
    return Case(name)


@pytest.fixture(params=META["cases"])
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def test_vectors_say_where_they_come_from() -> None:
    assert META["commit"] == "4601bf085320592473f681a62808ed873d17fad5"
    samplers = "euler euler_ancestral heun dpm_2 dpm_2_ancestral lms dpmpp_2s_ancestral dpmpp_sde dpmpp_2m dpmpp_2m_sde"
    samplers += " dpmpp_3m_sde dpm_solver_2 dpm_solver_3 dpm_fast"
    assert {entry[0] for entry in META["cases"].values()} == set(samplers.split())


def test_solver_in_float64(case: Case) -> None:
    """The solver functions are the peer's formulas: the reference sampler repeats its float64 results."""
    assert distance(case.solve(), case.peer["float64"]) <= EXACT


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plan(case: Case, dtype: str, backend: str) -> None:
    x = case.sample(case.plans, getattr(torch, dtype), backend=backend)
    assert distance(x, case.peer[dtype]) <= case.bound(dtype)


def one_each() -> Iterator[str]:
    """The first stored case of every sampler."""
    for _, group in itertools.groupby(META["cases"], lambda name: META["cases"][name][0]):
        yield next(group)


@pytest.mark.parametrize("name", list(one_each()))
def test_numpy(name: str) -> None:
    """numpy arrays run through the same kernel."""
    case = case_of(name)
    network = lambda x, t: case.network(torch.from_numpy(x), torch.from_numpy(t)).numpy()  # noqa: E731
    x = case.start(torch.float32).numpy()
    for plan in case.plans:
        rows = len(plan.stochastic_rows)
        noises = [z.numpy() for z in case.noises(torch.float32, rows)] if rows else None
        x = pyguide.Sampler(network, plan)(x, noises=noises)
    assert distance(torch.from_numpy(x), case.peer["float32"]) <= case.bound("float32")


@pytest.mark.parametrize("name", ["dpmpp_2m-edm", "dpmpp_2m-epsilon", "euler-v", "dpmpp_2m-edm-min"])
def test_own_names_make_the_same_grid(name: str) -> None:
    """Karras and exponential by our names: k-diffusion's, up to the float32 of its ramp.

    The ramp, its product and its sum are each rounded by 2^-24 of the largest s^(1/7), then comes the seventh power.
    """
    case = case_of(name)
    schedule = schedules.edm(**case.limits) if case.kind == "edm" else schedules.scaled_linear()
    points, end = case.points.removesuffix("-min"), "min" if case.points.endswith("-min") else "zero"
    path = schedule.path(case.steps, sigmas=points, final_sigma=end)
    rounding = 2.0**-24 * (7 * 3 * (case.sigmas[0] / case.sigmas[-2]) ** (1 / 7) + 4)
    np.testing.assert_allclose(path.sigma / path.alpha, case.sigmas, rtol=rounding)
    plan = pyguide.compile(case.sampler, path, prediction=case.kind, **case.options)
    assert distance(case.sample([plan], torch.float32), case.peer["float32"]) <= case.bound("float32")


def test_independent_noises_are_another_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the Brownian cases: with a fresh normal for each of the two noises of a step, the same solver is
    far from the peer."""
    case = case_of("dpmpp_sde-edm")
    noises = iter(torch.from_numpy(STORED["noises"]).double())

    monkeypatch.setattr(NoisePath, "brownian", lambda path, s, t: next(noises))
    start = case.start(torch.float64)
    x = solvers.sample("dpmpp_sde", case.network, start, case.path, prediction=case.kind)
    monkeypatch.undo()
    assert case.path.alpha[-1] == 1
    assert distance(case.solve(), case.peer["float64"]) <= EXACT
    assert distance(x, case.peer["float64"]) > 0.1


def test_where_the_peer_is_wrong() -> None:
    """sample_dpmpp_2m_sde and 3m_sde cannot take a single step to clean data. sample_dpm_2_ancestral adds no noise
    after a step whose s_down is 0 (eta above 1, or s' / s below 2^-12 in float32): it is then at 0 instead of at s'."""
    wrong = META["wrong"]
    x = torch.from_numpy(STORED["start"]).double() * 10
    one = schedules.edm().path(sigmas=[10.0])
    for name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        assert wrong[f"{name}, one step to zero"] == "UnboundLocalError"
        ours, first_order = (solvers.sample(f, NETWORKS["edm"], x, one, prediction="edm") for f in (name, "euler"))
        assert distance(ours, first_order) <= EXACT
    drawn = {case: wrong[f"dpm_2_ancestral, {case}, noises of 3 steps"] for case in ("eta 1.5", "float64", "float32")}
    assert drawn["float64"] == 3
    assert drawn["float32"] == 2
    assert drawn["eta 1.5"] == 0
    for sigmas, eta in (([10.0, 5.0, 2.0, 1.0], 1.5), ([80.0, 0.01, 0.005, 0.002], 1.0)):
        path = path_over("edm", np.array(sigmas))
        columns = iter(np.eye(4)[1:])  # the start and three noises as unit vectors; the data are the point 0
        out = solvers.sample(
            "dpm2_ancestral", lambda x, t: x * 0, np.eye(4)[0] * sigmas[0], path,
            prediction="sample", noise=lambda step, columns=columns: next(columns), eta=eta,
        )  # fmt: skip
        assert math.sqrt(out @ out) == pytest.approx(sigmas[-1], rel=1e-12)
        assert len(pyguide.compile("dpm2_ancestral", path, eta=eta).stochastic_rows) == 3


# a sampler with its options, on grids that leave no coefficient out: with an end at zero, and with one above it
MUTATED = {
    "euler": ("euler-v", "euler-epsilon-min"),
    "euler_ancestral": ("euler_ancestral-v-half", "euler_ancestral-edm-min"),
    "heun": ("heun-edm-min-churn", "heun-v-poly"),
    "dpm_2": ("dpm_2-edm-min-churn", "dpm_2-v-poly"),
    "dpm_2_ancestral": ("dpm_2_ancestral-edm-min", "dpm_2_ancestral-v-half"),
    "lms": ("lms-epsilon-8-order=3", "lms-v-poly"),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral-edm-min", "dpmpp_2s_ancestral-v-half"),
    "dpmpp_sde": ("dpmpp_sde-edm-min", "dpmpp_sde-v-r=0.3"),
    "dpmpp_2m": ("dpmpp_2m-edm-min", "dpmpp_2m-v-poly"),
    "dpmpp_2m_sde": ("dpmpp_2m_sde-v-half", "dpmpp_2m_sde-epsilon-8-solver_type=heun"),
    "dpmpp_3m_sde": ("dpmpp_3m_sde-v-half", "dpmpp_3m_sde-edm-min"),
    "dpm_solver_2": ("dpm_solver_2-v-min", "dpm_solver_2-edm-min"),
    "dpm_solver_3": ("dpm_solver_3-v-min", "dpm_solver_3-edm-min"),
}


@pytest.mark.parametrize("sampler", MUTATED)
def test_a_mutated_coefficient_is_found(sampler: str) -> None:
    """One coefficient times 1.001: the comparisons of test_plan fail for at least 99 of 100 coefficients.

    float32's limit alone sees 55 to 90 of 100: many move the result by less than 1e-5. float64's sees all.
    """
    survivors, tried = [], 0
    for name in MUTATED[sampler]:
        case = case_of(name)
        assert case.sampler == sampler
        (plan,) = case.plans
        assert case.agrees([plan], "float64")
        assert case.agrees([plan], "float32")
        for label, mutant in mutants(plan, 60):
            tried += 1
            if case.agrees([mutant], "float64") and case.agrees([mutant], "float32"):
                survivors.append(f"{name}: {label}")
    assert tried >= 60
    assert len(survivors) <= 0.01 * tried, f"{len(survivors)} of {tried} not found: {survivors}"


def test_every_sampler_is_mutated() -> None:
    """dpm_fast is a chain of the two classes' steps, whose coefficients are mutated above."""
    assert {*MUTATED, "dpm_fast"} == {entry[0] for entry in META["cases"].values()}
