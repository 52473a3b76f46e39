"""The Triton kernel of the classifier's gradient under its interpreter, against the reference in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install pyguide[triton]")

import torch
from test_reference_classifier import BATCH, errors, target

from pyguide.layout import NONFINITE, NONFINITE_LOGITS, SAMPLE
from pyguide.reference import classifier_grad as reference

KINDS = "label", "labels", "distribution"
SCALE = np.array([1.0, -2.5, 0.0, 10.0, 1e-3])


@pytest.fixture(scope="module")
def kernel() -> Any:
    from pyguide.kernels import launch_triton

    return launch_triton.classifier_grad


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def draw(classes: int, dtype: str = "float32", size: float = 10.0, seed: int = 0) -> Any:
    values = np.random.default_rng([seed, classes]).uniform(-size, size, (BATCH, classes))
    return torch.as_tensor(values).to(getattr(torch, dtype))


def given(kind: str, classes: int, real: Any = torch.float32) -> Any:
    """The target as the kernel takes it."""
    y = torch.as_tensor(target(kind, classes))
    return y.to(real) if kind == "distribution" else y.reshape(BATCH, -1)


def placed(rows: Any, ends: Any = 9) -> tuple[Any, Any]:
    """Samples on the host and the same memory as the kernel takes it."""
    samples = np.zeros(len(rows), SAMPLE)
    samples["row"], samples["end"], samples["flags"] = rows, ends, NONFINITE
    return samples, torch.from_numpy(samples.view(np.int32).reshape(len(rows), -1))


def run(kernel: Any, logits: Any, y: Any, scale: Any, **options: Any) -> tuple[Any, Any]:
    grad = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
    log_prob = torch.full((len(y),), torch.nan, dtype=scale.dtype)
    kernel(logits, y, scale, grad=grad, log_prob=log_prob, **options)
    return grad, log_prob


def compare(kernel: Any, logits: Any, kind: str, real: Any = torch.float32) -> Any:
    """A launch of all samples at row 0, against the reference; returns the gradient's error."""
    y, scale = given(kind, logits.shape[1], real), torch.as_tensor(SCALE).to(real)[None]
    grad, log_prob = run(kernel, logits, y, scale)
    wide = y.double() if kind == "distribution" else y
    expected, expected_log_prob = reference(logits.double(), wide, scale[0].double())
    dtype = str(logits.dtype).removeprefix("torch.")
    allowed, log_allowed = errors(logits.double().numpy(), wide.numpy(), scale[0].numpy(), dtype, str(real)[6:])
    if dtype == "bfloat16":  # the interpreter truncates
        allowed = 2 * allowed
    error = (grad.double() - expected).abs().numpy()
    assert (error <= allowed).all(), (error / allowed).max()
    assert ((log_prob.double() - expected_log_prob).abs().numpy() <= log_allowed).all()
    assert logits.shape[1] == 1 or (expected.abs().numpy() > allowed).any()  # zeros would not have passed
    return error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("classes", [7, slow(1000)])
def test_types(kernel: Any, classes: int, dtype: str, kind: str) -> None:
    for real in (torch.float32, torch.float64):
        compare(kernel, draw(classes, dtype), kind, real)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 10, 1000, *map(slow, (128, 129, 2048, 2049))])
def test_classes(kernel: Any, classes: int, kind: str) -> None:
    for size in (1.0, 30.0, 1e4):
        compare(kernel, draw(classes, size=size), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_several_blocks_of_float64(kernel: Any, kind: str) -> None:
    compare(kernel, draw(1030, "float64"), kind, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e4, 0.01, 30.0])
def test_the_classes_of_imagenet_21k(kernel: Any, size: float) -> None:
    """Within 1e-6 of the scale, for logits that are close to each other and for logits of +-1e4."""
    error = compare(kernel, draw(21841, size=size), "labels")
    assert (error <= 1e-6 * np.abs(SCALE)[:, None]).all()


def test_a_single_class_is_certain(kernel: Any) -> None:
    grad, log_prob = run(kernel, draw(1, size=1e4), given("label", 1), torch.as_tensor(SCALE)[None])
    assert not grad.any()
    assert not log_prob.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
@pytest.mark.parametrize("layout", ["transposed", "gap", "slice", "offset", "expanded"])
def test_layouts(kernel: Any, layout: str, dtype: str, kind: str) -> None:
    """The same bits as from contiguous logits; what lies between them is NaN."""
    classes, logits = 24, draw(24, dtype)
    around = torch.full((BATCH + 1, 3 * classes), torch.nan, dtype=logits.dtype)
    views = {
        "transposed": around.flatten()[: BATCH * classes].view(classes, BATCH).T,
        "gap": around[:BATCH, : 3 * classes : 3],
        "slice": around[:BATCH, 8 : 8 + classes],
        "offset": around.flatten()[3 : 3 + BATCH * classes].view(BATCH, classes),
        "expanded": around[:1, :classes].expand(BATCH, classes),
    }
    view = views[layout]
    if layout == "expanded":
        logits = logits[:1].expand(BATCH, classes).contiguous()
        view[:1] = logits[:1]
    else:
        view.copy_(logits)
    y, scale = given(kind, classes), torch.as_tensor(SCALE, dtype=torch.float32)[None]
    plain = run(kernel, logits, y, scale)
    assert plain[0].abs().max() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(run(kernel, view, y, scale), plain, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_chunks(kernel: Any, kind: str) -> None:
    """Each sample takes the scale of the row where it stands; a chunk has the bits of the whole."""
    logits, y = draw(40), given(kind, 40)
    rows = np.array([0, 2, 1, 3, 2])
    scales = torch.arange(1.0, 4 * BATCH + 1).view(4, BATCH)
    samples, words = placed(rows)
    whole = run(kernel, logits, y, scales, samples=words, check=True)
    plain = run(kernel, logits, y, scales[rows, range(BATCH)][None].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))
    assert (samples["flags"] == NONFINITE).all()
    assert samples["row"].tolist() == rows.tolist()
    for first, last in ((0, 2), (2, 5), (4, 5), (3, 3)):
        grad, log_prob = run(kernel, logits[first:last], y, scales, samples=words, first=first)
        assert torch.equal(grad, whole[0][first:last])
        assert torch.equal(log_prob[first:last], whole[1][first:last])
        assert log_prob.isnan().sum() == BATCH - (last - first)
    other = run(kernel, logits[2:], y, scales, samples=words)[0]  # control: targets and scales of other samples
    assert not torch.equal(other, whole[0][2:])
    same = run(kernel, logits, y, scales[:1], samples=words)  # one row serves all
    assert torch.equal(same[1], whole[1])
    assert torch.equal(same[0], run(kernel, logits, y, scales[:1])[0])


@pytest.mark.parametrize("classes", [10, 2500])
def test_samples_at_their_end(kernel: Any, classes: int) -> None:
    """Zeros, whatever the logits hold; those outside of the table's rows too."""
    logits, y, scale = draw(classes), given("label", classes), torch.ones(9, BATCH)
    busy = run(kernel, logits, y, scale)
    logits[[1, 3, 4]] = torch.nan
    samples, words = placed([0, 9, 5, -1, 12])
    grad, log_prob = run(kernel, logits, y, scale, samples=words, check=True)
    assert not grad[[1, 3, 4]].any()
    assert not log_prob[[1, 3, 4]].any()
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip((grad, log_prob), busy, strict=True))
    assert (samples["flags"] == NONFINITE).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 2500])
def test_not_a_number_stays_in_its_sample_and_sets_its_flag(kernel: Any, classes: int, kind: str) -> None:
    logits, y, scale = draw(classes), given(kind, classes), torch.ones(1, BATCH)
    logits[2, 4] = -torch.inf
    if kind == "distribution":
        y[2, 4] = 0
    else:
        y[2] = 5
    clean = run(kernel, logits, y, scale)
    assert all(part.isfinite().all() for part in clean)
    logits[1, classes - 1], logits[3, 0] = torch.nan, torch.inf
    samples, words = placed([0] * BATCH)
    for check in (False, True):
        found = run(kernel, logits, y, scale, samples=words, check=check)
        flagged = (samples["flags"] & NONFINITE_LOGITS) != 0
        assert flagged.tolist() == [False, check, False, check, False]
        assert (samples["flags"] & NONFINITE != 0).all()
        for a, b in zip(found, clean, strict=True):
            assert a[[1, 3]].isnan().all()
            assert torch.equal(a[[0, 2, 4]], b[[0, 2, 4]])


@pytest.mark.parametrize("classes", [10, 2500])
def test_labels_that_are_none_or_no_class(kernel: Any, classes: int) -> None:
    """A label is compared with classes and never an address: one far outside costs its own sample only."""
    logits, scale = draw(classes), torch.ones(1, BATCH)
    logits[:, 9] = -torch.inf
    y = torch.tensor([[3, -1, 3], [classes, 3, -1], [-1, -5, -(2**63)], [2**62, 1, 2**32 + 3], [9, -1, 9]])
    grad, log_prob = run(kernel, logits, y, scale)
    assert log_prob.isnan().tolist() == [False, True, True, True, True]  # the last: only what cannot be
    assert grad.isnan().all(1).tolist() == log_prob.isnan().tolist()
    assert grad[0].isfinite().all()
    once = run(kernel, logits, y[:, :1].contiguous(), scale)
    assert torch.equal(once[0][0], grad[0])
    assert torch.equal(once[1][0], log_prob[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, slow(1000), 2500])
def test_the_same_bits_in_any_batch(kernel: Any, classes: int, kind: str) -> None:
    logits, y, scale = draw(classes), given(kind, classes), torch.as_tensor(SCALE)[None]
    whole = run(kernel, logits, y, scale)
    turned = [part.flip(0) for part in run(kernel, logits.flip(0), y.flip(0), scale.flip(1))]
    alone = [torch.cat(parts) for parts in zip(*(
        run(kernel, logits[b : b + 1], y[b : b + 1], scale[:, b : b + 1]) for b in range(BATCH)
    ), strict=True)]  # fmt: skip
    for again in (turned, alone):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    logits[0, 0] += 1  # control: its own numbers change, its neighbours' do not
    other = run(kernel, logits, y, scale)
    for a, b in zip(whole, other, strict=True):
        assert not torch.equal(a[0], b[0])
        assert torch.equal(a[1:], b[1:])


def test_without_log_prob(kernel: Any) -> None:
    logits, y, scale = draw(10), given("labels", 10), torch.ones(1, BATCH)
    grad = torch.full_like(logits, torch.nan)
    kernel(logits, y, scale, grad=grad)
    assert torch.equal(grad, run(kernel, logits, y, scale)[0])
    kernel(logits[:0], y[:0], scale[:, :0], grad=grad[:0])  # nobody


def test_what_a_launch_cannot_walk(kernel: Any) -> None:
    logits, y, scale = draw(10), given("labels", 10), torch.ones(1, BATCH)
    with pytest.raises(AssertionError, match="walk"):
        kernel(logits, y, scale, grad=torch.empty(10, BATCH).T)
    with pytest.raises(AssertionError, match="walk"):
        kernel(logits, y.T.contiguous().T, scale, grad=logits.clone())
    with pytest.raises(AssertionError, match="samples"):
        kernel(logits, y, scale, grad=logits.clone(), check=True)
