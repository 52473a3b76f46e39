"""The moments, programs and groups of the CUDA kernels on a simulated GPU: the same source compiled for the host.

Expected values are those of the CPU kernel's tests, collected here too.
"""

from __future__ import annotations

from typing import Any

import moments_cases
import numpy as np
import pytest
from launches import Resident, address
from moments_cases import ROWS, Case, Kernel, Program
from simulated.build import counts, reset, separate
from test_groups import (
    run_and_compare,
    test_the_longest_program_by_groups,  # noqa: F401
    test_the_step_reads_the_guided_output,  # noqa: F401
)
from test_groups import test_a_weight_of_zero_is_not_read as test_a_weight_of_zero_is_not_read_by_groups  # noqa: F401
from test_groups import test_samples_that_do_not_act_and_idle_ones as test_plain_and_idle_samples_by_groups  # noqa: F401
from test_groups import test_types_and_layouts as test_types_and_layouts_by_groups  # noqa: F401
from test_moments import (  # noqa: F401  the table of the CPU kernel
    norm_ratio,
    test_a_nan_stays_in_its_sample,
    test_a_plain_sample_reads_only_its_own_branches,
    test_a_sample_is_the_same_in_any_batch_at_any_index,
    test_a_small_difference_of_branches,
    test_denoised_space_at_a_large_sigma,
    test_layouts_and_types_that_hold_the_same_values_give_the_same_bits,
    test_moments,
    test_moments_alone_and_own,
    test_nothing_past_an_operand_is_touched,
    test_operations,
    test_samples_that_do_not_act_and_idle_ones,
    test_the_longest_programs,
    test_the_step_runs_with_the_block,
    test_types_and_layouts,
)

from pyguide import native
from pyguide.layout import CHUNK

if native.C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

FUSED = 4 * CHUNK  # elements of a sample up to which one block makes moments and step


@pytest.fixture
def kernel(simulated: Any) -> Any:
    reset(simulated, seed=1)
    separate(simulated, False)
    yield Kernel(simulated, 0)
    separate(simulated, False)


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> list[Resident]:
    """The device copies of the launches of cases, the latest last."""
    made: list[Resident] = []

    class Kept(Resident):
        def __init__(self, **arrays: Any) -> None:
            super().__init__(**arrays)
            made.append(self)

    monkeypatch.setattr(moments_cases, "Resident", Kept)
    return made


def weighted(branches: int = 2, own_slots: int = 0, slots: int = 1, **options: Any) -> dict[str, Any]:
    """Arguments of a Case whose program reads all moments of the difference and the reference."""
    program = norm_ratio(own_slots=own_slots, branches=branches, slots=slots)
    return {"program": program, "branches": branches, "own_slots": own_slots, "slots": slots, **options}


def everything(case: Case) -> bytes:
    return b"".join(case.bits(b) for b in range(case.B))


# ---- values ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("state", ["float32", "float64"])
@pytest.mark.parametrize(
    ("channels", "inner", "groups"),
    [
        (1, 40 * 64, (40, 64, 1)), (33, 48, (33, 48, 1)), (130, 7, (130, 7, 1)), (1, 1300, (1, 1300, 1)),
        (2, 260, (2, 260, 1)), (4, 300, (1, 4, 300)), (19, 70, (1, 19, 70)), (6, 77, (2, 3, 77)), (5, 12, (60, 1, 1)),
        (5, 12, (1, 1, 60)), (1, 1, (1, 1, 1)),
    ],
)  # fmt: skip
def test_groups(kernel: Kernel, channels: int, inner: int, groups: tuple[int, int, int], state: str) -> None:
    """Teams of 1 to 32 lanes, one turn and several, groups that fill a block and not."""
    for own, branches, space in ((0, 2, (0.0, 1.0)), (1, 2, (0.4, -0.9)), (2, 3, (0.0, 1.0))):
        for output in ("float32", "bfloat16") if state == "float32" else ("float64",):
            run_and_compare(Case(kernel, **weighted(branches, own, channels=channels, inner=inner, groups=groups,
                                                    state=state, output=output, space=space)))  # fmt: skip


def test_an_absent_branch_of_a_sample_that_acts_is_nan(kernel: Kernel) -> None:
    """Under enqueue, where no host looks at routes."""
    for output in ("float32", "float16"):
        for groups in (None, (4, 64, 1), (1, 4, 64)):
            case = Case(kernel, **weighted(channels=4, inner=64, output=output, groups=groups))
            case.route[1, 0] = -1
            case.run("enqueue")
            s = case.state.get()[0].astype(float)
            assert np.isfinite(s[0]).all()
            assert np.isnan(s[1]).all()
            if not groups:
                assert np.isfinite(case.moments[0]).all()
                assert np.isnan(case.moments[1, 2:4]).all()  # Q_00, Q_01


# ---- bits and launches ----------------------------------------------------------------------------------------------
SHAPES: list[dict[str, Any]] = [
    weighted(),
    weighted(output="bfloat16"),
    weighted(own_slots=1, output="float16"),
    weighted(slots=2, own_slots=1),
    weighted(slots=3, own_slots=1, space=(0.3, -0.7)),
    weighted(3, 1, space=(0.3, -0.7)),
    weighted(layout="gap", space=(0.3, -0.7)),
    weighted(own_slots=1, state="float64", output="float64"),
    weighted(5, output="bfloat16"),
]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_one_launch_where_a_sample_fits_a_block_else_two_and_the_same_bits(
    kernel: Kernel, shape: int, resident: list[Resident]
) -> None:
    options = SHAPES[shape]
    for channels, inner in ((1, 100), (3, 512), (1, CHUNK + 1), (4, CHUNK), (4, CHUNK + 2)):
        found = set()
        for apart in (False, True):
            separate(kernel.C, apart)
            reset(kernel.C, seed=2 + apart)
            case = Case(kernel, **options, channels=channels, inner=inner, acting=[1, 0]).run()
            most = FUSED // 2 if options.get("state") == "float64" else FUSED
            one = not apart and channels * inner <= most and options["branches"] + options["own_slots"] <= 4
            assert counts(kernel.C)["launches"] == (1 if one else 2)
            found.add(everything(case))
            samples = resident[-1].arrays["samples"]
            assert samples["ticket"].tolist() == [0, 0]
            assert samples["row"].tolist() == case.samples["row"].tolist() == [2, 2]
        assert len(found) == 1
        other = Case(kernel, **options, channels=channels, inner=inner, seed=1).run()  # negative control
        assert everything(other) not in found


@pytest.mark.parametrize("groups", [None, (128, 64, 1), (1, 8, 1024)])
def test_no_order_of_blocks_and_threads_and_no_device_changes_bits(kernel: Kernel, groups: Any) -> None:
    for options in (weighted(own_slots=1), weighted(3, output="bfloat16")):

        def run(seed: int, processors: int = 2, draw: int = 0, options: Any = options) -> bytes:
            reset(kernel.C, seed, processors)
            return everything(Case(kernel, **options, channels=8, inner=1024, groups=groups, seed=draw, batch=3).run())

        bits = {run(1), run(2), run(3), run(4, processors=200)}
        assert len(bits) == 1
        assert run(1, draw=1) not in bits  # negative control


def test_a_quantile_is_a_launch_between(kernel: Kernel) -> None:
    for groups, launches in ((None, 3), ((4, 64, 1), 3)):
        case = Case(kernel, **weighted(channels=4, inner=64, groups=groups))
        bound = np.full(2, np.nan, np.float32)
        case.step.set_quantile(0.9, 1e-3, 100.0, address(bound))
        reset(kernel.C, seed=1)
        case.run()
        assert counts(kernel.C)["launches"] == launches
        assert ((bound > 1e-3) & (bound < 100)).all()
        free = Case(kernel, **weighted(channels=4, inner=64, groups=groups)).run()
        assert case.weights.tobytes() == free.weights.tobytes()
        assert case.state.view.tobytes() != free.state.view.tobytes()


def test_a_refresh_makes_no_moments(kernel: Kernel) -> None:
    case = Case(kernel, **weighted(inner=64))
    reset(kernel.C, seed=1)
    case.run("refresh")
    assert counts(kernel.C)["launches"] == 1
    assert np.isnan(case.moments).all()
    assert np.isnan(case.weights[ROWS]).all()
    assert np.isfinite(case.input.get().astype(float)).all()


# ---- what is read and written ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("output", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (2, 1), (3, 0), (4, 1), (8, 0)])
def test_each_operand_is_read_once_in_16_bytes(kernel: Kernel, shape: tuple[int, int], output: str) -> None:
    branches, own = shape
    size = 4 if output == "float32" else 2
    for inner in (128, 1024, CHUNK + 256):
        for space in ((0.0, 1.0), (0.5, -0.25)):
            case = Case(kernel, Program(branches + own), branches=branches, own_slots=own, inner=inner, output=output,
                        space=space, acting=[1, 0])  # fmt: skip
            reset(kernel.C, seed=1)
            case.run("moments")
            count = counts(kernel.C)
            states = own + (space[0] != 0)
            assert 16 * count["bulk_loads"] == inner * (size * branches + 4 * states)  # of the sample that acts
            assert count["bulk_stores"] == count["bulk_copies"] == 0
            assert count["blocks"] == 2 * -(-inner // CHUNK)


@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_tokens_are_read_twice_in_16_bytes(kernel: Kernel, output: str) -> None:
    """For the moments of a group, then with its weights."""
    size = 4 if output == "float32" else 2
    for reduce in (32, 64, 512):
        case = Case(kernel, **weighted(inner=40 * reduce, groups=(40, reduce, 1), output=output))
        reset(kernel.C, seed=1)
        case.run("moments")
        count = counts(kernel.C)
        assert 16 * count["bulk_loads"] == 2 * 2 * 2 * case.N * size
        assert 16 * count["bulk_stores"] == 2 * case.N * 4


def test_a_sample_that_does_not_act_reads_its_block_alone(kernel: Kernel) -> None:
    case = Case(kernel, Program(2), inner=2 * CHUNK, acting=[0, 0], batch=2)
    reset(kernel.C, seed=1)
    case.run("moments")
    count = counts(kernel.C)
    threads = 512
    assert count["bulk_loads"] == count["bulk_copies"] == count["small_copies"] == 0
    assert count["loads"] == 2 * (2 * 2 * threads + case.width)  # a sample and whether it acts, in each of two blocks
    assert count["stores"] == 2 * case.width
