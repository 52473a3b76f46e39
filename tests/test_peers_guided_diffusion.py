"""pyguide against guided-diffusion's loops, unmodified: results stored by tests/peers/make_guided_diffusion.py.

p_sample_loop is ddpm with the gradient in the mean, ddim_sample_loop is ddim with re-derived noise and the gradient in
the score. Start, noises and labels are the same numbers on both sides and in both precisions, models, classifier and
cond_fn the same functions, so that what is compared is arithmetic. distance is max |a - b| / max(1, |b|).

    float64   1e-9 from the code with its casts to float32 lifted
    float32   at most 1e-5 from the code as it is, or 1.5 times the code's own distance from its float64, the largest of
              seven starts: rounding grows with the steps and with 1 / alpha, alike on both sides
    float64   against the code as it is: no further than that code is from its own float64
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from peers.common import mutants  # noqa: E402
from peers.guided_diffusion_cases import CASES as WRITTEN  # noqa: E402
from peers.guided_diffusion_cases import Gradient, Model, distance, labels  # noqa: E402
from peers.guided_diffusion_stored import CASES, META, contents, place, recorded, result, told  # noqa: E402

import pyguide  # noqa: E402
from pyguide import GradientGuidance, schedules  # noqa: E402

F32, F64 = torch.float32, torch.float64
EXACT, CLOSE = 1e-9, 1e-5


class Run:
    """A stored run: its process as our path and plan, and its results."""

    def __init__(self, name: str) -> None:
        self.name, self.case = name, CASES[name]
        self.peer = {dtype: result(name, dtype) for dtype in (F32, F64)}
        self.bound = {F32: max(CLOSE, 1.5 * float(contents()["rounding"][place(name)])), F64: EXACT}
        self.form = "score" if self.case.use_ddim else "mean"

    @cached_property
    def path(self) -> pyguide.NoisePath:
        case, N = self.case, self.case.diffusion_steps
        schedule = schedules.linear(0.1 / N, 20 / N, N) if case.noise_schedule == "linear" else schedules.cosine(N)
        path = schedule.path(timesteps=case.timestep_respacing or range(N)[::-1])
        return replace(path, timestep=path.timestep * (1000 / N)) if case.rescale_timesteps else path

    @cached_property
    def plan(self) -> pyguide.Plan:
        return self.compiled()

    def compiled(self, **changes: Any) -> pyguide.Plan:
        case = self.case
        if case.use_ddim:
            solver, options = "ddim", {"eta": case.eta, "use_clipped_model_output": True}
        else:
            fixed = "small" if case.sigma_small else "large"
            learned = "learned" if case.learned else "learned_range"
            solver, options = "ddpm", {"variance": learned if case.learn_sigma else fixed}
        settings = {"clip": 1.0 if case.clip_denoised else None, **options, **changes}
        return pyguide.compile(solver, self.path, prediction="sample" if case.predict_xstart else "epsilon", **settings)

    def model(self, x: Any, t: Any, y: Any) -> Any:
        out = Model(self.case)(x, t, y)
        return out[:, : x.shape[1]] if self.case.use_ddim else out  # ddim has no use for the variance channels

    def sample(self, dtype: Any, plan: pyguide.Plan | None = None, **settings: Any) -> Any:
        """Our result; settings: form and scale, and those of the sampler."""
        plan, form, scale = plan or self.plan, settings.pop("form", self.form), settings.pop("scale", self.case.scale)
        guidance = None if scale is None else GradientGuidance(Gradient(scale), form=form)
        start, noises = recorded(dtype)
        drawn = list(noises[: len(plan.stochastic_rows)]) or None
        return pyguide.Sampler(self.model, plan, guidance, **settings)(start, cond={"y": labels()}, noises=drawn)

    @cached_property
    def reference(self) -> Any:
        return self.sample(F64, backend="reference")

    def agrees(self, dtype: Any, plan: pyguide.Plan | None = None, **settings: Any) -> bool:
        """The comparison of this file, as a verdict."""
        return distance(self.sample(dtype, plan, **settings), self.peer[dtype]) <= self.bound[dtype]


run_of = cache(Run)


@pytest.fixture(params=CASES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_of(request.param)


def test_vectors_say_where_they_come_from() -> None:
    assert META["commit"] == "22e0df8183507e13a7813f8d38d51b072ca1e67c"
    assert CASES == WRITTEN, "a case was changed: make the vectors again"


def test_vectors_span_what_the_code_does() -> None:
    assert {len(told(name)) for name in CASES} >= {25, 50, 100, 250}
    runs = [(case, case.noise_schedule, case.clip_denoised) for case in CASES.values()]
    p = {(case.learn_sigma, case.learned, case.sigma_small, *rest) for case, *rest in runs if not case.use_ddim}
    ddim = {(case.eta, *rest) for case, *rest in runs if case.use_ddim}
    assert (len(p), len(ddim)) == (4 * 2 * 2, 3 * 2 * 2)


def test_told(run: Run) -> None:
    """What the models of the stored run were told; rescaled ones in float32."""
    np.testing.assert_allclose(run.plan.timestep, told(run.name), rtol=2.0**-23 if run.case.rescale_timesteps else 0)


def test_reference_in_float64(run: Run) -> None:
    assert distance(run.reference, run.peer[F64]) <= EXACT


def test_kernel_in_float32(run: Run) -> None:
    assert run.agrees(F32, backend="auto")


def test_float64_beside_the_code_as_it_is(run: Run) -> None:
    """The unmodified code rounds its tables, its mean and its states to float32; ours is what it rounds."""
    own = distance(run.peer[F32], run.peer[F64])
    assert 0 < own < 2e-3
    assert distance(run.reference, run.peer[F32]) <= own + EXACT


ONE_OF_EACH = [
    "p-small-linear",
    "p-large-cosine",
    "p-learned-linear-unclipped",
    "p-range-cosine",
    "p-range-rescaled-4000",
    "ddim-0.5-cosine",
    "ddim-0-xstart",
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_back_ends_and_precisions_the_other_way_round(name: str) -> None:
    run = run_of(name)
    assert run.agrees(F64, backend="auto")
    assert run.agrees(F32, backend="reference")


UNGUIDED = [name for name in CASES if name.endswith("-unguided")]


@pytest.mark.parametrize("name", UNGUIDED)
def test_without_the_gradient_it_is_another_sample(name: str) -> None:
    """The control: guidance moves the sample, on both sides alike, and leaving it out is seen in both precisions."""
    without, guided = run_of(name), run_of(name.removesuffix("-unguided"))
    assert distance(guided.peer[F64], without.peer[F64]) > 0.05
    for dtype in (F32, F64):
        assert not guided.agrees(dtype, scale=None)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_gradient_that_is_off_by_a_thousandth_is_found(name: str) -> None:
    run = run_of(name)
    assert run.agrees(F64)
    assert not run.agrees(F64, scale=1.001 * run.case.scale)


@pytest.mark.parametrize("variance", ["small", "large", "learned", "learned_range"])
def test_another_variance_is_found(variance: str) -> None:
    """Each run by the plan of each other kind that its model fits."""
    kinds = {"small": "p-small-linear", "large": "p-large-linear"}
    learned = {"learned": "p-learned-linear", "learned_range": "p-range-linear"}
    for kind, name in (learned if variance in learned else kinds).items():
        run = run_of(name)
        for dtype in (F32, F64):
            assert run.agrees(dtype, run.compiled(variance=variance)) == (kind == variance)


def test_the_forms_differ() -> None:
    run = run_of("p-large-linear-unclipped")
    assert not run.agrees(F32, form="score")
    run = run_of("ddim-1-linear-unclipped")
    assert not run.agrees(F32, form="mean")


# unclipped, so that a coefficient of any row can be seen; guided, so that those of the gradient can
@pytest.mark.parametrize("name", ["p-range-cosine-unclipped", "p-large-linear-unclipped", "ddim-0.5-linear-unclipped"])
def test_a_mutated_coefficient_is_found(name: str) -> None:
    """One coefficient of a row, or one variance, times 1.001: the comparisons above would fail for any of them."""
    run = run_of(name)
    assert run.agrees(F64)
    changed = list(mutants(run.plan, 20))
    if not run.case.learn_sigma and not run.case.use_ddim:
        for i in (0, 7, 24):
            variance = run.plan.variance.copy()
            variance[i] *= 1.001
            changed.append((f"variance of row {i + 1}", replace(run.plan, variance=variance)))
    survivors = [label for label, plan in changed if run.agrees(F64, plan)]
    assert len(changed) >= 20
    assert not survivors
