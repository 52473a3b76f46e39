"""The classifier's gradient at offsets beyond 32 bits, with as many threads as it thinks fit, and without the GIL.

Large tensors lie in memory that is reserved and hardly ever touched. What an offset cut to 32 bits would reach is in it
too: such a kernel gives other values, and does not end the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from classifier_grad_cases import Case, Kernel
from launches import address
from test_classifier_grad import NAMES
from test_step_cuda_sizes import sparse

from pyguide import native
from pyguide.layout import NONFINITE_LOGITS, SAMPLE

C: Any = native.C
if C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

ISAS = C.isas()
FAR = 2**32 + 64  # elements; of 32 bits remain 64
# How many steps of what length: a stride that does not fit into 32 bits, and a product of two numbers that do
STEPS = [(1, FAR), (4, FAR // 4)]


@pytest.fixture(params=[*ISAS, "simulated"])
def kernel(request: pytest.FixtureRequest) -> Any:
    if request.param == "simulated":
        yield Kernel(request.getfixturevalue("simulated"), 0)
        return
    C.set_isa(request.param)
    yield Kernel(C)
    C.set_isa(ISAS[-1])


def draw(count: int, classes: int, distribution: bool, **options: Any) -> Case:
    rng = np.random.default_rng([count, classes])
    target = rng.random((count, classes)) if distribution else rng.integers(classes, size=(count, 2))
    if not distribution:
        target[-1, -1] = classes - 1  # the last class is looked up by itself
    return Case(rng.normal(size=(count, classes)), target, **options)


def run_again(case: Case, kernel: Kernel, **places: int) -> None:
    """The call of `case` with other places of its operands: the same bits."""
    expected = case.bits()
    case.grad.view[...] = 7
    case.run(kernel)
    assert case.bits() == expected
    case.grad.view[...] = 7
    kernel.C.classifier_grad(*arguments_of(case, kernel, **places))
    assert case.bits() == expected


def arguments_of(case: Case, kernel: Kernel, **places: int) -> list[Any]:
    return list({**dict(zip(NAMES, case.arguments(kernel.device), strict=True)), **places}.values())


def apart(view: np.ndarray, *strides: int) -> np.ndarray:
    """A copy of a view, of these strides in elements."""
    length = 1 + sum((n - 1) * stride for n, stride in zip(view.shape, strides, strict=True))
    memory = sparse(2**31 + length, view.dtype)[2**31 :]  # what is left of an offset may be negative
    copy = np.lib.stride_tricks.as_strided(memory, view.shape, [stride * memory.itemsize for stride in strides])
    copy[...] = view
    return memory


# ---- offsets of more than 32 bits ---------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("steps", "stride"), STEPS)
def test_logits_far_apart(kernel: Kernel, steps: int, stride: int, dtype: str, distribution: bool) -> None:
    case = draw(steps + 1, 40, distribution, dtype=dtype).run_and_compare(kernel)  # samples
    logits = apart(case.logits.view[:, 0], stride, 1)
    run_again(case, kernel, logits=address(logits), batch_stride=stride)
    case = draw(2, steps + 1, distribution, dtype=dtype).run_and_compare(kernel)  # classes
    logits = apart(case.logits.view[:, 0], 1, stride)
    run_again(case, kernel, logits=address(logits), batch_stride=1, class_stride=stride)


@pytest.mark.parametrize("distribution", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("steps", "stride"), STEPS)
def test_targets_far_apart(kernel: Kernel, steps: int, stride: int, dtype: str, distribution: bool) -> None:
    case = draw(steps + 1, 40, distribution, dtype=dtype).run_and_compare(kernel)
    target = apart(case.target, stride, 1)
    run_again(case, kernel, target=address(target), target_stride=stride)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("steps", "stride"), STEPS)
def test_rows_of_scales_far_apart(kernel: Kernel, steps: int, stride: int, dtype: str) -> None:
    scale = np.arange(1.0, 2 * steps + 3).reshape(steps + 1, 2)
    case = draw(2, 40, False, dtype=dtype, scale=scale, row=[steps, 0]).run_and_compare(kernel)
    scales = apart(case.scale.view[:, 0], stride, 1)
    run_again(case, kernel, scale=address(scales), scale_stride=stride)


@pytest.mark.parametrize("distribution", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_chunk_far_into_the_batch(kernel: Kernel, dtype: str, distribution: bool) -> None:
    """Samples 2^32 + 64 and the next one, of which one has a NaN."""
    case = draw(2, 10, distribution, dtype=dtype, check=True, scale=[0.5, -3.0])
    case.logits.view[1, 0, 3] = np.nan if dtype == "float32" else oracle.encode(np.array(np.nan), dtype)
    case.run_and_compare(kernel)
    width = case.target.shape[1]
    target, samples = sparse((FAR + 2) * width, case.target.dtype), sparse(FAR + 2, SAMPLE)
    scale, log_prob = (sparse(FAR + 2, case.scale.memory.dtype) for _ in range(2))
    target[FAR * width :] = case.target.ravel()
    scale[FAR:], samples[FAR:] = case.scale.view[0, 0], case.samples
    samples["flags"][FAR:] = 1
    expected, grad = case.log_prob, case.grad.view.tobytes()
    assert expected is not None
    case.grad.view[...] = 7
    places = {"target": target, "scale": scale, "samples": samples, "log_prob": log_prob}
    pointers = {name: address(a) for name, a in places.items()}
    kernel.C.classifier_grad(*arguments_of(case, kernel, **pointers, target_stride=width, first=FAR))
    assert case.grad.view.tobytes() == grad
    assert log_prob[FAR:].tobytes() == expected.view.tobytes()
    assert samples["flags"][FAR:].tolist() == [1, 1 | NONFINITE_LOGITS]
    assert not log_prob[64:66].any()


@pytest.mark.parametrize(
    ("named", "places"),
    [
        ("logits", {"batch_stride": 2**63 - 1}),
        ("logits", {"class_stride": -(2**61)}),
        ("logits", {"batch_stride": 2**60 - 1, "class_stride": 2**60}),
        ("target", {"target_stride": 2**62}),
        ("target", {"target_stride": 2**40, "first": 2**40}),
        ("target", {"target_stride": -(2**61)}),
        ("log_prob", {"first": 2**62}),
        ("scale", {"first": 2**62, "log_prob": 0, "target_stride": 0}),
        ("samples", {"first": 2**58}),
    ],
)
def test_places_that_no_address_reaches_are_refused(kernel: Kernel, named: str, places: dict[str, int]) -> None:
    """Before the product of two of them is used: 2^40 2^40 in 64 bits is 0."""
    case = draw(2, 5, False)
    before = case.bits()
    with pytest.raises(ValueError, match=f"^{named}: reaches beyond what 64 bits can address"):
        kernel.C.classifier_grad(*arguments_of(case, kernel, **places))
    assert case.bits() == before


# ---- threads --------------------------------------------------------------------------------------------------------
def check_automatic_threads() -> None:
    """In a process that has not run a kernel: threads start where they pay, and change no bit."""

    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    alone = tasks()
    for count, classes, more in ((8, 4095, 0), (8, 4096, 1), (7, 16384, 2)):  # of at most 3
        rng = np.random.default_rng(classes)
        logits, labels = rng.normal(size=(count, classes)), rng.integers(classes, size=(count, 1))
        logits[3, 5] = np.nan
        case = Case(logits, labels, threads=0, check=True).run(Kernel(C))
        assert tasks() - alone == more, (tasks(), alone, count, classes)
        assert case.samples["flags"].tolist() == [NONFINITE_LOGITS * (b == 3) for b in range(count)]
        for b in range(count):
            single = Case(logits[b], labels[b : b + 1], check=True).run_and_compare(Kernel(C))
            assert case.bits(b) == single.bits()
    assert Case(logits * 2, labels).run(Kernel(C)).bits(0) != case.bits(0)  # negative control


@pytest.mark.skipif(not C.build["openmp"] or not os.path.exists("/proc/self/task"), reason="needs OpenMP and Linux")
def test_the_automatic_number_of_threads() -> None:
    """Two for 32,768 logits, three for 49,152; below, the caller's own."""
    command = [sys.executable, "-c", "import test_classifier_grad_sizes as t; t.check_automatic_threads()"]
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "OMP_DYNAMIC": "false", "OMP_THREAD_LIMIT": "3"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (*sys.path, os.environ.get("PYTHONPATH"))))
    here = Path(__file__).parent
    done = subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("distribution", [False, True])
def test_other_python_threads_run_meanwhile(distribution: bool) -> None:
    """From 2^18 logits on. Below, the GIL stays: no thread takes it by itself within the switch interval set here."""
    small, large = (draw(2, classes, distribution) for classes in (2**17 - 1, 2**17))
    progress, stop, started = [0], threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            progress[0] += 1
            started.set()
            time.sleep(1e-5)

    def calls(case: Case, seconds: float) -> int:
        """Of the other thread, in calls until there is some."""
        call, arguments = C.classifier_grad, case.arguments(-1)
        before, until = progress[0], time.monotonic() + seconds
        while progress[0] == before and time.monotonic() < until:
            call(*arguments)
        return progress[0] - before

    interval, other = sys.getswitchinterval(), threading.Thread(target=work)
    sys.setswitchinterval(1000)
    try:
        other.start()
        started.wait()
        kept, released = calls(small, 0.2), calls(large, 20)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()
    assert kept == 0
    assert released > 0
