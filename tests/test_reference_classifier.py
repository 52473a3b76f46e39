"""reference.classifier_grad: against torch's autograd of log_softmax in float64, and what the definition promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest

from pyguide.reference import classifier_grad

torch: Any = pytest.importorskip("torch")

NUMPY, TORCH = np.asarray, torch.as_tensor
both = pytest.mark.parametrize("array", [NUMPY, TORCH], ids=["numpy", "torch"])
TARGETS = "label", "labels", "distribution"
BATCH = 5


def target(kind: str, classes: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Of BATCH samples: a label each; up to three labels with gaps and repetitions; weights that do not sum to 1."""
    rng = np.random.default_rng(seed)
    if kind == "label":
        return rng.integers(0, classes, BATCH)
    if kind == "labels":
        labels = rng.integers(0, classes, (BATCH, 3))
        labels[0, 1:] = -1
        labels[1, 0] = -7
        labels[2, 1] = labels[2, 0]
        return labels
    weights = rng.random((BATCH, classes))
    weights[:, 1::3] = 0
    return weights


def autograd(logits: Any, target: Any, scale: Any) -> tuple[Any, Any]:
    """d (scale * log p(y | x)) / d logits as torch differentiates it."""
    leaf = torch.as_tensor(logits).double().clone().requires_grad_()
    log_p, y = torch.log_softmax(leaf, 1), torch.as_tensor(target)
    if y.is_floating_point():
        log_prob = torch.stack([(q[q != 0] * row[q != 0]).sum() for q, row in zip(y, log_p, strict=True)])
    else:
        named = [sorted({k for k in row if k >= 0}) for row in y.reshape(len(y), -1).tolist()]
        log_prob = torch.stack([row[some].logsumexp(0) for some, row in zip(named, log_p, strict=True)])
    (log_prob * torch.as_tensor(scale)).sum().backward()
    return leaf.grad, log_prob.detach()


def errors(logits: Any, target: Any, scale: Any, dtype: str, log_dtype: str) -> tuple[Any, Any]:
    """How far grad [B, classes] and log p(y | x) [B] of a kernel may be from the definition, derived.

    With u the unit roundoff of the arithmetic, x_k = l_k - max l (rounded once: u |x_k|) and an exponential within 2 u,
    a sum of exponentials in float64 has the relative error u (2 + sum p |x|), in 22 additions at most; 1 / sum, its
    product with the exponential, the difference, the scale in that arithmetic and the product with it, q in it, the sum
    of q and the product with that: u each. Then half an ulp of the type. Where a fused multiply-add is none, an
    exponential loses another u, and so does the sum: 8 in all.
    """
    u = 2.0**-53 if dtype == "float64" else 2.0**-24
    summed = 22 * (dtype == "float64")
    own = 8 + summed

    def softmax(values: Any) -> tuple[Any, Any, Any]:
        """p, its error, the relative error of the sum."""
        with np.errstate(invalid="ignore"):
            x = values - values.max(1, keepdims=True)
        e = np.exp(x)
        p, away = e / e.sum(1, keepdims=True), np.where(e > 0, -x, 0)
        mean = (p * away).sum(1, keepdims=True)
        return p, u * p * (away + mean + own) + (e < 2.0**-126) * 2.0**-126, u * (own + mean[:, 0])

    logits, s = np.asarray(logits, np.float64), np.abs(np.asarray(scale, np.float64))[:, None]
    p, p_error, sum_error = softmax(logits)
    if np.issubdtype(target.dtype, np.integer):
        named = (np.reshape(target, (len(logits), -1, 1)) == np.arange(logits.shape[1])).any(1)
        a, a_error, log_error = softmax(np.where(named, logits, -np.inf))
        log_error = log_error + sum_error
    else:
        mass = target.sum(1, keepdims=True, dtype=np.float64)
        a, a_error = target, u * (np.abs(target) + p * np.abs(mass) * (2 + summed))
        p, p_error = p * mass, p_error * np.abs(mass)
        terms = np.where(target != 0, target * (logits - logits.max(1, keepdims=True)), 0)
        log_error = sum_error * np.abs(mass[:, 0]) + 2.0**-48 * np.abs(terms).sum(1)
    error = s * (a_error + p_error + 3 * u * np.abs(a - p))
    grad, log_prob = (
        np.asarray(part) for part in classifier_grad(logits, np.asarray(target), np.asarray(scale, float))
    )
    log_error = log_error + 2.0**-50 * (1 + np.abs(log_prob))
    grad_error = error + oracle.half_ulp(np.abs(grad) + error, dtype)
    return np.asarray(grad_error, float), np.asarray(log_error + oracle.half_ulp(log_prob, log_dtype), float)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("classes", [1, 2, 7, 1000])
def test_equals_autograd(array: Any, kind: str, size: float, classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits, y = rng.uniform(-size, size, (BATCH, classes)), target(kind, classes)
    scale = np.array([1.0, -2.5, 0.0, 10.0, 1e-3])
    grad, log_prob = classifier_grad(array(logits), array(y), array(scale))
    expected, expected_log_prob = autograd(logits, y, scale)
    close(grad, expected)
    close(log_prob, expected_log_prob)
    wrong, _ = autograd(logits, y, scale + 1e-9)  # control: what such a comparison can tell apart
    if classes > 1 and size < 1e4:
        with pytest.raises(AssertionError):
            close(grad, wrong)


@both
def test_logits_of_ten_thousand(array: Any) -> None:
    """Two classes, 2e4 apart: p of the lesser one is far below the smallest float64, its logarithm is not."""
    logits, scale = array(np.array([[1e4, -1e4]] * 3)), array(np.array([2.0, 2.0, 2.0]))
    grad, log_prob = classifier_grad(logits, array(np.array([[1, -1], [0, -1], [0, 1]])), scale)
    assert grad.tolist() == [[-2, 2], [0, 0], [0, 0]]
    assert log_prob.tolist() == [-2e4, 0, 0]
    three = array(np.array([[1e4, -1e4, -1e4]]))  # the maximum over Y is its own: 1/2 each, not 0/0
    grad, log_prob = classifier_grad(three, array(np.array([[1, 2]])), scale[:1])
    assert grad.tolist() == [[-2, 1, 1]]
    close(log_prob, [-2e4 + np.log(2)])


@both
def test_labels_that_repeat_or_are_none(array: Any) -> None:
    logits = array(np.random.default_rng(0).normal(size=(3, 7)))
    scale = array(np.array([1.0, 2.0, 3.0]))
    plain = classifier_grad(logits, array(np.array([[1], [2], [3]])), scale)
    same = ([1, 2, 3], [[1, 1, 1], [2, 2, 2], [3, 3, 3]], [[-1, 1], [2, -9], [3, -1]])
    for labels in same:
        again = classifier_grad(logits, array(np.array(labels)), scale)
        assert all(np.array_equal(a, b) for a, b in zip(plain, again, strict=True))
    other = classifier_grad(logits, array(np.array([[1, 2], [2, -1], [3, -1]])), scale)
    assert [np.array_equal(a, b) for a, b in zip(plain[0], other[0], strict=True)] == [False, True, True]


@both
@pytest.mark.parametrize("kind", TARGETS)
def test_identities(array: Any, kind: str) -> None:
    """A shift of the logits changes nothing; the gradient sums to 0 over the classes; scale 0 and one class give 0."""
    logits, y = np.random.default_rng(1).normal(size=(BATCH, 7)), array(target(kind, 7))
    scale = array(np.arange(1.0, BATCH + 1))
    grad, log_prob = classifier_grad(array(logits), y, scale)
    shifted, shifted_log_prob = classifier_grad(array(logits + 5), y, scale)
    close(shifted, grad)
    close(shifted_log_prob, log_prob)
    close(grad.sum(1), np.zeros(BATCH))
    assert np.abs(np.asarray(grad)).max() > 0.1
    assert not np.asarray(classifier_grad(array(logits), y, scale * 0)[0]).any()
    one, log_one = classifier_grad(array(logits[:, :1]), array(np.zeros((BATCH, 1), np.int64)), scale)
    assert not np.asarray(one).any()
    assert not np.asarray(log_one).any()


@both
@pytest.mark.parametrize("kind", ["labels", "distribution"])
def test_not_a_number_stays_in_its_sample(array: Any, kind: str) -> None:
    """A logit of NaN or +inf, a label that is no class, no label, only classes that cannot be; -inf alone does not."""
    logits, y = np.random.default_rng(2).normal(size=(BATCH, 7)), target(kind, 7)
    scale = array(np.ones(BATCH))
    logits[:, 6] = -np.inf
    y[:, -1] = 0 if kind == "distribution" else -1
    if kind == "labels":
        y[4] = [5, -1, -1]
    clean = classifier_grad(array(logits), array(y), scale)
    assert all(np.isfinite(np.asarray(part)).all() for part in clean)
    spoilt, wrong = logits.copy(), y.copy()
    spoilt[0, 3], spoilt[1, 2] = np.nan, np.inf
    expected = [True, True, False, False, False]
    if kind == "labels":
        wrong[2], wrong[3, 1], wrong[4] = -1, 7, 6
        expected = [True] * BATCH
    found = classifier_grad(array(spoilt), array(wrong), scale)
    assert np.isnan(np.asarray(found[0])).all(1).tolist() == np.isnan(np.asarray(found[1])).tolist() == expected
    for b in range(BATCH):  # each alone in a batch of clean ones
        one, one_wrong = logits.copy(), y.copy()
        one[b], one_wrong[b] = spoilt[b], wrong[b]
        found = classifier_grad(array(one), array(one_wrong), scale)
        others = [i for i in range(BATCH) if i != b]
        assert np.isnan(np.asarray(found[1])[b]) == expected[b]
        assert all(np.array_equal(np.asarray(a)[others], np.asarray(c)[others]) for a, c in zip(found, clean))


@pytest.mark.parametrize("kind", ["label", "labels"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_and_their_accuracy(kind: str, dtype: str) -> None:
    """float32 inside: within 1e-6 of the scale, plus half an ulp of the type, for the classes of ImageNet-21k."""
    classes, scale = 21841, torch.tensor([1.0, 2.0, 5.0, 0.5, 30.0])
    logits = torch.as_tensor(np.random.default_rng(3).normal(size=(BATCH, classes)) * 20).to(getattr(torch, dtype))
    y = torch.as_tensor(target(kind, classes))
    grad, log_prob = classifier_grad(logits, y, scale)
    assert (grad.dtype, log_prob.dtype) == (logits.dtype, torch.float32)
    expected, expected_log_prob = autograd(logits.double(), y, scale.double())
    allowed = torch.as_tensor(oracle.half_ulp(expected.numpy(), dtype).astype(float)) + 1e-6 * scale[:, None]
    assert ((grad.double() - expected).abs() <= allowed).all()
    spread = logits.double().amax(1) - logits.double().amin(1)  # of two such numbers' difference and its two summands
    assert ((log_prob.double() - expected_log_prob).abs() <= 3 * 2.0**-24 * spread + 1e-6).all()
    assert classifier_grad(logits, y, scale.double())[1].dtype == torch.float64
    if dtype == "float16":
        in_numpy = classifier_grad(logits.numpy(), y.numpy(), scale.numpy())
        assert (in_numpy[0].dtype, in_numpy[1].dtype) == (np.float16, np.float32)


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_labels_far_below_the_maximum_in_float32(array: Any) -> None:
    """Their own softmax is of their own differences: 1e-6 of the scale, though another logit is 2e4 above."""
    rng = np.random.default_rng(0)
    logits = rng.uniform(-1e4, -1e4 + 3, (200, 12)).astype(np.float32)
    logits[:, 0] = rng.uniform(9e3, 1e4, 200)
    y, scale = np.tile([3, 5, 8], (200, 1)), np.ones(200, np.float32)
    grad, _ = classifier_grad(array(logits), array(y), array(scale))
    expected, _ = autograd(torch.as_tensor(logits).double(), torch.as_tensor(y), torch.ones(200).double())
    assert np.abs(np.asarray(grad) - expected.numpy()).max() <= 1e-6
    extreme = classifier_grad(
        array(np.float32([[3e38, -3e38, 0]])), array(np.array([1])), array(np.ones(1, np.float32))
    )
    assert np.asarray(extreme[0]).tolist() == [[-1, 1, 0]]


def test_nothing_is_written_or_recorded() -> None:
    logits = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before, y, scale = logits.detach().clone(), torch.as_tensor(target("labels", 7)), torch.ones(BATCH)
    grad, log_prob = classifier_grad(logits, y, scale)
    assert torch.equal(logits.detach(), before)
    assert torch.equal(scale, torch.ones(BATCH))
    assert not grad.requires_grad
    assert not log_prob.requires_grad
