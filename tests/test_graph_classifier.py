"""Classifier guidance in the captured loop: forward, backward and both kernels in one graph, no row baked in."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import recorded  # noqa: E402
from classifiers import Classifier, log_prob_grad, model, noise  # noqa: E402

import pyguide  # noqa: E402
from pyguide import schedules  # noqa: E402
from pyguide.guidance import ClassifierGuidance, GradientGuidance  # noqa: E402

STEPS, CLASSIFIER = 6, Classifier()
LABELS = torch.tensor([1, 4, 0])


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, simulated) -> recorded.Recorder:
    return recorded.install(monkeypatch, simulated)


def loss(x: Any, t: Any, labels: Any) -> Any:
    return -torch.log_softmax(CLASSIFIER(x, t), -1).gather(1, labels[:, None])[:, 0]


def gradient(x: Any, t: Any, labels: Any) -> Any:
    return log_prob_grad(CLASSIFIER, x, t, labels)


GUIDANCE = {
    "classifier": lambda **form: ClassifierGuidance(Classifier(), [2.0, 0.0, 0.5], **form),
    "chunked": lambda **form: ClassifierGuidance(Classifier(), lambda step, steps: 1.0 + step, chunk=2, **form),
    "loss": lambda **form: ClassifierGuidance(None, lambda step, steps: 1.0 + step, loss=loss, **form),
    "gradient": lambda **form: GradientGuidance(gradient, [2.0, 1.0, 0.5], **form),
}
FORMS = {
    "score": lambda: pyguide.compile("dpmpp_2m", schedules.linear().path(STEPS, offset=1)),
    "mean": lambda: pyguide.compile("ddpm", schedules.linear().path(STEPS, offset=1), variance="large"),
    "input": lambda: pyguide.compile("dpmpp_2m", schedules.linear().path(STEPS, offset=1), editable=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", GUIDANCE)
def test_equals_the_eager_loop_bit_for_bit(kind, form, recorder):
    plan, start, told = FORMS[form](), noise(3, torch.float32), {"cond": {"labels": LABELS}, "seeds": 5}
    eager = pyguide.Sampler(model, plan, GUIDANCE[kind](form=form))(start, **told)
    captured = pyguide.Sampler(model, plan, GUIDANCE[kind](form=form), cuda_graph=True)
    for run in (1, 2):
        assert torch.equal(captured(start, **told), eager), run
    assert recorder.recorded == (2 if form == "input" else 1)  # whose classifier has evaluations of its own
    evaluations = 2 * STEPS - 1 if form == "input" else STEPS
    assert recorder.replayed == 2 * evaluations


def test_the_scaled_input_and_the_interval(recorder):
    """c_in differs from row to row: a graph reads it on the device. Outside the interval another graph is replayed."""
    path = schedules.edm().path(STEPS)
    plan, start = pyguide.compile("heun", path, prediction="edm"), noise(3, torch.float32) * path.init_scale
    guidance = ClassifierGuidance(Classifier(), 2.0, scaled=True, interval=(0.0, 0.5))
    eager = pyguide.Sampler(model, plan, guidance)(start, cond={"labels": LABELS})
    captured = pyguide.Sampler(model, plan, guidance, cuda_graph=True)
    assert torch.equal(captured(start, cond={"labels": LABELS}), eager)
    assert recorder.recorded == 2


def test_later_runs_bring_their_own_labels_and_scales(recorder):
    plan, start, scale = FORMS["score"](), noise(3, torch.float32), [1.0]
    guidance = ClassifierGuidance(Classifier(), lambda step, steps: scale[0])
    captured = pyguide.Sampler(model, plan, guidance, cuda_graph=True)
    results = []
    for scale[0], labels in ((1.0, LABELS), (2.0, LABELS), (2.0, LABELS.flip(0))):
        told = {"cond": {"labels": torch.zeros_like(LABELS)}, "conds": {"classifier": {"labels": labels}}}
        results.append(captured(start, **told))
        assert torch.equal(results[-1], pyguide.Sampler(model, plan, guidance)(start, **told))
    assert recorder.recorded == 1
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.parametrize("scale", [3.0, lambda step, steps: 1.0 + step % 2], ids=["one graph", "two graphs"])
def test_events(scale, recorder):
    """A replay does not come back to Python: what it left behind is still this evaluation's, in every run."""
    plan, start, guidance = FORMS["score"](), noise(3, torch.float32), ClassifierGuidance(Classifier(), 1.0)
    guidance.cfg = pyguide.CFG(scale)
    told = {"cond": {"labels": LABELS}, "uncond": {"labels": LABELS * 0}}
    eager = list(pyguide.Sampler(model, plan, guidance).stream(start, **told))
    captured = pyguide.Sampler(model, plan, guidance, cuda_graph=True)
    for run in (1, 2):
        for a, b in zip(eager, captured.stream(start, **told), strict=True):
            assert torch.equal(a.x, b.x), run
            assert torch.equal(a.denoised, b.denoised), run
            assert torch.equal(a.log_prob, b.log_prob), run


def test_nan_is_flagged_in_replays_too(recorder):
    sick = torch.zeros(3, 1)
    classifier = Classifier()
    guidance = ClassifierGuidance(lambda x, t: classifier(x, t) + sick, 1.0)
    captured = pyguide.Sampler(model, FORMS["score"](), guidance, cuda_graph=True, check="raise")
    captured(noise(3, torch.float32), cond={"labels": LABELS})
    sick[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"classifier: NaN or infinite logits for samples \[1\]"):
        captured(noise(3, torch.float32), cond={"labels": LABELS})
    assert recorder.recorded == 1


def test_labels_are_checked_in_later_runs_too(recorder):
    """A replay does not ask the classifier how many classes it has."""
    captured = pyguide.Sampler(model, FORMS["score"](), ClassifierGuidance(Classifier(), 1.0), cuda_graph=True)
    captured(noise(3, torch.float32), cond={"labels": LABELS})
    with pytest.raises(ValueError, match=r"labels: expected classes below 5, .* got 54"):
        captured(noise(3, torch.float32), cond={"labels": LABELS + 50})


def test_a_module_whose_weights_move_is_recorded_again(recorder):
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Any, t: Any, labels: Any) -> Any:
            return (x * self.gain).square().flatten(1).sum(1)

    module, plan, start = Loss(), FORMS["score"](), noise(3, torch.float32)
    guidance = ClassifierGuidance(None, 0.1, loss=module)
    captured = pyguide.Sampler(model, plan, guidance, cuda_graph=True)
    for value in (1.0, 2.0):
        module.gain = torch.nn.Parameter(torch.tensor(value))
        eager = pyguide.Sampler(model, plan, guidance)(start, cond={"labels": LABELS})
        assert torch.equal(captured(start, cond={"labels": LABELS}), eager)
    assert recorder.recorded == 2
