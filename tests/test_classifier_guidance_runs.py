"""What a classifier sees and when it is called: labels, losses, chunks, precision, counts; and every error by name."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from classifiers import CLASSES, PIXELS, Classifier, log_prob_grad, model, noise  # noqa: E402

import pyguide  # noqa: E402
from pyguide import schedules  # noqa: E402
from pyguide.guidance import ClassifierGuidance, GradientGuidance  # noqa: E402

STEPS = 6
LABELS = torch.tensor([1, 4, 0])
COND = {"labels": LABELS}


def plan_of(solver: str = "ddim", **options: Any) -> Any:
    return pyguide.compile(solver, schedules.linear().path(STEPS, offset=1), **options)


def run(guidance: Any, backend: str = "reference", *, start: Any = None, cond: Any = COND, **settings: Any) -> Any:
    call = {name: settings.pop(name) for name in ("uncond", "conds", "seeds", "callback") if name in settings}
    sampler = pyguide.Sampler(
        settings.pop("net", model), settings.pop("plan", plan_of()), guidance, backend=backend, **settings
    )
    return sampler(noise(3) if start is None else start, cond=cond, **call)


def close(a: Any, b: Any) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-10, atol=1e-10))


# ---- what the gradient is of ----------------------------------------------------------------------------------------
def test_a_loss_is_lowered(backend):
    """loss = -log p(labels | x), one number per sample or their sum, is the classifier."""
    classifier = Classifier()

    def loss(x: Any, t: Any, labels: Any) -> Any:
        return -torch.log_softmax(classifier(x, t), -1)[range(len(labels)), labels]

    expected = run(ClassifierGuidance(classifier, 2.0), backend)
    assert close(run(ClassifierGuidance(None, 2.0, loss=loss), backend), expected)
    total = ClassifierGuidance(None, 2.0, loss=lambda x, t, labels: loss(x, t, labels).sum())
    assert close(run(total, backend), expected)
    scales = torch.tensor([0.5, 2.0, 1.0])
    own = ClassifierGuidance(None, scales, loss=loss)
    assert close(run(own, backend), run(ClassifierGuidance(classifier, scales), backend))


def test_a_gradient_of_ones_own(backend):
    """As guided-diffusion's cond_fn: the scale inside, or beside it; numpy functions for numpy noise."""
    classifier = Classifier()
    expected = run(ClassifierGuidance(classifier, 2.0), backend)
    inside = GradientGuidance(lambda x, t, labels: 2 * log_prob_grad(classifier, x, t, labels))
    beside = GradientGuidance(lambda x, t, labels: log_prob_grad(classifier, x, t, labels), 2.0)
    assert close(run(inside, backend), expected)
    assert close(run(beside, backend), expected)
    numbers = GradientGuidance(
        lambda x, t, labels: log_prob_grad(classifier, *map(torch.from_numpy, (x, t.copy(), labels))).numpy(), 2.0
    )
    net = lambda x, t, labels: model(*map(torch.from_numpy, (x, t, labels))).numpy()  # noqa: E731
    got = run(numbers, backend, start=noise(3).numpy(), cond={"labels": LABELS.numpy()}, net=net)
    assert isinstance(got, np.ndarray)
    assert close(torch.from_numpy(got), expected)


def test_a_gradient_that_is_the_state_itself(backend):
    """Of log p = |x|^2 / 2: what the function returns lies where the step writes."""
    got = run(GradientGuidance(lambda x, t, labels: x, 0.1), backend)
    assert close(got, run(GradientGuidance(lambda x, t, labels: x * 0.1), backend))


def test_a_run_that_is_given_up_leaves_nothing_behind(backend):
    """No cycle keeps its arrays until somebody collects garbage."""
    classifier = Classifier()
    sampler = pyguide.Sampler(model, plan_of(), ClassifierGuidance(classifier, 1.0), backend=backend)
    gc.disable()
    try:
        next(sampler.stream(noise(3), cond=COND))
        assert len(sampler._spare._free) == 1
    finally:
        gc.enable()


def test_numpy_noise_and_a_torch_classifier(backend):
    net = lambda x, t, labels: model(*map(torch.from_numpy, (x, t, labels))).numpy()  # noqa: E731
    guidance = ClassifierGuidance(Classifier(), 2.0)
    got = run(guidance, backend, start=noise(3).numpy(), cond={"labels": LABELS.numpy()}, net=net)
    assert isinstance(got, np.ndarray)
    assert close(torch.from_numpy(got), run(guidance, backend))


def test_several_labels_are_any_of_them_and_a_distribution_is_its_mean(backend):
    """log p(Y | x) = log sum_y p(y | x), and sum_y q_y log p(y | x), by torch's own autograd."""
    classifier = Classifier()
    several = torch.tensor([[1, 3], [4, -1], [0, 2]])
    member = torch.zeros(3, CLASSES, dtype=torch.float64)
    for b, row in enumerate(several.tolist()):
        member[b, [label for label in row if label >= 0]] = 1

    def any_of(x: Any, t: Any, labels: Any) -> Any:
        return -torch.log((torch.softmax(classifier(x, t), -1) * member).sum(-1))

    got = run(ClassifierGuidance(classifier, 2.0), backend, conds={"classifier": {"labels": several}}, cond=COND)
    assert close(got, run(ClassifierGuidance(None, 2.0, loss=any_of), backend))
    q = torch.rand(3, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mean(x: Any, t: Any, labels: Any) -> Any:
        return -(q * torch.log_softmax(classifier(x, t), -1)).sum(-1)

    got = run(ClassifierGuidance(classifier, 2.0), backend, conds={"classifier": {"labels": q}}, cond=COND)
    assert close(got, run(ClassifierGuidance(None, 2.0, loss=mean), backend))


def test_a_model_without_labels_leaves_them_to_the_classifier(backend):
    guidance = ClassifierGuidance(Classifier(), 2.0)
    got = run(guidance, backend, net=lambda x, t: model(x, t))
    assert close(got, run(guidance, backend, cond=None, conds={"classifier": COND}, net=lambda x, t: model(x, t)))
    assert not close(got, run(guidance, backend))  # the model that sees them answers differently
    null = {"labels": torch.full_like(LABELS, 2)}
    alone = ClassifierGuidance(Classifier(), 2.0, cfg=pyguide.CFG(0.0))
    assert close(run(alone, backend, uncond=null), run(guidance, backend, cond=null, conds={"classifier": COND}))


# ---- when it is called, and for whom --------------------------------------------------------------------------------
def test_scales_belong_to_samples_and_intervals_to_steps(backend):
    """A sample at scale 0 is an unguided one, bit for bit; outside the interval nobody asks the classifier."""
    classifier, start = Classifier(), noise(3)
    plain = run(None, backend)
    scaled = run(ClassifierGuidance(classifier, [2.0, 0.0, 1.0]), backend)
    assert torch.equal(scaled[1], plain[1])
    assert not torch.equal(scaled[0], plain[0])
    classifier.calls.clear()
    assert torch.equal(run(ClassifierGuidance(classifier, 0.0), backend), plain)
    assert classifier.calls == []
    run(ClassifierGuidance(classifier, 2.0, interval=(0.0, 0.5)), backend)
    assert len(classifier.calls) == STEPS // 2
    ramp = run(ClassifierGuidance(classifier, lambda step, steps: 2.0 if step < 3 else 0.0), backend)
    assert torch.equal(ramp, run(ClassifierGuidance(classifier, 2.0, interval=(0.0, 0.5)), backend))
    one = run(ClassifierGuidance(classifier, 1.0), backend, start=start[2:], cond={"labels": LABELS[2:]})
    assert close(one[0], scaled[2])


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_chunks_bound_the_batch_and_change_nothing(chunk, backend):
    classifier = Classifier()
    expected = run(ClassifierGuidance(classifier, [2.0, 0.5, 1.0]), backend)
    classifier.calls.clear()
    got = run(ClassifierGuidance(classifier, [2.0, 0.5, 1.0], chunk=chunk), backend)
    assert close(got, expected)
    assert max(shape[0] for shape in classifier.calls) == min(chunk, 3)
    assert len(classifier.calls) == STEPS * -(-3 // chunk)
    loss = ClassifierGuidance(
        None, 2.0, chunk=chunk, loss=lambda x, t, labels: -classifier(x, t)[range(len(labels)), labels]
    )
    whole = ClassifierGuidance(None, 2.0, loss=loss.loss)
    assert close(run(loss, backend), run(whole, backend))


def test_the_log_probability_is_shown(backend):
    classifier, events = Classifier(), []
    run(ClassifierGuidance(classifier, 2.0), backend, callback=events.append)
    x, t = noise(3), torch.full((3,), events[0].timestep, dtype=torch.float64)
    for event in events:
        t.fill_(event.timestep)
        expected = torch.log_softmax(classifier(x, t), -1)[range(3), LABELS]
        assert close(event.log_prob, expected)
        x = event.x
    assert events[-1].log_prob.mean() > events[0].log_prob.mean()  # guidance does what it is for
    run(None, backend, callback=events.append)
    assert events[-1].log_prob is None


def test_the_event_shows_the_guided_clean_sample(backend):
    """D of the score form: from the rows DDIM's x' = alpha' D + sigma' (x - alpha D) / sigma, which it must satisfy."""
    plan, x = plan_of(), noise(3)
    path, events = schedules.linear().path(STEPS, offset=1), []
    run(ClassifierGuidance(Classifier(), 2.0), backend, plan=plan, callback=events.append)
    for i, event in enumerate(events):
        E = (x - path.alpha[i] * event.denoised) / path.sigma[i]
        assert close(event.x, path.alpha[i + 1] * event.denoised + path.sigma[i + 1] * E)
        x = event.x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_classifier_in_low_precision_gives_a_float32_gradient(dtype, backend):
    """It sees x in its own dtype; what comes back is float32, as far from float64 as its own rounding takes it."""
    seen: list[Any] = []

    class Low(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Classifier().to(dtype)

        def forward(self, x: Any, t: Any) -> Any:
            seen.append(x.dtype)
            return self.inner(x, t)

    plan, x32 = plan_of(), noise(3, torch.float32)
    exact = run(ClassifierGuidance(Classifier(), 2.0), backend, plan=plan)
    low = run(ClassifierGuidance(Low(), 2.0), backend, plan=plan, start=x32)
    assert set(seen) == {dtype}
    assert low.dtype == torch.float32
    plain = run(None, backend, plan=plan)
    assert (low - exact).abs().max() < 0.1 * (exact - plain).abs().max()


def test_a_classifier_that_sees_the_models_own_input(backend):
    """c_in x, with the chain factor c_in: a classifier of c_in x is the classifier of x that scales it itself."""
    path = schedules.edm().path(STEPS)
    plan, classifier = pyguide.compile("heun", path, prediction="edm"), Classifier()
    levels = {float(t): float(row.c_in) for t, row in zip(plan.timestep, plan.rows, strict=False)}

    def scaling(x: Any, t: Any) -> Any:
        return classifier(x * levels[float(t[0])], t)

    start = noise(3) * path.init_scale
    got = run(ClassifierGuidance(classifier, 2.0, scaled=True), backend, plan=plan, start=start)
    assert close(got, run(ClassifierGuidance(scaling, 2.0), backend, plan=plan, start=start))
    given = GradientGuidance(lambda x, t, labels: log_prob_grad(classifier, x, t, labels), 2.0, scaled=True)
    assert close(got, run(given, backend, plan=plan, start=start))
    assert not close(got, run(ClassifierGuidance(classifier, 2.0), backend, plan=plan, start=start))


def test_a_compiled_classifier(backend):
    classifier = Classifier()
    expected = run(ClassifierGuidance(classifier, 2.0), backend)
    compiled = torch.compile(classifier, backend="aot_eager", fullgraph=False)
    assert close(run(ClassifierGuidance(compiled, 2.0), backend), expected)


# ---- errors ---------------------------------------------------------------------------------------------------------
WRONG = [
    ({"classifier": None}, ValueError, "classifier: expected a classifier or a loss, got neither"),
    ({"loss": lambda x, t: x}, ValueError, "classifier: expected a classifier or a loss, got both"),
    ({"classifier": 3}, TypeError, "classifier: expected a function or a model, got int"),
    ({"form": "shift"}, ValueError, "form: expected"),
    ({"chunk": 0}, ValueError, "chunk: expected a number of samples"),
    ({"cfg": 7.5}, TypeError, "cfg: expected a method such as CFG"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ({"interval": (0.5, 0.2)}, ValueError, "interval: expected"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_wrong_arguments(changes, error, message):
    arguments = {"classifier": Classifier(), "scale": 1.0, **changes}
    with pytest.raises(error, match=message):
        ClassifierGuidance(**arguments)


LABELLED = [
    ({}, ValueError, "labels: expected what the classifier is to see"),
    ({"labels": torch.tensor([0, 1, CLASSES])}, ValueError, "labels: expected classes below 5, .* got 5"),
    ({"labels": torch.tensor([0, 1, -1])}, ValueError, r"labels: expected classes from 0, and sample 2 has \[-1\]"),
    ({"labels": torch.tensor([0, 1])}, ValueError, r"labels.*: expected one row per sample \(3\)"),
    ({"labels": torch.full((3, CLASSES + 1), 0.1)}, ValueError, "labels: .* over 5 classes, got one over 6"),
    ({"labels": torch.full((3, CLASSES), -0.1)}, ValueError, "labels: a distribution is"),
    ({"labels": torch.tensor([True, False, True])}, TypeError, "labels: expected integers"),
    ({"labels": "cat"}, ValueError, "labels: expected classes"),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "error", "message"), LABELLED)
def test_labels_that_do_not_fit(seen, error, message, backend):
    with pytest.raises(error, match=message):
        run(ClassifierGuidance(Classifier(), 1.0), backend, cond=None, conds={"classifier": seen})


def detached(x: Any, t: Any) -> Any:
    return Classifier()(x.detach(), t)


def blind(x: Any, t: Any) -> Any:
    return torch.ones(len(x), CLASSES, dtype=x.dtype, requires_grad=True) * 2


BROKEN = [
    (lambda x, t: Classifier()(x.detach(), t).detach(), ValueError, "classifier: is not differentiable"),
    (blind, ValueError, "classifier: its output does not depend on x, so that the gradient is None"),
    (lambda x, t: x.flatten(1).detach().numpy(), TypeError, "classifier: expected a torch tensor, got ndarray"),
    (lambda x, t: x, ValueError, r"classifier: expected logits \[3, classes\], got shape \(3, 2, 3, 3\)"),
    (lambda x, t: x.flatten(1)[:1], ValueError, r"classifier: expected logits \[3, classes\]"),
]


@pytest.mark.parametrize(("classifier", "error", "message"), BROKEN)
def test_classifiers_that_give_no_gradient(classifier, error, message, backend):
    with pytest.raises(error, match=message):
        run(ClassifierGuidance(classifier, 1.0), backend)


def test_losses_and_gradients_of_the_wrong_shape(backend):
    with pytest.raises(
        ValueError, match=r"loss: expected one number per sample \[3\] or their sum, got shape \(3, 18\)"
    ):
        run(ClassifierGuidance(None, 1.0, loss=lambda x, t, labels: x.flatten(1)), backend)
    with pytest.raises(ValueError, match="loss: expected one number per sample"):
        run(ClassifierGuidance(None, [1.0, 2.0, 3.0], loss=lambda x, t, labels: x.sum()), backend)
    with pytest.raises(ValueError, match=r"gradient: expected shape \(3, 2, 3, 3\), like x, got \(3,\)"):
        run(GradientGuidance(lambda x, t, labels: x[:, 0, 0, 0]), backend)
    with pytest.raises(TypeError, match="gradient: expected Tensor, like the noise, got NoneType"):
        run(GradientGuidance(lambda x, t, labels: None), backend)


def test_nan_is_reported_and_stays_with_its_sample(backend):
    def sick(x: Any, t: Any) -> Any:
        return classifier(x, t) + torch.tensor([0.0, float("nan"), 0.0])[:, None]

    classifier = Classifier()
    with pytest.raises(FloatingPointError, match=r"classifier: NaN or infinite logits for samples \[1\]"):
        run(ClassifierGuidance(sick, 1.0), backend, check="raise")
    got, healthy = run(ClassifierGuidance(sick, 1.0), backend), run(ClassifierGuidance(classifier, 1.0), backend)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], healthy[[0, 2]])


UNFIT = [
    ("score", "ddim", {"clip": 1.0}, "form: 'score' moves D and E together.*use_clipped_model_output=True"),
    ("score", "ddpm", {"variance": "learned_range"}, "form: 'score' cannot be had with a learned variance"),
    ("mean", "ddim", {}, "form: 'mean' scales the gradient by the variance.*adds no noise"),
    ("mean", "dpmpp_2m", {}, "form: 'mean' shifts the mean of a Gaussian transition, and dpmpp_2m"),
    ("mean", "dpmpp_sde", {}, "form: 'mean' shifts the mean of a Gaussian transition"),
    ("input", "dpmpp_2m", {}, "form: 'input' changes x between the steps of dpmpp_2m; compile.*editable=True"),
]


@pytest.mark.parametrize(("form", "solver", "options", "message"), UNFIT)
def test_forms_that_a_plan_cannot_carry(form, solver, options, message):
    with pytest.raises(ValueError, match=message):
        pyguide.Sampler(model, plan_of(solver, **options), ClassifierGuidance(Classifier(), 1.0, form=form))


def test_channels_that_do_not_fit_the_variance(backend):
    def twice(x: Any, t: Any, labels: Any) -> Any:
        return torch.cat([model(x, t, labels), torch.zeros_like(x)], 1)

    with pytest.raises(ValueError, match=r"model: expected .* shape \(3, 2, 3, 3\), got \(3, 4, 3, 3\); twice"):
        run(None, backend, net=twice)
    learned = plan_of("ddpm", variance="learned_range")
    with pytest.raises(ValueError, match=r"\(3, 4, 3, 3\), 2 channels and as many of its learned variance, got \(3, 2"):
        run(None, backend, plan=learned, seeds=0)
    run(None, backend, plan=learned, net=twice, seeds=0)


def test_a_classifier_outside_of_torch_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    kind, value = onnx.TensorProto.FLOAT, onnx.helper.make_tensor_value_info
    inputs = [value("x", kind, ["n", PIXELS]), value("t", kind, ["n"])]
    node = onnx.helper.make_node("Identity", ["x"], ["out"])
    graph = onnx.helper.make_graph([node], "g", inputs, [value("out", kind, ["n", PIXELS])])
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), str(tmp_path / "classifier.onnx"))
    with pytest.raises(TypeError, match="classifier: OnnxSession runs outside of torch"):
        pyguide.Sampler(model, plan_of(), ClassifierGuidance(str(tmp_path / "classifier.onnx"), 1.0))


def test_a_classifier_that_is_told_another_time_is_refused():
    wrapped = pyguide.models.wrap(Classifier(), time="sigma")
    with pytest.raises(ValueError, match="classifier: is told time as 'sigma', and the model as 'timestep'"):
        pyguide.Sampler(model, plan_of(), ClassifierGuidance(wrapped, 1.0))
