"""What a classifier sees and when it is called: labels, losses, chunks, precision, batches."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from classifiers import (  # noqa: E402
    CLASSES,
    COND,
    LABELS,
    STEPS,
    Classifier,
    close,
    log_prob_grad,
    model,
    noise,
    plan_of,
    run,
)

import pyguide  # noqa: E402
from pyguide import launch, schedules  # noqa: E402
from pyguide.guidance import ClassifierGuidance, GradientGuidance  # noqa: E402


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
def test_a_classifier_in_low_precision_gives_a_float32_gradient(dtype, backend, monkeypatch):
    """It sees x in its own dtype; what comes back is float32, as far from float64 as its own rounding takes it."""
    seen: list[Any] = []
    given: set[Any] = set()

    def attach(self: Any, gradient: Any, variance: Any) -> None:
        given.add(gradient.dtype)
        self.gradient = gradient

    class Low(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Classifier().to(dtype)

        def forward(self, x: Any, t: Any) -> Any:
            seen.append(x.dtype)
            return self.inner(x, t)

    plan, x32 = plan_of(), noise(3, torch.float32)
    exact = run(ClassifierGuidance(Classifier(), 2.0), backend, plan=plan)
    with monkeypatch.context() as patch:
        patch.setattr(launch.Launch, "attach", attach)
        low = run(ClassifierGuidance(Low(), 2.0), backend, plan=plan, start=x32)
    assert given == {torch.float32}
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


def test_logits_that_are_a_negated_view(backend):
    """Whose memory holds the other sign."""
    classifier = Classifier()
    expected = run(ClassifierGuidance(classifier, 2.0), backend)

    def negated(x: Any, t: Any) -> Any:
        logits = classifier(x, t)
        view = torch.complex(torch.zeros_like(logits), -logits).conj().imag
        assert view.is_neg()
        return view

    assert close(run(ClassifierGuidance(negated, 2.0), backend), expected)


def test_a_compiled_classifier(backend):
    classifier = Classifier()
    expected = run(ClassifierGuidance(classifier, 2.0), backend)
    compiled = torch.compile(classifier, backend="aot_eager", fullgraph=False)
    assert close(run(ClassifierGuidance(compiled, 2.0), backend), expected)


@pytest.mark.parametrize(("kind", "what"), [("classifier", "t"), ("loss", "t"), ("gradient", "t"), ("gradient", "x")])
def test_what_writes_to_the_samplers_arrays_is_an_error(kind, what, backend):
    """t is the model's next, x the state: a run that went on would sample something else."""
    classifier = Classifier()

    def writing(x: Any, t: Any, labels: Any = None) -> Any:
        if what == "t":
            t /= 1000
        else:  # of what requires grad, torch itself refuses it
            x *= 0.5
        if kind == "gradient":
            return torch.zeros_like(x)
        out = classifier(x, t)
        return out if kind == "classifier" else -out[:, 0]

    guidance = {
        "classifier": lambda: ClassifierGuidance(writing, 1.0),
        "loss": lambda: ClassifierGuidance(None, 1.0, loss=writing),
        "gradient": lambda: GradientGuidance(writing),
    }[kind]()
    with pytest.raises(ValueError, match=f"{kind}: wrote to x or t in place"):
        run(guidance, backend)


def test_inference_mode(backend):
    """As any sampler runs in it: x and t are copied for the backward pass."""
    path, classifier = plan_of(), Classifier()
    expected = run(ClassifierGuidance(classifier, 2.0), backend, plan=path)
    with torch.inference_mode():
        got = run(ClassifierGuidance(classifier, 2.0), backend, plan=path, start=noise(3))
    assert torch.equal(got, expected)
    sampler = pyguide.Sampler(model, path, ClassifierGuidance(classifier, 2.0), backend=backend)
    for mode in (False, True, False):
        with torch.inference_mode(mode):
            assert torch.equal(sampler(noise(3), cond=COND), expected)


def test_the_log_probability_is_of_this_evaluation(backend):
    """Where nobody asked the classifier there is none."""
    for interval, expected in (((0.0, 0.5), [True] * 3 + [False] * 3), ((0.5, 1.0), [False] * 3 + [True] * 3)):
        events: list[Any] = []
        run(ClassifierGuidance(Classifier(), 2.0, interval=interval), backend, callback=events.append)
        assert [event.log_prob is not None for event in events] == expected
    events = []
    moved = ClassifierGuidance(Classifier(), 0.1, form="input")
    run(moved, backend, plan=plan_of(), callback=events.append)
    assert [event.log_prob is not None for event in events] == [True] * (STEPS - 1) + [False]


def test_a_learned_variance_does_not_depend_on_the_batch(backend):
    """That of the conditional branch, also for a sample whose scale is 0, whoever is beside it."""

    def net(x: Any, t: Any, labels: Any) -> Any:
        return torch.cat([model(x, t, labels), torch.tanh(x + labels.to(x.dtype)[:, None, None, None])], 1)

    plan, start = plan_of("ddpm", variance="learned_range"), noise(2)

    def scaled(*scales: float) -> Any:
        n = len(scales)
        conds = {"cond": {"labels": LABELS[:1].expand(n)}, "uncond": {"labels": LABELS[1:2].expand(n)}}
        return run(
            pyguide.CFG(list(scales)), backend, plan=plan, net=net, start=start[:n], cond=None, conds=conds, seeds=3
        )

    assert torch.equal(scaled(0.0)[0], scaled(0.0, 2.0)[0])
    assert torch.equal(scaled(0.0)[0], scaled(0.0, 0.0)[0])
    assert not torch.equal(scaled(0.0)[0], scaled(1.0)[0])


@pytest.mark.parametrize("source", ["seeds", "noises"])
def test_the_input_form_at_scale_0_draws_the_noise_of_the_plan(source, backend):
    """Its rows are others, the noise of a seed is not."""
    plan = plan_of("ddpm")
    noises = [noise(3, seed=40 + k) for k in range(len(plan.stochastic_rows))]
    told = {"seeds": 5} if source == "seeds" else {"noises": noises}
    nothing, something = (ClassifierGuidance(Classifier(), s, form="input") for s in (0.0, 0.1))
    definition = backend == "reference" and source == "seeds"  # whose normals are those of numpy
    same = close if definition else torch.equal
    assert same(run(nothing, backend, plan=plan, **told), run(None, backend, plan=plan, **told))
    assert not torch.equal(run(something, backend, plan=plan, **told), run(None, backend, plan=plan, **told))


def test_a_function_sees_x_in_the_dtype_of_the_noise(backend):
    seen: set[Any] = set()

    def classifier(x: Any, t: Any) -> Any:
        seen.add(x.dtype)
        return Classifier()(x, t)

    run(ClassifierGuidance(classifier, 1.0), backend, start=noise(3, torch.float16))
    run(
        ClassifierGuidance(None, 1.0, loss=lambda x, t, labels: -classifier(x, t)[:, 0]),
        backend,
        start=noise(3, torch.float16),
    )
    run(
        GradientGuidance(lambda x, t, labels: classifier(x, t)[:, :1, None, None] * x),
        backend,
        start=noise(3, torch.float16),
    )
    assert seen == {torch.float16}
