"""The CUDA kernel of the classifier's gradient on a simulated GPU: the same source compiled for the host.

Expected values are those of the CPU kernel's tests, collected here too (tests/classifier_grad_cases.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from classifier_grad_cases import CLASSES, DTYPES, Case, Kernel, kinds
from simulated.build import counts, reset
from test_classifier_grad import (  # noqa: F401  the table of the CPU kernel
    test_a_sample_is_the_same_in_any_batch_at_any_index,
    test_an_idle_sample_is_zeros_and_reads_nothing,
    test_an_unfinite_logit_stays_in_its_sample,
    test_arguments_that_are_refused,
    test_flags_are_set_where_asked_and_kept,
    test_labels_that_are_no_class,
    test_layouts_and_alignments_do_not_change_bits,
    test_more_labels_than_classes,
    test_no_samples_and_no_log_prob,
    test_nothing_past_an_operand_is_touched,
    test_one_class_and_no_scale_give_exactly_zero,
    test_overlaps_are_refused,
    test_rows_and_chunks,
    test_type_of_scale_distribution_and_log_prob,
)

from pyguide import native

if native.C is None:
    pytest.skip(f"no native kernel: {native.reason}", allow_module_level=True)


@pytest.fixture
def kernel(simulated: Any) -> Kernel:
    reset(simulated, seed=1)
    return Kernel(simulated, 0)


# ---- values -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_values(kernel: Kernel, classes: int, dtype: str) -> None:
    cases = kinds(classes, dtype)
    if classes > 5000:  # 1,024 threads take their time
        cases = {name: cases[name] for name in ("several labels", "wide, distribution", "one high, all others low")}
    for logits, target in cases.values():
        Case(logits, target, np.array([1.0, -7.5, 0.3]), dtype=dtype).run_and_compare(kernel)


# ---- bits ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_order_of_blocks_and_threads_changes_bits(kernel: Kernel, dtype: str) -> None:
    for classes in (100, 4500):
        for name in ("several labels", "distribution"):
            logits, target = kinds(classes, dtype)[name]
            bits = set()
            for seed in range(3):
                reset(kernel.C, seed)
                bits.add(Case(logits, target, dtype=dtype).run(kernel).bits())
            assert len(bits) == 1
            assert Case(logits * 2, target, dtype=dtype).run(kernel).bits() not in bits  # negative control


# ---- what is read and written ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "classes"), [("float32", 1000), ("float32", 4096), ("bfloat16", 1000), ("float16", 8192)]
)
def test_logits_are_read_once_in_16_bytes_up_to_thousands_of_classes(kernel: Kernel, dtype: str, classes: int) -> None:
    units = 3 * classes // (4 if dtype == "float32" else 8)
    for name in ("several labels", "distribution"):
        reset(kernel.C, seed=1)
        case = Case(*kinds(classes, dtype)[name], dtype=dtype).run_and_compare(kernel)
        count = counts(kernel.C)
        assert (count["launches"], count["blocks"]) == (1, 3)
        assert (count["bulk_loads"], count["bulk_stores"]) == (units, units)
        # besides: a sample's row, end and scale by each thread (idle lanes of the last warp too), log_prob, labels
        threads = 3 * -(-units // 96) * 32
        if name == "distribution":
            assert count["loads"] == 3 * threads + 2 * 3 * classes
            assert count["stores"] == 3
        else:
            distinct = sum(len(np.unique(row[row >= 0])) for row in case.target)
            valid = int((case.target >= 0).sum())
            assert count["stores"] == 3 + valid
            again = count["loads"] - 3 * threads
            # three looks at each label, the logits of those that name a class, and the labels before each of them
            assert again <= 3 * case.target.size + 2 * valid + distinct + 3 * 9 * 9
        assert count["bulk_copies"] == count["small_copies"] == 0


def test_more_classes_are_read_three_times_at_most(kernel: Kernel) -> None:
    classes = 21844  # 16 bytes each are 5,461 units, of which a block's first 1,024 stay in registers
    case = Case(*kinds(classes, "float32")["one label"]).run_and_compare(kernel)
    units = classes // 4
    assert counts(kernel.C)["bulk_loads"] == case.count * (units + 2 * (units - 1024))
    assert counts(kernel.C)["bulk_stores"] == case.count * units


def test_an_idle_sample_reads_its_row_alone(kernel: Kernel) -> None:
    Case(np.zeros((1, 4096)), np.zeros((1, 1), int), row=[1], end=[1]).run_and_compare(kernel)
    count = counts(kernel.C)
    assert (count["bulk_loads"], count["bulk_stores"]) == (0, 1024)
    assert count["loads"] == 2 * 1024
    assert count["stores"] == 1


# ---- errors ---------------------------------------------------------------------------------------------------------
def test_a_device_that_is_not_there_is_named(kernel: Kernel) -> None:
    case = Case(np.zeros((2, 5)), np.zeros((2, 1), int))
    before = case.bits()
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
        case.run(Kernel(kernel.C, 1))
    assert case.bits() == before


def test_without_a_gpu_a_launch_names_what_failed() -> None:
    """The real module on this machine: why it cannot run, and an error instead of a launch."""
    if not native.C.cuda_reason():
        pytest.skip("this machine has a GPU; benchmarks/gpu.sh tests it")
    start = r"^cuda\w+: cudaError\w+: \w" if native.C.build["cuda_archs"] else "^built without CUDA: "
    case = Case(np.zeros((2, 5)), np.zeros((2, 1), int))
    before = case.bits()
    with pytest.raises(RuntimeError, match=start):
        case.run(Kernel(native.C, 0))
    assert case.bits() == before
