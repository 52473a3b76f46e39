"""Classifier guidance on a GPU: against the float64 reference loop, captured, two launches an evaluation, no waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from classifiers import SHAPE, Classifier, model, noise
from gpu_support import DEVICE, real

import pyguide
from pyguide import CFG, ClassifierGuidance, GradientGuidance, Sampler, schedules
from pyguide.bench.classifier import FreeClassifier
from pyguide.bench.clock import CudaClock
from pyguide.bench.gpu import counts
from pyguide.bench.gpu.setup import FULL, Setup

STEPS, BATCH = 6, 5
F32, F64 = torch.float32, torch.float64
LABELS = torch.tensor([1, 4, 0, 2, 2])
SCALES = [2.0, 0.0, 0.5, 1.0, 3.0]
MANY = torch.tensor([[1, 3], [4, -1], [0, 2], [2, 2], [-1, 0]])
SHARES = torch.softmax(torch.arange(25.0, dtype=F64).reshape(5, 5).sin() * 2, 1)
VP = schedules.linear()


def wide(x: Any, t: Any, labels: Any = None) -> Any:
    """The model with the channels of a learned variance."""
    return torch.cat([model(x, t, labels), torch.tanh(0.5 * x)], 1)


def plan_of(form: str, steps: int = STEPS) -> Any:
    path = VP.path(steps, offset=1)
    if form in ("mean", "learned"):
        return pyguide.compile("ddpm", path, clip=1.0, variance="large" if form == "mean" else "learned_range")
    return pyguide.compile("dpmpp_2m", path, clip=1.0, editable=form == "input")


FORMS = {"score": "score", "mean": "mean", "learned": "mean", "input": "input"}
STOCHASTIC = ("mean", "learned")


def sampler_of(form: str, classifier: Any, *, cfg: Any = None, **settings: Any) -> Sampler:
    guidance = ClassifierGuidance(classifier, SCALES, form=FORMS[form], cfg=cfg, chunk=settings.pop("chunk", None))
    return Sampler(wide if form == "learned" else model, plan_of(form), guidance, **settings)


def told(form: str, dtype: Any = F32, device: str = DEVICE, labels: Any = LABELS) -> dict[str, Any]:
    """The same numbers for every device and precision."""
    drawn = [noise(BATCH, F32, seed=40 + i).to(device, dtype) for i in range(STEPS - 1)]
    given: dict[str, Any] = {"noises": drawn} if form in STOCHASTIC else {}
    seen = labels.to(dtype) if labels.is_floating_point() else labels
    conds = {"cond": {"labels": LABELS.to(device)}, "classifier": {"labels": seen.to(device)}}
    return {**given, "conds": conds}


def start(dtype: Any = F32, device: str = DEVICE) -> Any:
    return noise(BATCH, F32).to(device, dtype)


# each evaluation sums 18 and 12 terms forth and back and 10 in the step, on numbers no larger than these
ROOM = 4 * 2.0**-24 * STEPS * (2 * (18 + 12) + 10)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_reference_loop_in_float64(form, captured, fused):
    exact = sampler_of(form, Classifier(), backend="reference")(start(F64, "cpu"), **told(form, F64, "cpu"))
    sampler = sampler_of(form, Classifier().to(DEVICE), backend=fused, cuda_graph=captured)
    for _ in range(2):
        found = sampler(start(), **told(form)).cpu().double()
        assert float((found - exact).abs().max()) <= ROOM * max(1.0, float(exact.abs().max()))
    plain = Sampler(sampler.model, plan_of(form), backend="reference")
    given = told(form, F64, "cpu")
    del given["conds"]["classifier"]
    assert float((plain(start(F64, "cpu"), **given) - exact).abs().max()) > 0.01  # the negative control


@pytest.mark.parametrize("labels", [LABELS, MANY, SHARES], ids=["labels", "several", "distribution"])
def test_labels_and_log_prob(labels, fused):
    """log p(y | x) of every evaluation, and what several labels and a distribution guide to."""
    runs = []
    for device, dtype, backend in (("cpu", F64, "reference"), (DEVICE, F32, fused)):
        sampler = sampler_of("score", Classifier().to(device), backend=backend)
        runs.append(list(sampler.stream(start(dtype, device), **told("score", dtype, device, labels))))
    for exact, found in zip(*runs, strict=True):
        assert found.log_prob.dtype == F32
        for name in ("x", "denoised", "log_prob"):
            wanted, got = getattr(exact, name), getattr(found, name).cpu().double()
            assert float((got - wanted).abs().max()) <= ROOM * max(1.0, float(wanted.abs().max())), name


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_the_captured_loop_is_the_eager_one_bit_for_bit(form, chunk, fused):
    classifier = Classifier().to(DEVICE)
    eager, captured = (
        sampler_of(form, classifier, chunk=chunk, backend=fused, cuda_graph=on_graph) for on_graph in (False, True)
    )
    results = []
    for labels in (LABELS, MANY[:, :1].abs()[:, 0], LABELS.flip(0)):  # values are data, and no new graph
        results.append(eager(start(), **told(form, labels=labels)))
        assert torch.equal(captured(start(), **told(form, labels=labels)), results[-1])
    assert not torch.equal(results[0], results[2])
    assert f"cuda_graph={2 if form == 'input' else 1} recorded" in repr(captured)


@pytest.mark.parametrize("captured", [False, True])
def test_with_classifier_free_guidance(captured, fused):
    runs = []
    for device, dtype, backend in (("cpu", F64, "reference"), (DEVICE, F32, fused)):
        settings = {"backend": backend, "cuda_graph": captured and device == DEVICE and backend == fused}
        sampler = sampler_of("mean", Classifier().to(device), cfg=CFG(2.5), **settings)
        given = told("mean", dtype, device)
        given["conds"]["uncond"] = {"labels": torch.zeros_like(LABELS).to(device)}
        runs.append(sampler(start(dtype, device), **given).cpu().double())
    assert float((runs[1] - runs[0]).abs().max()) <= 4 * ROOM * max(1.0, float(runs[0].abs().max()))  # |1 - w| + w = 4


def test_a_gradient_of_ones_own(fused):
    classifier = Classifier().to(DEVICE)

    def gradient(x: Any, t: Any, labels: Any) -> Any:  # an index from the host would be a copy, which no capture takes
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            chosen = torch.log_softmax(classifier(leaf, t), -1).gather(1, labels[:, None])
            return torch.autograd.grad(chosen.sum(), leaf)[0]

    expected = sampler_of("score", classifier, backend=fused)(start(), **told("score"))
    for captured in (False, True):
        given = Sampler(model, plan_of("score"), GradientGuidance(gradient, SCALES), backend=fused, cuda_graph=captured)
        found = given(start(), **told("score"))
        assert float((found - expected).abs().max()) <= ROOM * max(1.0, float(expected.abs().max()))


def test_logits_that_are_not_finite_are_told_by_sample(fused):
    classifier = Classifier().to(DEVICE)

    def spoilt(x: Any, t: Any) -> Any:
        logits = classifier(x, t)
        return logits + torch.zeros_like(logits).masked_fill(
            torch.arange(BATCH, device=x.device)[:, None] == 3, torch.inf
        )

    for captured in (False, True):
        sampler = sampler_of("score", spoilt, backend=fused, check="raise", cuda_graph=captured)
        with pytest.raises(FloatingPointError, match=r"classifier: NaN or infinite logits for samples \[3\]"):
            sampler(start(), **told("score"))


# ---- what is launched -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def measuring():
    return Setup(CudaClock("cuda:0"), FULL, ("native", "triton"), None, False, 1, 0.0)


def free_run(form: str, steps: int, backend: str, captured: bool) -> Any:
    """A run around a model and a classifier that put nothing on the GPU."""
    plan = plan_of(form, steps)
    out = torch.randn((BATCH, SHAPE[0] * (1 + plan.learned_variance), *SHAPE[1:]), device=DEVICE)
    free = FreeClassifier(torch.randn(BATCH, 1000, device=DEVICE), torch.randn((BATCH, *SHAPE), device=DEVICE))
    guidance = ClassifierGuidance(free, SCALES, form=FORMS[form])
    sampler = Sampler(lambda x, t: out, plan, guidance, backend=backend, cuda_graph=captured)
    given, seeds = {"labels": LABELS.to(DEVICE)}, 7 if form in STOCHASTIC else None
    return lambda: sampler(start(), cond=given, seeds=seeds)


@real
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("form", ["score", "mean", "learned"])
def test_two_launches_an_evaluation_outside_of_the_models(form, captured, fused, measuring):
    short, long = (free_run(form, steps, fused, captured) for steps in (5, 25))
    found = counts.per_evaluation(short, long, 20, measuring)
    assert found == {"launches": 2, "copies": 0, "copies_from_host": 0, "synchronisations": 0}


@real
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_in_the_loop_waits(form, captured, fused):
    """torch refuses every call that waits for the device, from the first evaluation to the end of the last."""
    sampler = sampler_of(form, Classifier().to(DEVICE), backend=fused, cuda_graph=captured)
    sampler(start(), **told(form))  # captures and compiles wait
    rows = []

    def callback(event: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if event.row < STEPS - 1 else "default")
        rows.append(event.row)

    try:
        sampler(start(), **told(form), callback=callback)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows == list(range(STEPS))
