"""The Triton kernel on a GPU: types, layouts, operands, random plans against the oracle; its noise; its compilations.

Each combination of types, branches, slots and operands is a compilation of seconds, so this is a part of the table of
the CPU kernel; tests of the interpreter run all of it.
"""

from __future__ import annotations

from typing import Any

import launches
import numpy as np
import pytest
import torch
from gpu_support import DEVICE, PLANS, SEEDS, TritonLaunch, conditions, free, initial, real, wait
from launches import Launch
from oracle import close, normals
from sanitize import LAUNCHES
from test_step import (  # noqa: F401  of the CPU kernel's table, run here by `isa`
    test_batch_position_does_not_change_bits,
    test_every_16_bit_value_is_read_exactly,
    test_identity_is_not_rewritten,
    test_int64_timesteps_round_to_nearest,
    test_nan_passes_through_the_clip,
    test_narrowing_rounds_once_to_nearest_even,
    test_nonfinite_is_flagged,
    test_refresh_writes_the_input_that_is_due,
)
from test_step import test_random_plans as random_plan

from pyguide import CFG, Sampler
from pyguide.layout import TAG_STEP

pytestmark = real


@pytest.fixture(autouse=True)
def triton_runs() -> None:
    launch_triton = pytest.importorskip("pyguide.kernels.launch_triton")
    assert launch_triton.reason() is None


@pytest.fixture
def isa(monkeypatch: pytest.MonkeyPatch) -> str:
    """What the tests of test_step.py run on. torch has no negative strides: a gap takes their place."""
    for name in ("C", "placed", "place", "on_device", "control", "enter", "leave", "operand", "flat"):
        value = next(kind.__dict__[name] for kind in TritonLaunch.__mro__ if name in kind.__dict__)
        monkeypatch.setattr(Launch, name, value, raising=False)
    plain = launches.Tensor.__init__

    def init(self: Any, shape: Any, dtype: str, layout: str = "contiguous", offset: int = 0) -> None:
        plain(self, shape, dtype, "gap" if layout == "reversed" else layout, offset)

    monkeypatch.setattr(launches.Tensor, "__init__", init)
    return "Triton"


FLOATS = "float32", "float16", "bfloat16", "float64"


@pytest.mark.parametrize("what", [what for what, _ in LAUNCHES])
def test_every_kind_of_launch(isa: str, what: str) -> None:
    for seed in range(3):
        Launch(seed, density=0.9, **dict(LAUNCHES)[what]).run_and_compare()


@pytest.mark.parametrize("output", FLOATS)
@pytest.mark.parametrize("inputs", FLOATS)
def test_types(isa: str, output: str, inputs: str) -> None:
    for inner in (67, 520, 4096):
        Launch(inner, output=output, inputs=inputs, inner=inner, batch=3, slots=(2,)).run_and_compare()


@pytest.mark.parametrize("layout", ["contiguous", "last", "slice", "gap"])
def test_lengths_and_alignments(isa: str, layout: str) -> None:
    """The numbers of elements are no constants of the kernel: one compilation, or a few for what divides by 16."""
    for inner in (*range(1, 34), 127, 128, 129, 1023, 1024, 1025):
        Launch(inner, inner=inner, channels=3, layout=layout, offset=inner % 17, slots=(2,)).run_and_compare()


@pytest.mark.parametrize("seed", range(16))
def test_random_plans(isa: str, seed: int) -> None:
    random_plan(isa, seed)


def test_zero_coefficients_are_not_products(isa: str) -> None:
    for seed in range(12):
        Launch(seed, slots=(2,), inner=150, density=0.5, nan=True, denoised=True).run_and_compare()


@pytest.mark.parametrize("count", [1, 7, 64, 4100])
def test_normals(count: int) -> None:
    from pyguide.kernels import launch_triton

    z, radius = normals(0, count, 2**63 + 5, 3, TAG_STEP)
    out = torch.full((count,), torch.nan, device=DEVICE)
    launch_triton.normals(out, 2**63 + 5, 3, TAG_STEP)
    wait()
    assert close(np.asarray(out.cpu().double().numpy(), z.dtype), z, radius, "float32", "float32").all()


@pytest.mark.parametrize("name", PLANS)
def test_rows_and_runs_need_no_other_kernel(name: str) -> None:
    """One compilation for a plan: nothing of a row, a seed or a scale is compiled in."""
    from pyguide.kernels import step_triton

    kernel = step_triton.step_kernel
    sampler = Sampler(free, PLANS[name], CFG(lambda step, steps: 1.5 + step), backend="triton")
    sampler(initial(SEEDS), **conditions(SEEDS), seeds=1)

    def compiled() -> int:
        return sum(len(entry[0]) for entry in kernel.device_caches.values())

    before = compiled()
    assert before > 0
    sampler(initial(SEEDS[::-1]), **conditions(SEEDS), seeds=[2**60 + i for i in range(5)])
    assert compiled() == before
    Sampler(free, PLANS[name], backend="triton")(initial(SEEDS), seeds=1)  # control: another number of branches
    assert compiled() > before
