"""The digits' noise-aware classifier and their second stage: files, functions of x and t, training, and the reaches."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

import pyguide  # noqa: E402
from pyguide.bench import digits, sample  # noqa: E402
from pyguide.bench.digits import data, judge, train  # noqa: E402

BATCH = 6
COUNT, STEPS = 2000, 50
LOG10 = math.log(10)


def noise_like(x, seed=0):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=digits.KINDS)
def classifier(request):
    return digits.load_classifier(request.param)


@pytest.fixture(scope="module")
def upsampler():
    return digits.load_upsampler()


@pytest.fixture(scope="module")
def held_out():
    """(images, labels) of the third that neither the denoisers nor the classifier were trained on."""
    _, (images, labels) = data.split()
    return torch.tensor(images), torch.tensor(labels)


def noisy(classifier, x0, t):
    """x0 at timestep t as the denoiser of the same kind sees it."""
    alpha, sigma = (float(part) for part in classifier.level(torch.tensor(float(t))))
    if classifier.kind == "velocity":
        alpha, sigma = 1 - t / 1000, t / 1000
    return alpha * x0 + sigma * noise_like(x0)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classifier", "upsampler"])
def test_files_are_small_halves_that_say_what_they_are(name):
    path = digits.weights_path(name)
    assert path.stat().st_size < 3e5
    with safetensors.safe_open(path, framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
        facts = json.loads(file.metadata()["pyguide"])
    assert facts["model"] == name
    assert facts["data"] == data.SPLIT  # the judge's third is the judge's alone
    assert facts["steps"] == train.STEPS[name]
    assert facts.keys() >= {"schedule", "seed", "batch", "ema"}


def test_loaded_networks_are_ready(classifier, upsampler):
    for net in (classifier, upsampler):
        assert not net.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="kind must be one of epsilon, velocity, got 'v'"):
        digits.load_classifier("v")
    with pytest.raises(ValueError, match="kind must be one of epsilon, velocity, got 'classifier'"):
        digits.load("classifier")
    with pytest.raises(ValueError, match="name must be one of epsilon, velocity, classifier, upsampler"):
        digits.weights_path("v")


@pytest.mark.parametrize(("load", "held"), [("load_upsampler", "classifier"), ("load_classifier", "velocity")])
def test_another_file_is_refused(load, held, monkeypatch):
    other = digits.weights_path(held)
    monkeypatch.setattr(digits, "weights_path", lambda name: other)
    with pytest.raises(ValueError, match=f"holds a {held} model"):
        getattr(digits, load)(*["epsilon"] * (load == "load_classifier"))


# ---- the classifier -------------------------------------------------------------------------------------------------


def test_logits(classifier):
    x, t = noise_like(torch.empty(BATCH, *digits.SHAPE)), torch.tensor([0, 1, 500, 501, 998, 999])
    logits = classifier(x, t)
    assert logits.shape == (BATCH, 10)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, classifier(x, t.float()))  # integer and real timesteps
    torch.testing.assert_close(classifier(x, t[2]), classifier(x, t[2].expand(BATCH)))  # one for all
    torch.testing.assert_close(classifier(x.flip(0), t.flip(0)), logits.flip(0))  # samples do not see each other


def test_both_kinds_are_one_function_of_the_noise_level():
    """x of the flow is the cosine schedule's divided by alpha + sigma (of alpha^2 + sigma^2 = 1), at the same ratio.

    In float64, where rounding is 1e-16 and a wrong level or factor is not; the gradients differ by that factor.
    """
    epsilon, velocity = (digits.load_classifier(kind).double() for kind in digits.KINDS)
    sigma = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)
    lam = torch.log((1 - sigma) / sigma)
    table = epsilon.level.lam.numpy()  # falls with t: linear between two timesteps
    t = torch.tensor(np.interp(-lam.numpy(), -table, np.arange(len(table))))
    x = noise_like(torch.empty(5, *digits.SHAPE)).double().requires_grad_()
    norm = torch.sqrt((1 - sigma) ** 2 + sigma**2).view(-1, 1, 1, 1)
    logits = epsilon(x, t)
    y = (x * norm).detach().requires_grad_()
    same = velocity(y, 1000 * sigma)
    torch.testing.assert_close(same, logits, rtol=1e-9, atol=1e-9)
    (of_x,), (of_y,) = torch.autograd.grad(logits[:, 3].sum(), x), torch.autograd.grad(same[:, 3].sum(), y)
    torch.testing.assert_close(norm * of_y, of_x, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(epsilon(x, t + 20), logits, rtol=1e-3, atol=1e-3)  # the control: the level matters


def test_gradient_is_finite_at_every_timestep(classifier):
    """Integer timesteps, those between and both ends, where alpha or sigma of the flow is 0."""
    last = 999 if classifier.kind == "epsilon" else 1000
    t = torch.linspace(0, last, 2 * last + 1)
    x0 = torch.tensor(data.everything().images)[torch.arange(len(t)) % 1797]
    sigma = (t / last).view(-1, 1, 1, 1)
    x = ((1 - sigma) * x0 + sigma * noise_like(x0)).requires_grad_()
    log_prob = classifier(x, t).log_softmax(-1)[:, 3].sum()
    (gradient,) = torch.autograd.grad(log_prob, x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_classifier_knows_digits_it_has_not_seen_and_what_noise_hides(classifier, held_out):
    """Nearly right on clean digits, and never much worse than knowing nothing, which costs log 10."""
    x0, labels = held_out
    loss = {}
    for t in (10, 100, 300, 500, 700, 900, 999):
        logits = classifier(noisy(classifier, x0, t), torch.tensor(t))
        loss[t] = float(torch.nn.functional.cross_entropy(logits, labels))
        if t == 10:
            assert float((logits.argmax(-1) == labels).float().mean()) > 0.97
    assert list(loss.values()) == sorted(loss.values())  # noise hides
    assert loss[10] < 0.1
    assert loss[500] < 0.9 * LOG10
    assert abs(loss[999] - LOG10) < 0.05


# ---- the second stage -----------------------------------------------------------------------------------------------


def test_targets_are_crisp_digits_that_shrink_to_where_they_came_from():
    images, _ = data.everything()
    large = data.enlarge(images)
    assert large.shape == (len(images), *digits.LARGE)
    assert large.dtype == np.float32
    assert np.abs(large).max() == 1
    back = data.shrink(large)
    assert np.sqrt(np.mean((back - images) ** 2)) < 0.1  # of a range of 2; a grey level is 0.125
    assert np.mean(judge.classify(back) == judge.classify(images)) > 0.99
    grey = [np.mean(np.abs(part) < 0.5) for part in (images, large)]
    assert grey[1] < grey[0]  # fewer half-tones than in the original, let alone in its spline
    np.testing.assert_array_equal(data.enlarge(np.full((1, *digits.SHAPE), -1.0)), -1)  # blank stays blank


def test_shrink_is_the_mean_of_blocks_for_arrays_and_tensors():
    x = np.arange(16, dtype=np.float64).reshape(1, 1, 4, 4)
    np.testing.assert_array_equal(data.shrink(x), [[[[2.5, 4.5], [10.5, 12.5]]]])
    assert torch.equal(data.shrink(torch.tensor(x)), torch.tensor(data.shrink(x)))


def test_upsampler_shapes_and_timesteps(upsampler):
    x, low = noise_like(torch.empty(BATCH, *digits.LARGE)), torch.tensor(data.everything().images[:BATCH])
    t = torch.tensor([0, 1, 500, 501, 998, 999])
    out = upsampler(x, t, low_res=low)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert torch.equal(out, upsampler(x, t.float(), low))
    torch.testing.assert_close(upsampler(x.flip(0), t.flip(0), low.flip(0)), out.flip(0))
    assert not torch.equal(upsampler(x, t, low.flip(0)), out)


def test_upsampler_denoises_digits_it_has_not_seen(upsampler, held_out):
    """From almost pure noise: closer to the target than the small image with its pixels repeated."""
    low, _ = held_out
    x0 = torch.tensor(data.enlarge(low))
    t = torch.tensor(900.0)
    alpha, sigma = upsampler.level(t)
    x = alpha * x0 + sigma * noise_like(x0)
    denoised = (x - sigma * upsampler(x, t, low)) / alpha
    repeated = low.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (denoised - x0).square().mean() < 0.5 * (repeated - x0).square().mean()


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classifier", "upsampler"])
def test_a_few_training_steps_reproduce(name, tmp_path):
    files = []
    for file in ("a", "b"):
        torch.manual_seed(len(files))  # the seed of the run counts, not what was drawn before
        train.save(*train.train(name, steps=3, seed=7), tmp_path / file)
        files.append((tmp_path / file).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["classifier", "upsampler"])
def test_training_lowers_the_loss(name, held_out):
    """On digits outside of the training set, with the same noise before and after."""
    low, labels = (part[:100] for part in held_out)
    u = torch.arange(len(low)) / len(low)

    def loss(net):
        generator = torch.Generator().manual_seed(1)
        if name == "classifier":
            return float(train.classifier_loss(net, low, labels, u, generator))
        return float(train.upsampler_loss(net, torch.tensor(data.enlarge(low)), low, u, generator))

    few, many = (loss(train.train(name, steps=steps)[0]) for steps in (1, 40))
    assert many < 0.9 * few


def test_command_line_trains_what_it_is_told(tmp_path):
    threads = torch.get_num_threads()
    try:
        train.main(["classifier", "upsampler", "--steps", "2", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classifier.safetensors", "upsampler.safetensors"]
    with safetensors.safe_open(tmp_path / "upsampler.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["pyguide"])["steps"] == 2


# ---- the reaches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", digits.KINDS)
def test_classifier_guidance_trades_diversity_for_fidelity(kind, one_thread):
    """The unconditional model does what the classifier says (Dhariwal & Nichol 2021, figure 4), on 2,000 fixed seeds;
    above it the second stage draws the same digits."""
    net, classifier, plan = digits.load(kind), digits.load_classifier(kind), sample.plan(kind, STEPS)
    labels, found = sample.labels(COUNT), {}
    for scale in (0.0, 1.0, 2.0, 4.0, 8.0):
        guidance = pyguide.ClassifierGuidance(classifier, scale, cfg=pyguide.CFG(0.0))
        images = sample.images(pyguide.Sampler(net, plan, guidance), COUNT)
        found[scale] = judge.evaluate(images, labels)
        if scale == 4:
            above = judge.evaluate(data.shrink(sample.enlarged(images)), labels)
    assert found[0.0]["accuracy"] < 0.15  # the control: neither the model nor scale 0 sees the labels
    assert found[1.0]["accuracy"] < found[2.0]["accuracy"]
    assert min(found[scale]["accuracy"] for scale in (2.0, 4.0, 8.0)) >= 0.95
    assert found[1.0]["recall"] - found[8.0]["recall"] >= 0.1
    assert abs(above["accuracy"] - found[4.0]["accuracy"]) <= 0.01
    assert abs(above["precision"] - found[4.0]["precision"]) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", digits.KINDS)
def test_the_classifier_guides_the_conditional_model_too(kind, one_thread):
    """Its samples are of the class already: the classifier adds fidelity at the cost of diversity (their table 4)."""
    net, classifier, plan = digits.load(kind), digits.load_classifier(kind), sample.plan(kind, STEPS)
    labels, found = sample.labels(COUNT), {}
    for scale in (0.0, 1.0, 8.0):
        guidance = pyguide.ClassifierGuidance(classifier, scale, cfg=pyguide.CFG(1.0))
        found[scale] = judge.evaluate(sample.images(pyguide.Sampler(net, plan, guidance), COUNT), labels)
    assert min(found[scale]["accuracy"] for scale in found) >= 0.97
    assert found[1.0]["precision"] > found[0.0]["precision"]
    assert found[0.0]["recall"] > found[1.0]["recall"] > found[8.0]["recall"] + 0.1
