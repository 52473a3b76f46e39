"""The CUDA kernel on a GPU: every test of the CPU kernel's table against the oracle, and its bits against the CPU's.

Operands lie in poisoned device memory that is copied back whole, so that what a launch must not write is looked at too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gpu_support import DEVICE, DeviceLaunch, Module, real, same_bits, wait
from launches import Launch
from oracle import close, normals
from test_step import (  # noqa: F401  the table of the CPU kernel, run here by `isa`
    test_batch_position_does_not_change_bits,
    test_blocks,
    test_dense_specialisations,
    test_every_16_bit_value_is_read_exactly,
    test_identity_is_not_rewritten,
    test_int64_timesteps_round_to_nearest,
    test_lengths_and_alignments,
    test_mixed_layouts_and_split_channels,
    test_nan_passes_through_the_clip,
    test_narrowing_rounds_once_to_nearest_even,
    test_nonfinite_is_flagged,
    test_random_plans,
    test_refresh_writes_the_input_that_is_due,
    test_types,
    test_zero_coefficients_are_not_products,
)

from pyguide import native
from pyguide.bench.cases import CASES
from pyguide.bench.launches import KernelRows, run_all
from pyguide.layout import TAG_STEP

FLOATS = "float32", "float16", "bfloat16"


@pytest.fixture
def isa(monkeypatch: pytest.MonkeyPatch, place: Any) -> str:
    """What the tests of test_step.py run on."""
    monkeypatch.setattr(Launch, "C", Module())
    for name in ("placed", "place", "on_device", "control", "enter", "leave"):
        monkeypatch.setattr(Launch, name, DeviceLaunch.__dict__[name], raising=False)
    return "GPU"


@pytest.fixture(autouse=True)
def remote(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceLaunch, "C", Module())


@pytest.mark.parametrize("seed", range(40))
def test_the_bits_of_the_cpu_kernel(seed: int) -> None:
    """Float32 states: the same explicit fused operations and polynomials, so the same bits."""
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    options: dict[str, Any] = {
        "batch": 3, "channels": pick(1, 3), "inner": pick(16, 67, 256, 5000), "branches": pick(1, 2, 3),
        "slots": pick((1,), (2, 1), (4,)), "guidance_slots": pick(0, 1), "output": pick(*FLOATS),
        "inputs": pick(*FLOATS), "density": pick(0.5, 1.0), "denoised": pick(True, False),
        "noise": pick("none", "tensor", "philox"), "gradient": pick(True, False), "variance": pick(True, False),
        "bound": pick(True, False), "row": pick(0, 1, (2, 1, 3)), "layout": pick("contiguous", "gap", "last"),
        "time": pick("float32", "int64"), "routes": pick(True, False), "nan": pick(True, False),
    }  # fmt: skip
    cpu, gpu = Launch(seed, **options), DeviceLaunch(seed, **options)
    cpu.run()
    gpu.run()
    for a, b in zip(cpu.written(), gpu.written(), strict=True):
        assert same_bits(a.view, b.view, a.dtype)
    for told, there in zip(cpu.time, gpu.time, strict=True):
        np.testing.assert_array_equal(told, there)


def test_negative_control_other_bits_are_seen() -> None:
    cpu, gpu = (kind(1, inner=67, density=1.0, noise="philox", row=1) for kind in (Launch, DeviceLaunch))
    gpu.samples["seed"] += 1
    cpu.run()
    gpu.run()
    assert same_bits(cpu.output[0].view, gpu.output[0].view, "float32")
    assert not same_bits(cpu.state.view, gpu.state.view, "float32")


@pytest.mark.parametrize("noise", ["none", "philox"])
def test_a_launch_is_repeatable(noise: str) -> None:
    """Many blocks, mixed plans, the same launch ten times: the same bytes everywhere."""
    options: dict[str, Any] = {"batch": 4, "channels": 4, "inner": 40_000, "slots": (2, 3), "noise": noise}
    results = set()
    for _ in range(10):
        launch = DeviceLaunch(5, density=1.0, **options)
        launch.run()
        results.add(b"".join(t.view.tobytes() for t in launch.written()))
    assert len(results) == 1
    other = DeviceLaunch(6, density=1.0, **options)  # negative control
    other.run()
    assert b"".join(t.view.tobytes() for t in other.written()) not in results


@real
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (2, 3, 333, 77)])
@pytest.mark.parametrize("solver", ["unipc", "euler_ancestral"])
def test_programmatic_dependent_launch_changes_no_bit(solver: str, shape: tuple[int, ...]) -> None:
    """Launches one behind another, each of which reads what the one before it wrote, and may begin before it ends."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0 or above")
    torch.manual_seed(0)
    noise, outputs = torch.randn(shape, device=DEVICE), torch.randn(2 * shape[0], *shape[1:], device=DEVICE)
    results = []
    for dependent in (False, True):
        rows = KernelRows(CASES[solver], 60, noise, [outputs], "native", dependent=dependent)
        assert rows.step.step.dependent_launch == dependent
        for _ in range(20):
            rows.poison()
            run_all(rows)
            results.append([part.clone() for part in rows.written()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert not torch.equal(results[0][0], noise)


@pytest.mark.parametrize("type", [*FLOATS, "float64"])
def test_normals(type: str) -> None:
    """Against the definition, and the host's bits but for float64, whose logarithm is each library's own."""
    dtype = getattr(torch, type)
    for count, first in ((1, 0), (7, 0), (64, 4), (4100, 0), (129, 2), (10, 2**34 - 5)):
        z, radius = normals(first, count, 2**63 + 5, 3, TAG_STEP)
        host = torch.full((count,), torch.nan, dtype=dtype)
        out = host.to(DEVICE)
        native.C.cuda_normals(0, 0, out.data_ptr(), type, count, 2**63 + 5, 3, TAG_STEP, first)
        wait()
        values = np.asarray(out.cpu().double().numpy(), z.dtype)
        assert close(values, z, radius, type, "float64" if type == "float64" else "float32").all()
        native.C.normals(host.data_ptr(), type, count, 2**63 + 5, 3, TAG_STEP, first)
        assert type == "float64" or torch.equal(out.cpu(), host)
