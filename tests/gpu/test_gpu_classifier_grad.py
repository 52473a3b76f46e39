"""The classifier's gradient on a GPU, by CUDA and by Triton: against the reference in float64; rows, chunks and flags,
which are read and written there; one launch that nobody waits for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpu_support import DEVICE, real, wait
from test_reference_classifier import BATCH, errors, target

from pyguide.bench.clock import CudaClock
from pyguide.bench.gpu import counts
from pyguide.bench.gpu.setup import FULL, Setup
from pyguide.classifier_grad import bind
from pyguide.layout import NONFINITE, NONFINITE_LOGITS, SAMPLE
from pyguide.reference import classifier_grad as reference

KINDS = "label", "labels", "distribution"
SCALE = np.array([1.0, -2.5, 0.0, 10.0, 1e-3])


def draw(classes: int, dtype: str = "float32", size: float = 10.0) -> Any:
    values = np.random.default_rng(classes).uniform(-size, size, (BATCH, classes))
    return torch.as_tensor(values).to(DEVICE, getattr(torch, dtype))


def given(kind: str, classes: int, dtype: Any = torch.float32) -> Any:
    y = torch.as_tensor(target(kind, classes)).to(DEVICE)
    return y.to(dtype) if kind == "distribution" else y.reshape(BATCH, -1)


def placed(rows: Any, ends: Any = 9) -> Any:
    samples = np.zeros(len(rows), SAMPLE)
    samples["row"], samples["end"], samples["flags"] = rows, ends, NONFINITE
    return torch.from_numpy(samples.view(np.int32).reshape(len(rows), -1)).to(DEVICE)


def flags(words: Any) -> Any:
    return words.cpu().numpy().view(SAMPLE).reshape(-1)["flags"]


def run(backend: str, logits: Any, y: Any, scales: Any, **options: Any) -> tuple[Any, Any]:
    grad = torch.full(logits.shape, torch.nan, dtype=logits.dtype, device=DEVICE)
    log_prob = torch.full((len(y),), torch.nan, dtype=scales.dtype, device=DEVICE)
    bind(backend, logits, y, scales, log_prob, **options)(logits, grad)
    wait()
    return grad.cpu(), log_prob.cpu()


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def compare(backend: str, logits: Any, kind: str, dtype: Any) -> None:
    y, scale = given(kind, logits.shape[1], dtype), torch.as_tensor(SCALE).to(DEVICE, dtype)
    grad, log_prob = run(backend, logits, y, scale[None])
    wide = (y.double() if kind == "distribution" else y).cpu()
    expected, expected_log_prob = reference(logits.cpu().double(), wide, scale.cpu().double())
    names = [str(kind).removeprefix("torch.") for kind in (logits.dtype, dtype)]
    allowed, log_allowed = errors(logits.cpu().double().numpy(), wide.numpy(), scale.cpu().numpy(), *names)
    error = (grad.double() - expected).abs().numpy()
    assert (error <= allowed).all(), (error / allowed).max()
    assert logits.shape[1] == 1 or (expected.abs().numpy() > allowed).any()  # zeros would not have passed
    # the CUDA kernel's sums and logarithms are of the logits' type: four roundings of what log p is made of
    log_p = torch.log_softmax(logits.cpu().double(), 1).abs()
    terms = (wide.abs() * log_p).sum(1) if kind == "distribution" else expected_log_prob.abs()
    mass = wide.abs().sum(1) if kind == "distribution" else 2.0
    unit = 2.0**-53 if logits.dtype == torch.float64 else 2.0**-24
    rounded = 4 * unit * (terms + mass * np.log(max(logits.shape[1], 2)))
    assert ((log_prob.double() - expected_log_prob).abs().numpy() <= log_allowed + rounded.numpy()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_types(fused: str, dtype: str, kind: str) -> None:
    for classes in (7, 1000):
        for real_type in (torch.float32, torch.float64):
            compare(fused, draw(classes, dtype), kind, real_type)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [1, 2, 10, 128, 129, 1000, 2048, 2049, 21841])
def test_classes(fused: str, classes: int, kind: str) -> None:
    for size in (0.01, 1.0, 30.0, 1e4):
        compare(fused, draw(classes, size=size), kind, torch.float32)


def test_within_1e_6_of_the_scale(fused: str) -> None:
    scale = torch.as_tensor(SCALE)
    for size in (0.01, 30.0, 1e4):
        logits, y = draw(21841, size=size), given("labels", 21841)
        grad, _ = run(fused, logits, y, scale.to(DEVICE, torch.float32)[None])
        expected, _ = reference(logits.cpu().double(), y.cpu(), scale)
        assert ((grad - expected).abs() <= 1e-6 * scale.abs()[:, None]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["transposed", "gap", "slice", "offset"])
def test_layouts(fused: str, layout: str, dtype: str, kind: str) -> None:
    classes, logits = 1000, draw(1000, dtype)
    around = torch.full((BATCH + 1, 3 * classes), torch.nan, dtype=logits.dtype, device=DEVICE)
    view = {
        "transposed": around.flatten()[: BATCH * classes].view(classes, BATCH).T,
        "gap": around[:BATCH, ::3],
        "slice": around[:BATCH, 8 : 8 + classes],
        "offset": around.flatten()[3 : 3 + BATCH * classes].view(BATCH, classes),
    }[layout]
    view.copy_(logits)
    y, scales = given(kind, classes), torch.as_tensor(SCALE).to(DEVICE, torch.float32)[None]
    found, plain = run(fused, view, y, scales), run(fused, logits, y, scales)
    unit = 2.0**-24 * 16 if dtype == "float32" else 2.0**-8
    for a, b in zip(found, plain, strict=True):  # another layout may be summed in another order
        torch.testing.assert_close(a, b, rtol=unit, atol=unit)
    assert plain[0].abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 1000, 2500])
def test_the_same_bits_in_any_batch_and_chunk(fused: str, classes: int, kind: str) -> None:
    logits, y = draw(classes), given(kind, classes)
    rows = np.array([0, 2, 1, 3, 2])
    scales = torch.arange(1.0, 4 * BATCH + 1, device=DEVICE).view(4, BATCH)
    words = placed(rows)
    whole = run(fused, logits, y, scales, samples=words, check=True)
    assert same(whole, run(fused, logits, y, scales[rows, range(BATCH)][None].contiguous()))
    assert (flags(words) == NONFINITE).all()
    for first, last in ((0, 2), (2, 5), (4, 5)):
        grad, log_prob = run(fused, logits[first:last], y, scales, samples=words, first=first)
        assert torch.equal(grad, whole[0][first:last])
        assert torch.equal(log_prob[first:last], whole[1][first:last])
        assert log_prob.isnan().sum() == BATCH - (last - first)
    many = [part.repeat(200, 1) for part in (logits, y)]
    crowd = run(fused, *many, scales[rows, range(BATCH)].repeat(200)[None].contiguous())
    for one, all_of_them in zip(whole, crowd, strict=True):
        assert torch.equal(all_of_them.view(200, *one.shape), one.expand(200, *one.shape))
    logits[0, 0] += 1  # control: its own numbers change, its neighbours' do not
    for one, other in zip(whole, run(fused, logits, y, scales, samples=words), strict=True):
        assert not torch.equal(one[0], other[0])
        assert torch.equal(one[1:], other[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [10, 1000, 2500])
def test_not_a_number_and_samples_at_their_end(fused: str, classes: int, kind: str) -> None:
    logits, y, scales = draw(classes), given(kind, classes), torch.ones(1, BATCH, device=DEVICE)
    clean = run(fused, logits, y, scales)
    logits[1, classes - 1], logits[3, 0], logits[4] = torch.nan, torch.inf, torch.nan
    words = placed([0] * BATCH, [9, 9, 9, 9, 0])
    for check in (False, True):
        found = run(fused, logits, y, scales, samples=words, check=check)
        assert ((flags(words) & NONFINITE_LOGITS) != 0).tolist() == [False, check, False, check, False]
        for a, b in zip(found, clean, strict=True):
            assert a[[1, 3]].isnan().all()
            assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert not a[4].any()


@pytest.mark.parametrize("classes", [10, 2500])
def test_labels_that_are_none_or_no_class(fused: str, classes: int) -> None:
    logits, scales = draw(classes), torch.ones(1, BATCH, device=DEVICE)
    logits[:, 9] = -torch.inf
    y = torch.tensor([[3, -1, 3], [classes, 3, -1], [-1, -5, -(2**63)], [2**62, 1, 2**32 + 3], [9, -1, 9]]).to(DEVICE)
    grad, log_prob = run(fused, logits, y, scales)
    assert log_prob.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, True, True, True]
    assert grad[0].isfinite().all()


@real
def test_one_launch_and_nobody_waits(fused: str) -> None:
    setup = Setup(CudaClock("cuda:0"), FULL, ("native", "triton"), None, False, 1, 0.0)
    logits, y, words = draw(1000), given("labels", 1000), placed([1] * BATCH)
    scales, grad, log_prob = torch.ones(4, BATCH, device=DEVICE), torch.empty_like(logits), logits.new_empty(BATCH)
    launch = bind(fused, logits, y, scales, log_prob, samples=words, check=True)

    def once() -> None:
        launch(logits, grad)

    once()
    wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    few, many = (counts.events(lambda n=n: [once() for _ in range(n)], setup) for n in (3, 13))
    assert {kind: (many[kind] - few[kind]) / 10 for kind in counts.KINDS} == {
        "launches": 1, "copies": 0, "copies_from_host": 0, "synchronisations": 0,
    }  # fmt: skip


@real
def test_a_captured_launch_reads_what_changes_on_the_device(fused: str) -> None:
    """Rows, labels and scales are data: the graph that was captured once serves all of them."""
    logits, y, words = draw(1000), given("labels", 1000), placed([0] * BATCH)
    scales = torch.arange(1.0, 2 * BATCH + 1, device=DEVICE).view(2, BATCH)
    grad, log_prob = torch.empty_like(logits), logits.new_empty(BATCH)
    launch = bind(fused, logits, y, scales, log_prob, samples=words)
    launch(logits, grad)
    wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(logits, grad)
    first = None
    for row, labels, size in ((0, y.clone(), 1.0), (1, y.flip(0), 1.0), (1, y.clone(), 3.0)):
        y.copy_(labels)
        words.copy_(placed([row] * BATCH))
        scales.mul_(size)
        graph.replay()
        wait()
        found = grad.cpu(), log_prob.cpu()
        assert same(found, run(fused, logits, y, scales[row][None].contiguous()))
        assert first is None or not torch.equal(found[0], first)
        first = found[0]


@real
def test_rows_labels_and_scales_need_no_other_kernel() -> None:
    triton = pytest.importorskip("pyguide.kernels.classifier_grad_triton")

    def compiled() -> int:
        return sum(len(entry[0]) for entry in triton.classifier_grad_kernel.device_caches.values())

    logits, y, scales = draw(1000), given("labels", 1000), torch.ones(16, BATCH, device=DEVICE)
    run("triton", logits, y, scales, samples=placed([0] * BATCH))
    before = compiled()
    assert before > 0
    for first in (0, 1, 4):
        run("triton", logits[first:], (y + first) % 1000, scales * first, samples=placed([first] * BATCH), first=first)
    run("triton", logits, y[:, :1].contiguous(), scales[:1], samples=placed([0] * BATCH))
    run("triton", logits[:, :992], y % 992, scales, samples=placed([0] * BATCH))
    assert compiled() == before
    run("triton", logits[:, :200], y % 200, scales, samples=placed([0] * BATCH))  # control: another block
    assert compiled() > before
