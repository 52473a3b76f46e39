"""The kernel between a classifier's forward and its backward pass: from logits to the gradient that seeds the latter.

reference.classifier_grad is its definition, csrc/classifier_grad.h, kernels/classifier_grad.cu and
kernels/classifier_grad_triton.py are its twins.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import arrays, native, reference
from .arrays import Array
from .layout import NONFINITE_LOGITS

Tensor = Any


def launch(
    backend: str,
    logits: Tensor,  # [n, classes]
    target: Tensor,  # [B, n] int64 labels, negative: none; or [B, classes] in the dtype of the scales
    scales: Tensor,  # [rows, B] float32 or float64
    grad: Tensor,  # like logits, contiguous; written
    log_prob: Tensor | None = None,  # [B] in the dtype of the scales; written
    *,
    samples: Array | None = None,  # of the launch, where the kernel reads them: whose scale is that of their row
    first: int = 0,  # the sample of logits[0]
    check: bool = False,
) -> None:
    """The kernel of a fused back end ("native", "triton"), on the current stream of a GPU."""
    if backend == "triton":
        from .device import launch_triton

        kernel = launch_triton().classifier_grad
        kernel(logits, target, scales, samples=samples, first=first, grad=grad, log_prob=log_prob, check=check)
        return
    assert native.C is not None
    on_device = logits.device.type == "cuda"
    native.C.classifier_grad(
        logits.data_ptr(),
        arrays.dtype_name(logits),
        *logits.shape,
        *logits.stride(),
        target.data_ptr(),
        target.dtype == scales.dtype,
        target.shape[1],
        target.stride(0),
        scales.data_ptr(),
        arrays.dtype_name(scales),
        scales.stride(0) if len(scales) > 1 else 0,
        0 if samples is None else arrays.pointer(samples),
        first,
        grad.data_ptr(),
        0 if log_prob is None else log_prob.data_ptr(),
        check,
        0,
        (logits.device.index or 0) if on_device else -1,
        arrays.current_stream(logits.device),
    )


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

    def __call__(self, logits: Tensor, first: int) -> Tensor:
        """The gradient [n, classes] in the dtype of the logits [n, classes] of samples first .. first + n."""
        if self.backend == "reference":
            return self._reference(logits, first)
        import torch

        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        self.launch(logits, grad, first)
        return grad

    def launch(self, logits: Tensor, grad: Tensor, first: int) -> None:
        """The kernel alone; grad [n, classes] is written."""
        samples = self.samples if self.resident is None else self.resident
        options: dict[str, Any] = {"samples": samples, "first": first, "check": self.check}
        launch(self.backend, logits, self.target, self.scales, grad, self.log_prob, **options)

    def _reference(self, logits: Tensor, first: int) -> Tensor:
        here = slice(first, first + len(logits))
        rows = self.samples["row"][here].tolist()
        scale = self.scales[rows, list(range(first, first + len(rows)))]
        grad, log_prob = reference.classifier_grad(logits, self.target[here], scale)
        self.log_prob[here] = log_prob
        if self.check:
            bad = ~(logits < np.inf).all(dim=1)
            self.samples["flags"][here] |= NONFINITE_LOGITS * bad.cpu().numpy()
        return grad
