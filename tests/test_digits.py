"""The digits model without a sampler: loading, the network as a function, the judge on real digits."""

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")

from pyguide import schedules  # noqa: E402 (after the checks)
from pyguide.bench import digits  # noqa: E402
from pyguide.bench.digits import data, judge, train  # noqa: E402

BATCH = 6


@pytest.fixture(scope="module", params=digits.KINDS)
def net(request):
    return digits.load(request.param)


@pytest.fixture(scope="module")
def inputs():
    x = torch.randn(BATCH, *digits.SHAPE, generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(50, 950, BATCH), torch.arange(BATCH)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_loaded_network_is_ready_to_sample(net):
    assert not net.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("kind", digits.KINDS)
def test_weights_are_small(kind):
    assert digits.weights_path(kind).stat().st_size < 1.5e6


def test_every_load_is_its_own(net):
    other = digits.load(net.kind)
    next(other.parameters()).zero_()
    assert next(net.parameters()).any()


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind must be one of epsilon, velocity"):
        digits.load("v")


def test_weights_of_the_other_twin_are_refused(monkeypatch):
    other = digits.weights_path("velocity")
    monkeypatch.setattr(digits, "weights_path", lambda kind: other)
    with pytest.raises(ValueError, match="holds a velocity model"):
        digits.load("epsilon")


def test_missing_package_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent("safetensors"), *sys.meta_path])
    with pytest.raises(ImportError, match=r"pip install pyguide\[bench\]"):
        digits.load("epsilon")


class _Absent:
    """A finder that says that one package is not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


# ---- the network ----------------------------------------------------------------------------------------------------


def test_network_is_deterministic(net, inputs):
    assert torch.equal(net(*inputs), net(*inputs))
    assert torch.equal(net(*inputs), digits.load(net.kind)(*inputs))


def test_no_labels_means_unconditional(net, inputs):
    x, t, labels = inputs
    null = net(x, t)
    assert torch.equal(null, net(x, t, torch.full((BATCH,), digits.NULL)))
    assert not torch.equal(null, net(x, t, labels))


def test_integer_and_real_timesteps_agree(net, inputs):
    x, _, labels = inputs
    t = torch.tensor([0, 1, 500, 501, 998, 999])
    assert torch.equal(net(x, t, labels), net(x, t.float(), labels))
    assert torch.equal(net(x[:1], t[2], labels[:1]), net(x[:1], t[2:3], labels[:1]))


def test_output_is_smooth_in_the_timestep(net, inputs):
    """Within two timesteps the output bends little: halving the distance halves the difference (a jump would not)."""
    x, _, labels = inputs
    out = [net(x, torch.full((BATCH,), t), labels) for t in (500.0, 500.5, 501.0)]
    half, whole = (out[1] - out[0]).norm(), (out[2] - out[0]).norm()
    assert 0 < whole < 0.05 * out[0].norm()
    assert abs(whole / half - 2) < 0.2


def test_samples_do_not_see_each_other(net, inputs):
    x, t, labels = inputs
    order = torch.arange(BATCH - 1, -1, -1)
    whole = net(x, t, labels)
    torch.testing.assert_close(net(x[order], t[order], labels[order]), whole[order])
    torch.testing.assert_close(net(x[:2], t[:2], labels[:2]), whole[:2])


def test_gradient_reaches_the_input(net, inputs):
    x, t, labels = inputs
    x = x.clone().requires_grad_()
    net(x, t, labels).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", digits.KINDS)
def test_noise_level_is_that_of_the_schedule(kind):
    """alpha / sigma as told to the network is that of pyguide's own schedule."""
    schedule = {"epsilon": schedules.cosine, "velocity": schedules.flow}[kind]()
    path = schedule.path(10)
    alpha, sigma = digits.load(kind).level(torch.tensor(path.timestep, dtype=torch.float32))
    norm = np.hypot(path.alpha, path.sigma)[:-1]
    np.testing.assert_allclose(alpha.numpy(), path.alpha[:-1] / norm, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sigma.numpy(), path.sigma[:-1] / norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [100.0, 500.0, 900.0])
def test_denoising_beats_the_mean(net, t):
    """On digits that the network never saw: the denoised image is closer than the best constant, the mean digit."""
    _, held_out = data.split()
    x0, labels = torch.tensor(held_out.images), torch.tensor(held_out.labels)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    alpha, sigma = (float(part) for part in net.level(torch.tensor(t)))
    if net.kind == "velocity":
        alpha, sigma = 1 - t / 1000, t / 1000
    x = alpha * x0 + sigma * noise
    out = net(x, torch.full((len(x),), t), labels)
    denoised = (x - sigma * out) / alpha if net.kind == "epsilon" else x - sigma * out
    assert (denoised - x0).square().mean() < 0.8 * (x0 - x0.mean(0)).square().mean()


def test_a_few_training_steps_reproduce(tmp_path):
    files = []
    for name in ("a", "b"):
        torch.manual_seed(len(files))  # the seed of the run counts, not what was drawn before
        average, about = train.train("velocity", steps=3, seed=7)
        train.save(average, about, tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


# ---- the judge ------------------------------------------------------------------------------------------------------


def test_data_split_is_stratified_and_disjoint():
    generator, held_out = data.split()
    assert (len(generator.labels), len(held_out.labels)) == (1198, 599)
    counts = np.bincount(generator.labels) / np.bincount(data.everything().labels)
    assert np.abs(counts - 2 / 3).max() < 0.01
    rows = [set(map(bytes, part.images)) for part in (generator, held_out)]
    assert not rows[0] & rows[1]
    assert min(part.images.min() for part in (generator, held_out)) == -1
    assert max(part.images.max() for part in (generator, held_out)) == 1


def test_judge_knows_real_digits():
    """98.8 % was measured on the 1,198 digits that the judge did not see."""
    generator, _ = data.split()
    assert np.mean(judge.classify(generator.images) == generator.labels) > 0.98


def test_evaluate_of_the_real_digits_themselves():
    images, labels = data.everything()
    found = judge.evaluate(torch.tensor(images), torch.tensor(labels))
    assert found["precision"] == found["recall"] == 1
    assert found["accuracy"] > 0.98
    assert abs(found["frechet"]) < 1e-6


def test_evaluate_sees_lost_diversity():
    """Half of the classes gone: recall falls, precision does not."""
    images, labels = data.everything()
    few = labels < 5
    found = judge.evaluate(images[few], labels[few])
    assert found["precision"] == 1
    assert found["recall"] < 0.6
    assert found["frechet"] > 1


def test_evaluate_sees_lost_fidelity():
    images, labels = data.everything()
    noise = np.random.default_rng(0).standard_normal(images.shape)
    found = judge.evaluate(images + noise, labels)
    assert found["precision"] < 0.1
    assert found["frechet"] > 10


def test_frechet_of_a_shift_is_its_square():
    """Equal covariances: only |mean difference|^2 = 64 * 0.25 is left."""
    images, labels = data.everything()
    assert judge.evaluate(images + np.float32(0.5), labels)["frechet"] == pytest.approx(16, rel=1e-6)


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        (np.zeros((20, 8, 8)), np.zeros(20), "images"),
        (np.zeros((20, 1, 8, 8)), np.zeros(19), "labels"),
        (np.zeros((3, 1, 8, 8)), np.zeros(3), "images"),
        (np.full((20, 1, 8, 8), np.nan), np.zeros(20), "images"),
    ],
)
def test_evaluate_refuses(images, labels, names):
    with pytest.raises(ValueError, match=names):
        judge.evaluate(images, labels)


def test_grid_writes_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [np.zeros((10, 1, 8, 8)), torch.ones(20, 1, 8, 8)]
    judge.grid(rows, tmp_path / "grid.png", row_labels=["scale 1", "scale 4"])
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="row_labels"):
        judge.grid(rows, tmp_path / "grid.png", row_labels=["scale 1"])
    with pytest.raises(ValueError, match="rows"):
        judge.grid([np.zeros((11, 1, 8, 8))], tmp_path / "grid.png", row_labels=["scale 1"])
