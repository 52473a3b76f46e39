"""Classifier guidance in a run: its three forms are what the papers define, in every solver that can carry them."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from classifiers import Classifier, log_prob_grad, model, noise  # noqa: E402

import pyguide  # noqa: E402
from pyguide import schedules, solvers  # noqa: E402

STEPS = 8
PATHS = {
    "linear": lambda: schedules.linear().path(STEPS, offset=1),
    "cosine": lambda: schedules.cosine().path(STEPS, spacing="trailing"),
    "flow": lambda: schedules.flow(3.0).path(STEPS),
    "edm": lambda: schedules.edm().path(STEPS),
}
PREDICTION = {"linear": "epsilon", "cosine": "v", "flow": "flow", "edm": "edm"}
LABELS = torch.tensor([1, 4, 0])
SCALES = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
DETERMINISTIC = [
    name for name in solvers.names() if not pyguide.compile(name, schedules.linear().path(STEPS)).stochastic_rows
]
CASES = [(name, "linear") for name in DETERMINISTIC]
CASES += [(name, path) for name in ("ddim", "heun", "dpmpp_2m", "unipc") for path in ("cosine", "flow", "edm")]


def spread(values: Any) -> Any:
    return values.view(-1, 1, 1, 1)


def guided_model(plan: Any, classifier: Any, scale: Any) -> Any:
    """The model of a conditional score: its prediction with scale * grad log p(y | x) added to the score -E / sigma."""
    levels = {float(t): (float(a), float(s)) for t, a, s in zip(plan.timestep, plan.alpha, plan.sigma, strict=True)}

    def guided(x: Any, t: Any) -> Any:
        alpha, sigma = levels[float(t[0])]
        data = 0.5  # of the EDM preconditioning
        norm = math.hypot(sigma, data)
        c_in = 1 / norm if plan.prediction == "edm" else 1.0
        out = model(x, t, LABELS)
        if alpha == 0:  # pure noise: p(y | x) does not depend on x
            return out
        g = spread(scale) * log_prob_grad(classifier, x / c_in, t, LABELS)
        E, D = -sigma * g, sigma**2 / alpha * g  # what is added to the noise and to the clean sample
        added = {"epsilon": E, "v": alpha * E - sigma * D, "flow": E - D, "edm": D * norm / (sigma * data)}
        return out + added[plan.prediction]

    return guided


@pytest.mark.parametrize(("solver", "name"), CASES)
def test_the_score_form_is_the_solver_run_with_a_guided_model(solver, name, backend):
    path, prediction = PATHS[name](), PREDICTION[name]
    plan, classifier, start = pyguide.compile(solver, path, prediction=prediction), Classifier(), noise(3)
    start = start * path.init_scale
    expected = solvers.sample(solver, guided_model(plan, classifier, SCALES), start, path, prediction=prediction)
    sampler = pyguide.Sampler(model, plan, pyguide.ClassifierGuidance(classifier, SCALES), backend=backend)
    got = sampler(start, cond={"labels": LABELS})
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    plain = pyguide.Sampler(model, plan, backend=backend)(start, cond={"labels": LABELS})
    assert (got - plain).abs().max() > 1e-3  # the negative control


@pytest.mark.parametrize("solver", ["ddim", "euler_ancestral", "ddpm", "dpmpp_2m_sde"])
def test_the_score_form_of_stochastic_solvers(solver, backend):
    """The same noises, in the order in which the solver draws them."""
    options = {"eta": 0.7} if solver == "ddim" else {}
    path, classifier, start = PATHS["linear"](), Classifier(), noise(3)
    plan = pyguide.compile(solver, path, **options)
    noises = [noise(3, seed=10 + k) for k in range(len(plan.stochastic_rows))]
    drawn = iter(noises)
    guided = guided_model(plan, classifier, SCALES)
    expected = solvers.sample(solver, guided, start, path, noise=lambda step: next(drawn), **options)
    sampler = pyguide.Sampler(model, plan, pyguide.ClassifierGuidance(classifier, SCALES), backend=backend)
    got = sampler(start, cond={"labels": LABELS}, noises=noises)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_after_the_clip_and_not_clipped_again(backend):
    """D of the guided DDIM is clip(D) + sigma^2 / alpha g, and E is re-derived from it."""
    path, classifier, bound = PATHS["linear"](), Classifier(), 0.4
    plan = pyguide.compile("ddim", path, clip=bound, use_clipped_model_output=True)
    x = start = noise(3)
    clipped = 0
    for i in range(STEPS):
        a, s, after, level = path.alpha[i], path.sigma[i], path.alpha[i + 1], path.sigma[i + 1]
        t = torch.full((3,), float(path.timestep[i]), dtype=x.dtype)
        D = ((x - s * model(x, t, LABELS)) / a).clamp(-bound, bound)
        clipped += int((D.abs() == bound).sum())
        D = D + s**2 / a * spread(SCALES) * log_prob_grad(classifier, x, t, LABELS)
        x = after * D + level * (x - a * D) / s
    assert clipped > 20
    sampler = pyguide.Sampler(model, plan, pyguide.ClassifierGuidance(classifier, SCALES), backend=backend)
    assert torch.allclose(sampler(start, cond={"labels": LABELS}), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_mean_form_is_the_mean_shifted_by_the_variance(variance, backend):
    """Dhariwal, Nichol 2021, algorithm 1, in the quantities of Ho et al. 2020, eq. 6 and 7."""
    path, classifier = PATHS["linear"](), Classifier()
    plan = pyguide.compile("ddpm", path, variance=variance, clip=1.0)
    noises = [noise(3, seed=20 + k) for k in range(len(plan.stochastic_rows))]
    x = start = noise(3)
    bars = [float(a) ** 2 for a in path.alpha]
    for i in range(STEPS):
        bar, after = bars[i], bars[i + 1]
        beta = 1 - bar / after
        posterior = beta * (1 - after) / (1 - bar)
        t = torch.full((3,), float(path.timestep[i]), dtype=x.dtype)
        D = ((x - math.sqrt(1 - bar) * model(x, t, LABELS)) / math.sqrt(bar)).clamp(-1, 1)
        mean = beta * math.sqrt(after) / (1 - bar) * D + (1 - after) * math.sqrt(bar / after) / (1 - bar) * x
        sigma = posterior if variance == "small" else beta
        if after == 1 and variance == "large":  # the last row's own variance is that of the row before
            sigma = (1 - bars[i - 1] / bar) * (1 - bar) / (1 - bars[i - 1])
        x = mean + sigma * spread(SCALES) * log_prob_grad(classifier, x, t, LABELS)
        if after < 1:
            x = x + math.sqrt(sigma) * noises[i]
    guidance = pyguide.ClassifierGuidance(classifier, SCALES, form="mean")
    got = pyguide.Sampler(model, plan, guidance, backend=backend)(start, cond={"labels": LABELS}, noises=noises)
    assert torch.allclose(got, x, rtol=1e-9, atol=1e-9)
    moved = pyguide.ClassifierGuidance(classifier, SCALES, form="mean", interval=(0.0, (STEPS - 1) / STEPS))
    last = pyguide.Sampler(model, plan, moved, backend=backend)(start, cond={"labels": LABELS}, noises=noises)
    assert torch.equal(last, got) == (variance == "small")  # beta~ of the last row is 0, beta is not


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
def test_the_input_form_moves_each_new_x_by_the_gradient_there(solver, backend):
    """As an edit of the solver's x before the model is called with it, at the timestep that it is called with."""
    path, classifier, start = PATHS["linear"](), Classifier(), noise(3)
    plan = pyguide.compile(solver, path, editable=True)
    opens = iter([False, *(plan.step[1:] != plan.step[:-1])])  # of each evaluation, whether a step begins there

    def edited(x: Any, t: Any) -> Any:
        if next(opens):
            x += spread(SCALES) / 50 * log_prob_grad(classifier, x, t, LABELS)
        return model(x, t, LABELS)

    expected = solvers.sample(solver, edited, start, path)
    guidance = pyguide.ClassifierGuidance(classifier, SCALES / 50, form="input")
    calls, sampler = [], pyguide.Sampler(model, plan, guidance, backend=backend)
    got = sampler(start, cond={"labels": LABELS}, callback=calls.append)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9)
    plain = pyguide.Sampler(model, plan, backend=backend)(start, cond={"labels": LABELS})
    assert (got - plain).abs().max() > 1e-3
    assert [event.row for event in calls] == list(range(plan.evaluations))
    assert [event.step for event in calls] == plan.step.tolist()


@pytest.mark.parametrize("form", ["score", "mean"])
def test_with_classifier_free_guidance(form, backend):
    """The branches are combined first; the classifier's gradient is added to what they give."""
    path, classifier, start = PATHS["linear"](), Classifier(), noise(3)
    plan = pyguide.compile("ddpm", path)
    noises = [noise(3, seed=30 + k) for k in range(len(plan.stochastic_rows))]
    cond = {"labels": LABELS}

    def combined(x: Any, t: Any, labels: Any) -> Any:
        u, c = model(x, t, torch.zeros_like(labels)), model(x, t, labels)
        return u + 2.5 * (c - u)

    alone = pyguide.ClassifierGuidance(classifier, SCALES, form=form)
    expected = pyguide.Sampler(combined, plan, alone, backend=backend)(start, cond=cond, noises=noises)
    both = pyguide.ClassifierGuidance(classifier, SCALES, form=form, cfg=pyguide.CFG(2.5))
    sampler = pyguide.Sampler(model, plan, both, backend=backend)
    got = sampler(start, cond=cond, uncond={"labels": torch.zeros_like(LABELS)}, noises=noises)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10)


def test_a_path_that_starts_at_pure_noise_does_not_ask_the_classifier_there(backend):
    path, classifier = PATHS["flow"](), Classifier()
    plan = pyguide.compile("euler", path, prediction="flow")
    assert plan.alpha[0] == 0
    sampler = pyguide.Sampler(model, plan, pyguide.ClassifierGuidance(classifier, 1.0), backend=backend)
    sampler(noise(3), cond={"labels": LABELS})
    assert len(classifier.calls) == STEPS - 1


def test_velocity_is_guided_through_the_score(backend):
    """v' = v - (sigma / alpha) grad log p(y | x) on the straight path x = alpha x0 + sigma noise, alpha = 1 - sigma."""
    path, classifier = PATHS["flow"](), Classifier()
    plan = pyguide.compile("euler", path, prediction="flow")
    x = start = noise(3)
    for i in range(STEPS):
        t = torch.full((3,), float(path.timestep[i]), dtype=x.dtype)
        v = model(x, t, LABELS)
        if path.alpha[i] > 0:
            v = v - path.sigma[i] / path.alpha[i] * spread(SCALES) * log_prob_grad(classifier, x, t, LABELS)
        x = x + (path.sigma[i + 1] - path.sigma[i]) * v
    sampler = pyguide.Sampler(model, plan, pyguide.ClassifierGuidance(classifier, SCALES), backend=backend)
    assert torch.allclose(sampler(start, cond={"labels": LABELS}), x, rtol=1e-10, atol=1e-10)
