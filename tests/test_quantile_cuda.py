"""The CUDA kernel of dynamic thresholding's quantile on a simulated GPU: the same source compiled for the host.

Expected values are those of the CPU kernel's tests, collected here too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from launches import Launch, address
from simulated.build import counts, reset
from test_quantile import (  # noqa: F401  the table of the CPU kernel
    Given,
    Thresholded,
    bits,
    test_a_guided_output_by_groups_has_the_bound_of_its_weights,
    test_a_nan_anywhere_is_nan_there_alone,
    test_a_sample_is_the_same_in_any_batch_at_any_index,
    test_lengths,
    test_random_plans,
    test_rows_without_d_and_prologues_have_no_bound_and_idle_samples_keep_theirs,
    test_special_values,
    test_strided_operands_give_the_same_bits,
    test_the_step_reads_the_bound,
    test_values_are_those_of_exact_arithmetic,
)

from pyguide import native

if native.C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)

KEPT = {"float32": 20_480, "float64": 10_240}  # elements whose keys stay in shared memory: 80 KiB


@pytest.fixture(autouse=True)
def isa(simulated: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the tests of test_quantile.py run on."""
    monkeypatch.setattr(Launch, "C", simulated)
    monkeypatch.setattr(Launch, "placed", True)
    reset(simulated, seed=1)
    return "simulated GPU"


# ---- bits -----------------------------------------------------------------------------------------------------------
def test_bits_are_those_of_the_cpu_kernel_in_any_order_of_threads(
    simulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"inner": 1500, "branches": 3, "density": 1.0, "denoised": True, "output": "bfloat16"}
    found = set()
    for seed in range(4):
        reset(simulated, seed)
        found.add(bits(Thresholded(7, 0.93, **options).run()))
    monkeypatch.setattr(Launch, "C", native.C)
    monkeypatch.setattr(Launch, "placed", False)
    if len(native.C.isas()) > 1:  # with a fused multiply-add
        found.add(bits(Thresholded(7, 0.93, **options).run()))
    assert len(found) == 1
    assert bits(Thresholded(7, 0.931, **options).run()) not in found  # negative control


@pytest.mark.parametrize(("state", "N"), [("float32", 23_001), ("float64", 11_002)])
def test_samples_larger_than_what_is_kept(state: str, N: int) -> None:
    assert KEPT[state] < N
    D = np.random.default_rng(N).normal(size=(1, N))
    for values in (D, np.full((1, N), 0.3) * np.sign(D)):  # the latter: no digit leaves anything out
        Given(values, state).compare(0.995)


# ---- what is read and written ---------------------------------------------------------------------------------------
def reads(simulated: Any, D: np.ndarray, state: str, quantile: float) -> float:
    """How often the kernel reads an element of the one operand that makes D, 16 bytes at a time."""
    given = Given(D, state)
    D_bytes = given.D.nbytes
    assert address(given.D) % 16 == 0
    reset(simulated, seed=2)
    given.run(quantile)
    count = counts(simulated)
    units = D_bytes // 16
    step = {"float32": (units, 0), "float64": (0, units)}[state]  # the staged kernel, of float64 states, copies
    assert (count["launches"], count["bulk_copies"]) == (2, step[1])
    return (count["bulk_loads"] - step[0]) / units


def test_an_element_is_read_once_where_its_keys_stay_and_twice_as_a_rule(simulated: Any) -> None:
    rng = np.random.default_rng(0)
    for state in ("float32", "float64"):
        assert reads(simulated, rng.normal(size=(1, 4096)), state, 0.995) == 1
        assert reads(simulated, np.ones((1, 4096)), state, 0.995) == 1
    # of normal numbers a first digit, an eighth of an octave, has a tenth at most
    assert reads(simulated, rng.normal(size=(1, 24_576)), "float32", 0.995) == 2
    assert reads(simulated, np.ones((1, 24_576)), "float32", 0.995) == 3


def test_idle_samples_and_rows_without_d_read_no_operand(simulated: Any) -> None:
    for row, end, bound in ((1, 1, -7), (0, 2, 0)):
        given = Given(np.ones((1, 4096)))
        given.weights[...] = np.nan
        given.bounds.give(given.step, 0.9, 1.0, 2.0)
        given.samples["row"], given.samples["end"] = row, end
        given.step.place(
            0,
            *map(address, (given.samples, given.tables, given.weights, given.weights, given.source, given.target)),
        )
        given.step.run()
        assert given.bounds.values.tolist() == [bound]
        assert counts(simulated)["bulk_loads"] == 0
        reset(simulated, seed=1)
