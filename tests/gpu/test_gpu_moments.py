"""Moments, programs and groups by the CUDA kernels on a GPU: the tests of the CPU kernels' table, in device memory that
is copied back whole, and what only many blocks at once can show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import test_groups as groups_table
import test_moments as moments_table
import torch
from gpu_support import SIMULATED, Mirror, real, wait
from launches import Resident, Tensor
from moments_cases import Case, Kernel
from test_groups import (
    run_and_compare,
    test_the_longest_program_by_groups,  # noqa: F401
    test_the_step_reads_the_guided_output,  # noqa: F401
)
from test_groups import test_samples_that_do_not_act_and_idle_ones as test_plain_and_idle_samples_by_groups  # noqa: F401
from test_groups import test_types_and_layouts as test_types_and_layouts_by_groups  # noqa: F401
from test_moments import (  # noqa: F401  the table of the CPU kernel, run here by `kernel`
    norm_ratio,
    test_a_nan_stays_in_its_sample,
    test_a_sample_is_the_same_in_any_batch_at_any_index,
    test_a_small_difference_of_branches,
    test_denoised_space_at_a_large_sigma,
    test_moments,
    test_operations,
    test_samples_that_do_not_act_and_idle_ones,
    test_the_longest_programs,
    test_the_step_runs_with_the_block,
    test_types_and_layouts,
)

from pyguide import native
from pyguide.bench.clock import CudaClock
from pyguide.bench.gpu import counts
from pyguide.bench.gpu.setup import FULL, Setup
from pyguide.layout import CHUNK


class DeviceCase(Case):
    """A case whose every operand is copied to the device, run there, and copied back whole."""

    mirrors: dict[int, Mirror]

    def enter(self) -> Resident:
        """Tell the step where everything lies now."""
        resident = Resident(**{name: getattr(self, name) for name in (*self.CONTROL, *self.WORK)})
        tensors = [self.state, *self.output, self.input]
        memories = (*(t.memory for t in tensors), *resident.memory.values())
        self.mirrors = {id(memory): Mirror(memory) for memory in memories}

        def there(name: str) -> int:
            return self.mirrors[id(resident.memory[name])].pointer(resident.pointer(name))

        def operand(t: Tensor) -> tuple[int, int, int, int]:
            return (self.mirrors[id(t.memory)].pointer(t.pointer), *t.strides)

        samples, tables, weights, route = map(there, self.CONTROL)
        step = self.step
        step.place(0 if SIMULATED else torch.cuda.current_device(), samples, tables, weights, 0, route, route)
        if self.weighs:
            step.place_moments(*map(there, self.WORK))
        step.state = operand(self.state)[0]
        for k, t in enumerate(self.output):
            step.set_output(k, *operand(t))
            step.set_input(k, *operand(self.input))
        if not SIMULATED:
            step.stream = torch.cuda.current_stream().cuda_stream
        return resident

    def run(self, name: str = "run") -> Case:
        resident = self.enter()
        getattr(self.step, name)()
        wait()
        for mirror in self.mirrors.values():
            mirror.download()
        assert (resident.arrays["samples"]["ticket"] == 0).all()
        for key in ("weights", "moments", "guided"):
            getattr(self, key)[...] = resident.arrays[key]
        return self


@pytest.fixture
def kernel(place: Any, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    for module in (moments_table, groups_table):
        monkeypatch.setattr(module, "Case", DeviceCase)
    return Kernel(native.C, 0)


@pytest.mark.parametrize("groups", [(40, 64, 1), (33, 48, 1), (1, 1300, 1), (1, 4, 300), (2, 3, 77), (60, 1, 1)])
@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_groups_of_every_kind(kernel: Kernel, output: str, groups: tuple[int, int, int]) -> None:
    for own, branches, space in ((0, 2, (0.0, 1.0)), (1, 2, (0.4, -0.9)), (2, 3, (0.0, 1.0))):
        run_and_compare(DeviceCase(kernel, norm_ratio(own_slots=own, branches=branches), branches=branches,
                                   own_slots=own, inner=int(np.prod(groups)), groups=groups, output=output,
                                   space=space))  # fmt: skip


@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_one_block_or_many_give_the_same_bits(kernel: Kernel, output: str) -> None:
    """moments() takes a block for each chunk, run() one for the sample and the step; both ten times."""
    inner = 4 * CHUNK
    found = set()
    for name in ("moments", "run") * (1 if SIMULATED else 10):
        case = DeviceCase(kernel, norm_ratio(), inner=inner, output=output, batch=3).run(name)
        found.add(case.moments.tobytes() + case.weights.tobytes())
    assert len(found) == 1
    other = DeviceCase(kernel, norm_ratio(), inner=inner, output=output, batch=3, seed=1).run()  # negative control
    assert other.moments.tobytes() + other.weights.tobytes() not in found


@real
def test_many_chunks_are_joined_by_the_last_of_them(kernel: Kernel) -> None:
    found = set()
    for _ in range(20):
        case = DeviceCase(kernel, norm_ratio(), inner=300 * CHUNK + 5, batch=4).run("moments")
        found.add(case.moments.tobytes() + case.weights.tobytes())
    assert len(found) == 1
    for b in range(4):
        case.compare_moments(b)


@real
@pytest.mark.parametrize(
    ("inner", "groups", "launches"), [(4 * CHUNK, None, 1), (4 * CHUNK + 4, None, 2), (64 * 64, (64, 64, 1), 2)]
)
def test_one_launch_or_two_and_nobody_waits(kernel: Kernel, inner: int, groups: Any, launches: int) -> None:
    setup = Setup(CudaClock("cuda:0"), FULL, ("native", "triton"), None, False, 1, 0.0)
    case = DeviceCase(kernel, norm_ratio(), inner=inner, groups=groups)
    case.enter()
    case.step.enqueue()
    wait()

    def launches_of(n: int) -> Any:
        return counts.events(lambda: [case.step.enqueue() for _ in range(n)], setup)

    few, many = launches_of(3), launches_of(13)
    assert {kind: (many[kind] - few[kind]) / 10 for kind in counts.KINDS} == {
        "launches": launches, "copies": 0, "copies_from_host": 0, "synchronisations": 0,
    }  # fmt: skip
