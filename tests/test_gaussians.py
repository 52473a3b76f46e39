"""Classifier guidance where everything is known: Gaussians in the plane, one or several of which make a class.

By Bayes' rule -sigma grad log p(y | x_t) = epsilon(x_t, y) - epsilon(x_t), so that classifier guidance with exact
scores is classifier-free guidance: scale s on the unconditional model is CFG(s), on the conditional one CFG(1 + s).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gaussians import exact, fitted_order, levels_of, path_of_ratios, uniform
from torch import Tensor

import pyguide
from pyguide import CFG, ClassifierGuidance, GradientGuidance, NoisePath, Sampler, schedules, solvers

EXAMPLE = Path(__file__).parents[1] / "examples" / "gaussians.py"

MEANS = torch.tensor([[-1.2, 0.4], [0.9, 1.1], [0.3, -1.3], [1.6, -0.2]], dtype=torch.float64)
WIDTHS = torch.tensor([0.5, 0.3, 0.7, 0.4], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.2, 0.4, 0.1], dtype=torch.float64)
CLASSES, SIGMA_DATA = 4, 0.5
COUNT = 24
ALL = torch.ones(COUNT, CLASSES, dtype=torch.float64)
LABELS = torch.arange(COUNT) % CLASSES
SCALES = torch.linspace(0, 8, COUNT, dtype=torch.float64).roll(5)  # 0 among them, and 1 + 0 = 1


def members(labels: Tensor) -> Tensor:
    """[n, CLASSES]: 1 for the Gaussians that make the class of each sample; labels [n] or [n, several], -1 is none."""
    chosen = torch.nn.functional.one_hot(labels.reshape(len(labels), -1) + 1, CLASSES + 1).amax(1)
    return chosen[:, 1:].to(torch.float64)


def log_joint(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """log p(x_t, k) [n, CLASSES]."""
    variance = alpha**2 * WIDTHS**2 + sigma**2
    gap = x[:, None] - alpha * MEANS
    return SHARES.log() - torch.log(2 * torch.pi * variance) - gap.square().sum(-1) / (2 * variance)


def estimates(x: Tensor, alpha: float, sigma: float, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x_t] and the noise estimate -sigma grad log p(x_t), each in closed form, of the chosen Gaussians."""
    part = torch.softmax(log_joint(x, alpha, sigma) + chosen.log(), dim=1)[..., None]
    variance = (alpha**2 * WIDTHS**2 + sigma**2)[:, None]
    gap = x[:, None] - alpha * MEANS
    clean = (part * (MEANS + alpha * WIDTHS[:, None] ** 2 / variance * gap)).sum(1)
    return clean, (part * (sigma / variance) * gap).sum(1)


def network_of(path: NoisePath, prediction: str) -> Any:
    """A network with the conditional and the unconditional estimate, as a prediction of any type."""
    level = levels_of(path)

    def network(x: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        alpha, sigma = level(float(t[0]))
        norm = (sigma**2 + SIGMA_DATA**2) ** 0.5
        if prediction == "edm":  # the network is given c_in x
            x = x * norm
        clean, noise = estimates(x, alpha, sigma, chosen)
        return {
            "epsilon": lambda: noise,
            "v": lambda: alpha * noise - sigma * clean,
            "sample": lambda: clean,
            "flow": lambda: noise - clean,
            "edm": lambda: (sigma * x / norm - norm * noise) / SIGMA_DATA,  # (D - c_skip x) / c_out
            "score": lambda: -noise / sigma,
        }[prediction]()

    return network


def classifier_of(path: NoisePath) -> Any:
    level = levels_of(path)
    return lambda x, t: log_joint(x, *level(float(t[0])))


compiled = cache(pyguide.compile)


def run(
    path: NoisePath,
    solver: Any,
    prediction: str,
    guidance: Any,
    x: Tensor,
    *,
    labels: Tensor = LABELS,
    backend: Any = "reference",
    clip: float | None = None,
) -> Tensor:
    """Sampled towards `labels`: classes [n], several of them [n, several], or a distribution [n, CLASSES]."""
    plan = compiled(solver, path, prediction=prediction, clip=clip)
    cond: dict[str, Any] = {"chosen": ALL if labels.is_floating_point() else members(labels)}
    branches = {"cond": cond, "uncond": {"chosen": ALL}}
    if isinstance(guidance, ClassifierGuidance):
        cond["labels"] = labels
        if guidance.cfg is None:
            del branches["uncond"]
    return Sampler(network_of(path, prediction), plan, guidance, backend=backend)(x, **branches)


# ---- the guided score of one evaluation ------------------------------------------------------------------------
def denoised(model, x, path, *, noise):
    return model(x, 0).denoised


def noise_estimate(model, x, path, *, noise):
    return model(x, 0).noise


LEVELS = {
    "cosine": [schedules.cosine().path(timesteps=[t]) for t in (1, 10, 50, 100, 250, 400, 550, 700, 850, 950, 999)],
    "edm": [schedules.edm().path(sigmas=[float(s)]) for s in np.geomspace(80, 0.002, 12)],
    "flow": [schedules.flow().path(sigmas=[s]) for s in (0.999, 0.99, 0.9, 0.75, 0.5, 0.25, 0.1, 0.01, 0.001)],
}
PREDICTIONS = [("cosine", "epsilon"), ("cosine", "v"), ("cosine", "score"), ("edm", "edm"), ("edm", "sample")]
PREDICTIONS += [("flow", "flow")]


def point(path: NoisePath) -> Tensor:
    """States at the start of a path: of noisy data, and farther out."""
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, COUNT, 2, dtype=torch.float64, generator=generator)
    return 1.5 * path.alpha[0] * clean + path.sigma[0] * noise


def guided(path: NoisePath, prediction: str, guidance: Any, labels: Tensor = LABELS) -> tuple[Tensor, ...]:
    """(D, E, E) of the first evaluation, as solvers that do nothing else get them.

    E twice: as (x - alpha D) / sigma, and, in a plan whose D would be clipped, from the network's output.
    """
    estimates = ((denoised, None), (noise_estimate, None), (noise_estimate, 1.0))
    return tuple(run(path, e, prediction, guidance, point(path), labels=labels, clip=clip) for e, clip in estimates)


def assert_same(path: NoisePath, prediction: str, found: Any, wanted: Any) -> None:
    """To 1e-12 in what the network predicts. D = (x - sigma E) / alpha and E = (x - alpha D) / sigma magnify that."""
    ratio = float(path.sigma[0] / path.alpha[0])
    of_noise = 1 / ratio if prediction == "sample" else 1
    for one, other, factor in zip(found, wanted, (ratio, of_noise, of_noise), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * max(1.0, factor))


def test_the_scores_are_those_of_the_densities() -> None:
    """epsilon = -sigma grad log p(x_t), by autograd through the density; D by Tweedie's formula."""
    for path in (path for paths in LEVELS.values() for path in paths):
        x, alpha, sigma = point(path).requires_grad_(), path.alpha[0], path.sigma[0]
        for chosen in (ALL, members(LABELS)):
            density = torch.logsumexp(log_joint(x, alpha, sigma) + chosen.log(), dim=1)
            (score,) = torch.autograd.grad(density.sum(), x)
            clean, noise = estimates(x.detach(), alpha, sigma, chosen)
            torch.testing.assert_close(noise, -sigma * score, rtol=0, atol=1e-12)
            torch.testing.assert_close(alpha * clean, x.detach() - sigma * noise, rtol=0, atol=1e-12 * max(1, sigma))


@pytest.mark.parametrize(("kind", "prediction"), PREDICTIONS)
def test_guided_score_is_that_of_classifier_free_guidance(kind: str, prediction: str) -> None:
    """A scale of its own for each sample, at every noise level."""
    pull = 0.0
    for path in LEVELS[kind]:
        classifier = classifier_of(path)
        on_unconditional = guided(path, prediction, ClassifierGuidance(classifier, SCALES, cfg=CFG(0.0)))
        assert_same(path, prediction, on_unconditional, guided(path, prediction, CFG(SCALES)))
        on_conditional = guided(path, prediction, ClassifierGuidance(classifier, SCALES))
        assert_same(path, prediction, on_conditional, guided(path, prediction, CFG(1 + SCALES)))
        pull = max(pull, float((on_unconditional[1] - guided(path, prediction, CFG(0.0))[1]).abs().max()))
    assert pull > 1, "the guidance did nothing that could be compared"


@pytest.mark.parametrize(("kind", "prediction"), [("cosine", "epsilon"), ("edm", "edm"), ("flow", "flow")])
def test_the_scales_of_both_guidances_add_up(kind: str, prediction: str) -> None:
    for path in LEVELS[kind]:
        both = ClassifierGuidance(classifier_of(path), SCALES, cfg=CFG(1.75))
        assert_same(path, prediction, guided(path, prediction, both), guided(path, prediction, CFG(SCALES + 1.75)))


def test_several_labels_are_the_class_that_they_make_together() -> None:
    pair = torch.stack([LABELS, (LABELS + 1 + torch.arange(COUNT) // 8) % CLASSES, LABELS], dim=1)
    pair[::5, 1:] = -1  # one label is left
    for path in LEVELS["cosine"]:
        by_gradient = guided(path, "epsilon", ClassifierGuidance(classifier_of(path), SCALES, cfg=CFG(0.0)), pair)
        assert_same(path, "epsilon", by_gradient, guided(path, "epsilon", CFG(SCALES), pair))


def test_a_distribution_weighs_the_classes() -> None:
    """sum_k q_k grad log p(k | x_t) = -sum_k q_k (epsilon_k - epsilon) / sigma."""
    q = torch.rand(COUNT, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q[::3] /= q[::3].sum(1, keepdim=True)  # it need not sum to 1
    q[1, 2] = 0
    for path in LEVELS["cosine"]:
        found = guided(path, "epsilon", ClassifierGuidance(classifier_of(path), SCALES, cfg=CFG(0.0)), q)
        x, alpha, sigma = point(path), path.alpha[0], path.sigma[0]
        base = estimates(x, alpha, sigma, ALL)
        clean, noise = (part.clone() for part in base)
        for k in range(CLASSES):
            of_class = estimates(x, alpha, sigma, members(torch.full((COUNT,), k)))
            for total, conditional, unconditional in zip((clean, noise), of_class, base):
                total += (SCALES * q[:, k])[:, None] * (conditional - unconditional)
        assert_same(path, "epsilon", found, (clean, noise, noise))


def doors_of(path: NoisePath) -> tuple[Any, Any]:
    """-log p(y | x_t) as a loss, and the gradient of log p(y | x_t)."""
    classifier = classifier_of(path)

    def loss(x: Tensor, t: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(classifier(x, t), labels, reduction="none")

    def gradient(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return -torch.autograd.grad(loss(x, t, **cond).sum(), x)[0]

    return loss, gradient


def test_a_loss_or_a_gradient_in_place_of_a_classifier() -> None:
    for path in LEVELS["flow"]:
        wanted = guided(path, "flow", CFG(SCALES))
        loss, gradient = doors_of(path)
        by_loss = ClassifierGuidance(None, SCALES, loss=loss, cfg=CFG(0.0))
        for guidance in (by_loss, GradientGuidance(gradient, SCALES, cfg=CFG(0.0))):
            assert_same(path, "flow", guided(path, "flow", guidance), wanted)


def test_pure_noise_has_no_gradient() -> None:
    """At alpha = 0 the state holds nothing of the sample: no classifier is asked. A conditional model still knows the
    class, so that the two guidances differ there, and nowhere else."""

    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    path = schedules.flow().path(sigmas=[1.0])
    found = guided(path, "flow", ClassifierGuidance(never, 5.0, cfg=CFG(0.0)))
    for one, other in zip(found, guided(path, "flow", CFG(0.0))):
        assert torch.equal(one, other)
    assert (found[0] - guided(path, "flow", CFG(5.0))[0]).abs().max() > 1


# ---- whole runs --------------------------------------------------------------------------------------------------
RUNS = {
    "cosine": ("epsilon", schedules.cosine().path(20)),
    "edm": ("edm", schedules.edm().path(18, sigmas="karras")),
    "flow": ("flow", schedules.flow().path(sigmas=np.linspace(0.98, 0.03, 20).tolist())),
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "unipc"])
def test_samples_are_those_of_classifier_free_guidance(solver: str, kind: str, backend: str) -> None:
    prediction, path = RUNS[kind]
    noise = torch.randn(COUNT, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * path.init_scale
    classifier = classifier_of(path)
    for guidance, scales in (
        (ClassifierGuidance(classifier, SCALES, cfg=CFG(0.0)), SCALES),
        (ClassifierGuidance(classifier, SCALES), 1 + SCALES),
    ):
        found, wanted = (run(path, solver, prediction, g, noise, backend=backend) for g in (guidance, CFG(scales)))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


# ---- the order of a guided run -----------------------------------------------------------------------------------
SCALE, START, END = 3.0, 2.5, 0.4
COUNTS = (32, 45, 64)


def starts() -> Tensor:
    return torch.randn(COUNT, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * START


@cache
def truth() -> Tensor:
    """The ODE of the guided score, integrated to 1e-13."""

    def denoise(y: Any, s: float) -> Any:
        x = torch.from_numpy(y.reshape(COUNT, 2))
        unconditional, conditional = (estimates(x, 1.0, s, chosen)[0] for chosen in (ALL, members(LABELS)))
        return (unconditional + SCALE * (conditional - unconditional)).numpy().ravel()

    return torch.from_numpy(exact(starts().numpy().ravel(), START, END, denoise).reshape(COUNT, 2))


def order(sample: Any, kind: str) -> float:
    """Fitted to the errors of sample(path, x)."""
    errors = []
    for n in COUNTS:
        path = path_of_ratios(kind, uniform(n, START, END))
        out = sample(path, starts() * path.alpha[0]) / path.alpha[-1]
        errors.append(float((out - truth()).square().mean().sqrt()))
    return fitted_order(COUNTS, errors)


@pytest.mark.parametrize(
    ("solver", "kind"),
    [("ddim", "vp"), ("dpmpp_2m", "vp"), ("dpmpp_2m", "flow"), ("dpmpp_2m", "edm"), ("heun", "vp"), ("unipc", "vp")],
)
def test_guidance_keeps_the_order(solver: str, kind: str) -> None:
    """The history of a multistep solver holds guided D's."""

    def sample(path: NoisePath, x: Tensor) -> Tensor:
        return run(path, solver, "sample", ClassifierGuidance(classifier_of(path), SCALE, cfg=CFG(0.0)), x)

    assert order(sample, kind) == pytest.approx(solvers.entry(solver).started, abs=0.15)


def test_a_gradient_added_outside_of_the_plan_is_of_order_1() -> None:
    """The control: the same term, put into x after each step, so that the history holds unguided D's."""

    def sample(path: NoisePath, x: Tensor) -> Tensor:
        plan = pyguide.compile("dpmpp_2m", path, prediction="sample", editable=True)
        model, before = network_of(path, "sample"), [x]

        def shift(event: pyguide.Event) -> Tensor:
            here, ahead = path.level(event.step), path.level(event.step + 1)
            conditional, unconditional = (
                estimates(before[-1], here.alpha, here.sigma, chosen)[0] for chosen in (members(LABELS), ALL)
            )
            weight = -ahead.alpha * np.expm1(here.lam - ahead.lam)  # that of D in a step of the first order
            before.append(event.x + SCALE * weight * (conditional - unconditional))
            return before[-1]

        return Sampler(lambda x, t: model(x, t, ALL), plan, backend="reference")(x, blend=shift)

    assert order(sample, "vp") == pytest.approx(1, abs=0.15)


# ---- examples/gaussians.py -----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_example_draws_its_figure(tmp_path: Path) -> None:
    out = tmp_path / "figure.png"
    command = [sys.executable, EXAMPLE, "--out", out, "--samples", "8", "--steps", "10", "--strengths", "0", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    distance = re.fullmatch(r".*figure\.png: .* differ by at most (\S+)\n", done.stdout)
    assert distance, done.stdout
    assert float(distance[1]) < 1e-10
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert height > width > 200  # four rows, two columns


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_the_densities_of_the_example_are_those_of_the_paper(w: float) -> None:
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    line = np.linspace(-module.REACH, module.REACH, 61)
    x, y = np.meshgrid(line, line)
    squares = np.stack([(x - a) ** 2 + (y - b) ** 2 for a, b in module.MEANS.tolist()])
    likelihood = np.exp(-squares / (2 * module.WIDTH**2))
    wanted = likelihood * (likelihood / likelihood.sum(0)) ** w
    wanted /= wanted.sum((1, 2), keepdims=True)
    np.testing.assert_allclose(module.densities(w, 61), wanted, rtol=1e-11)
