"""The kernel between a classifier's forward and its backward pass: from logits to the gradient that seeds the latter.

reference.classifier_grad is its definition, csrc/classifier_grad.h, kernels/classifier_grad.cu and
kernels/classifier_grad_triton.py are its twins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arrays, native, reference
from .arrays import Array
from .layout import NONFINITE_LOGITS

Tensor = Any


def bind(
    backend: str,
    logits: Tensor,  # [n, classes], or one like it
    target: Tensor,  # [B, n] int64 labels, negative: none; or [B, classes] in the dtype of the scales
    scales: Tensor,  # [rows, B] float32 or float64
    log_prob: Tensor | None = None,  # [B] in the dtype of the scales; written
    *,
    samples: Array | None = None,  # of the launch, where the kernel reads them: whose scale is that of their row
    first: int = 0,  # the sample of logits[0]
    check: bool = False,
) -> Callable[[Tensor, Tensor], None]:
    """launch(logits, grad): the kernel of a fused back end ("native", "triton") on the current stream of a GPU, for
    logits of that shape, strides and dtype; grad [n, classes], contiguous and of that dtype, is written.

    What does not change from launch to launch is looked up here: it costs ten times a small launch.
    """
    if backend == "triton":
        from .device import launch_triton

        options: dict[str, Any] = {"samples": samples, "first": first, "log_prob": log_prob, "check": check}
        triton = launch_triton().classifier_grad
        return lambda logits, grad: triton(logits, target, scales, grad=grad, **options)
    assert native.C is not None
    assert target.stride(1) == 1 or target.shape[1] == 1, "callers hand over rows without gaps"
    assert scales.stride(1) == 1 or scales.shape[1] == 1, "callers hand over rows without gaps"
    kernel, device = native.C.classifier_grad, logits.device
    on_device = device.type == "cuda"
    given = (
        *(arrays.dtype_name(logits), *logits.shape, *logits.stride()),
        *(target.data_ptr(), target.dtype == scales.dtype, target.shape[1], target.stride(0)),
        *(scales.data_ptr(), arrays.dtype_name(scales), scales.stride(0) if len(scales) > 1 else 0),
        *(0 if samples is None else arrays.pointer(samples), first),
    )
    alive = target, scales, log_prob, samples  # as long as the launch, which has their addresses
    rest = (0 if log_prob is None else log_prob.data_ptr(), check, 0, (device.index or 0) if on_device else -1)

    def run(logits: Tensor, grad: Tensor, alive: Any = alive) -> None:
        stream = arrays.current_stream(device) if on_device else 0
        kernel(logits.data_ptr(), *given, grad.data_ptr(), *rest, stream)

    return run


class ClassifierGrad:
    """scale * d log p(target | logits) / d logits for the samples of a launch, at the row that each of them stands at.

    target: [B, n] int64 labels (negative: none), or [B, classes] probabilities in the dtype of the scales.
    scales: [rows, B], float32 or float64: a sample's scale by the row that it runs next.
    log_prob: [B] in that dtype, written: log p(target | x).
    samples: of the launch, on the host, and on the device for a back end that reads them there.
    """

    def __init__(
        self,
        backend: str,
        target: Tensor,
        scales: Tensor,
        log_prob: Tensor,
        samples: np.ndarray[Any, Any],
        resident: Array | None = None,
        *,
        check: bool = False,
    ) -> None:
        self.backend, self.target, self.scales, self.log_prob = backend, target, scales, log_prob
        self.samples, self.resident, self.check = samples, resident, check
        self.distribution = scales.dtype == target.dtype
        self._launches: dict[Any, Callable[[Tensor, Tensor], None]] = {}

    def __call__(self, logits: Tensor, first: int) -> Tensor:
        """The gradient [n, classes] in the dtype of the logits [n, classes] of samples first .. first + n."""
        logits = logits.resolve_neg()  # a view that is negated as it is read: not by a kernel
        if self.backend == "reference":
            return self._reference(logits, first)
        grad = logits.new_empty(logits.shape)
        self.launch(logits, grad, first)
        return grad

    def launch(self, logits: Tensor, grad: Tensor, first: int) -> None:
        """The kernel alone; grad [n, classes] is written."""
        key = logits.shape, logits.stride(), logits.dtype, first
        launch = self._launches.get(key)
        if launch is None:
            samples = self.samples if self.resident is None else self.resident
            options: dict[str, Any] = {"samples": samples, "first": first, "check": self.check}
            launch = bind(self.backend, logits, self.target, self.scales, self.log_prob, **options)
            self._launches[key] = launch
        launch(logits, grad)

    def _reference(self, logits: Tensor, first: int) -> Tensor:
        torch, here = sys.modules["torch"], slice(first, first + len(logits))
        samples = self.samples[here]
        active = (samples["row"] >= 0) & (samples["row"] < samples["end"])
        rows = np.where(active & (len(self.scales) > 1), samples["row"], 0)
        scale = self.scales[rows.tolist(), list(range(first, first + len(rows)))]
        grad, log_prob = reference.classifier_grad(logits, self.target[here], scale)
        idle = torch.from_numpy(~active).to(logits.device)
        grad, log_prob = grad.masked_fill(idle[:, None], 0), log_prob.masked_fill(idle, 0)
        with torch.inference_mode(self.log_prob.is_inference()):
            self.log_prob[here] = log_prob
        if self.check:
            bad = ~(logits < np.inf).all(dim=1) & ~idle
            self.samples["flags"][here] |= NONFINITE_LOGITS * bad.cpu().numpy()
        return grad
