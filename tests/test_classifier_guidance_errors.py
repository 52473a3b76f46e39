"""Every error of classifier guidance names the argument, what came and what was expected."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from classifiers import CLASSES, COND, LABELS, PIXELS, Classifier, model, noise, plan_of, run  # noqa: E402

import pyguide  # noqa: E402
from pyguide.guidance import ClassifierGuidance, GradientGuidance  # noqa: E402

WRONG = [
    ({"classifier": None}, ValueError, "classifier: expected a classifier or a loss, got neither"),
    ({"loss": lambda x, t: x}, ValueError, "classifier: expected a classifier or a loss, got both"),
    ({"classifier": None, "loss": "clip"}, TypeError, "loss: expected a function"),
    ({"form": "shift"}, ValueError, "form: expected"),
    ({"chunk": 0}, ValueError, "chunk: expected an integer >= 1"),
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
    ({"labels": torch.full((3, CLASSES), -0.1)}, ValueError, "labels: floating point is a distribution"),
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
    with pytest.raises(TypeError, match=r"gradient: expected float32, .*, got int64"):
        run(GradientGuidance(lambda x, t, labels: x.long()), backend)
    with pytest.raises(ValueError, match="gradient: expected a tensor on cpu, like the noise, got meta"):
        run(GradientGuidance(lambda x, t, labels: x.to("meta")), backend)


def test_scales_that_no_number_holds(backend):
    half = lambda x, t: Classifier()(x, t).half()  # noqa: E731
    with pytest.raises(
        ValueError, match=r"scale: expected numbers that the classifier's torch\.float16 holds, got 100000"
    ):
        run(ClassifierGuidance(half, 1e5), backend)
    with pytest.raises(ValueError, match=r"scale: expected numbers that float32 holds, got 1e\+39"):
        run(ClassifierGuidance(Classifier(), 1e39), backend, start=noise(3, torch.float32))


def test_what_a_classifier_is_told(backend):
    with pytest.raises(ValueError, match=r'conds\["classifier"\]: a classifier is told labels, got'):
        run(ClassifierGuidance(Classifier(), 1.0), backend, conds={"classifier": {"labels": LABELS, "y": LABELS}})
    with pytest.raises(ValueError, match=r"uncond: without guidance .* give the sampler ClassifierGuidance\(..., cfg="):
        run(ClassifierGuidance(Classifier(), 1.0), backend, uncond=COND)


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
    ("mean", "lcm", {}, "form: 'mean' shifts the mean of a Gaussian transition"),
    ("mean", "euler", {"s_churn": 4.0}, "form: 'mean' shifts the mean of a Gaussian transition"),
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


def test_the_usual_mistakes_in_functions_are_named(backend):
    def forgot(x: Any, t: Any, labels: Any) -> Any:
        x = x.clone().requires_grad_(True)
        return torch.autograd.grad(Classifier()(x, t).sum(), x)[0]

    with pytest.raises(ValueError, match=r"gradient: needs torch.enable_grad\(\) around what it differentiates"):
        run(GradientGuidance(forgot), backend)
    with pytest.raises(TypeError, match=r"loss: is called as loss\(x, t, labels\): .* unexpected keyword"):
        run(ClassifierGuidance(None, 1.0, loss=lambda x, t: x.sum()), backend)


def test_labels_that_mean_something_else(backend):
    hot = torch.nn.functional.one_hot(LABELS, CLASSES)
    with pytest.raises(ValueError, match=r"labels: 5 of 0 and 1 for each sample look like a one-hot code"):
        run(ClassifierGuidance(Classifier(), 1.0), backend, conds={"classifier": {"labels": hot}})
    run(ClassifierGuidance(Classifier(), 1.0), backend, conds={"classifier": {"labels": hot.double()}})
    with pytest.raises(ValueError, match=r"labels: .* got torch.float32 of shape \(3,\); classes are integers"):
        run(ClassifierGuidance(Classifier(), 1.0), backend, conds={"classifier": {"labels": LABELS.float()}})
    with pytest.raises(ValueError, match=r"conds: expected .cond. and .classifier., got \['classifer'\]"):
        run(ClassifierGuidance(Classifier(), 1.0), backend, conds={"classifer": {"labels": LABELS}})


def test_a_start_close_to_pure_noise_is_warned_of():
    """sigma^2 / alpha = 2e4 at the last timestep of a cosine schedule; not where that is left out, nor elsewhere."""
    path = pyguide.schedules.cosine().path(10, spacing="trailing")
    plan, ddpm = pyguide.compile("dpmpp_2m", path), pyguide.compile("ddpm", path)
    with pytest.warns(RuntimeWarning, match=r"up to 2e\+04 in dpmpp_2m's first 1 of 10 evaluations"):
        pyguide.Sampler(model, plan, ClassifierGuidance(Classifier(), 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyguide.Sampler(model, plan, ClassifierGuidance(Classifier(), 1.0, interval=(0.1, 1.0)))
        pyguide.Sampler(model, ddpm, ClassifierGuidance(Classifier(), 1.0, form="mean"))
        pyguide.Sampler(model, plan_of(), ClassifierGuidance(Classifier(), 1.0))
