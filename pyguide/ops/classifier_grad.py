"""torch.ops.pyguide.classifier_grad: what seeds a classifier's backward pass."""

from __future__ import annotations

from typing import Any

from .. import backends
from ..classifier_grad import bind
from ..reference import classifier_grad as reference
from .library import FLOATS, LIBRARY, STATES, TAG, Tensor, expect, torch

LIBRARY.define("classifier_grad(Tensor logits, Tensor target, Tensor scale) -> (Tensor, Tensor)", tags=(TAG,))


def classifier_grad(
    logits: Tensor,  # [B, classes] of any floating dtype, detached
    target: Tensor,  # [B] or [B, n] int64: any of these classes, negative: none; [B, classes]: a distribution
    scale: Tensor,  # [B] float32 or float64
) -> tuple[Tensor, Tensor]:
    """(scale * d log p(target) / d logits [B, classes] in their dtype, log p(target) [B] in that of scale).

    With p = softmax(logits):  grad_k = scale ([k in Y] p_k / sum_Y p - p_k),  or scale (q_k - p_k sum q) for a
    distribution q in the dtype of scale. The seed of a classifier's backward pass:

        grad, log_prob = torch.ops.pyguide.classifier_grad(logits.detach(), labels, scale)
        (g,) = torch.autograd.grad(logits, x, grad)

    A label that is no class, or no label at all, gives NaN for that sample. Raises TypeError (dtype) or ValueError
    (shape, device, an operand that requires grad) naming the argument.
    """
    _check(logits, target, scale)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    log_prob = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
    if len(logits) == 0:
        return grad, log_prob
    backend = backends.choose("auto", logits.device.type)
    if backend == "reference":
        return reference(logits, target, scale)
    wide = target if target.ndim == 2 else target[:, None]
    bind(backend, logits, wide.contiguous(), scale[None].contiguous(), log_prob)(logits, grad)
    return grad, log_prob


def _check(logits: Tensor, target: Tensor, scale: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: expected [B, classes], got shape {tuple(logits.shape)}")
    device, batch = logits.device, logits.shape[0]
    expect("logits", logits, FLOATS, None, device, "walked", "the logits")
    expect("scale", scale, STATES, (batch,), device, "walked", "the logits")
    if target.dtype == scale.dtype:
        expect("target", target, (scale.dtype,), tuple(logits.shape), device, "walked", "the logits")
        return
    if target.ndim not in (1, 2) or target.shape[0] != batch or 0 in target.shape[1:]:
        raise ValueError(f"target: expected [B] or [B, n] with B = {batch}, got shape {tuple(target.shape)}")
    expect("target", target, (torch.int64,), None, device, "walked", "the logits")


def _fake(logits: Tensor, target: Tensor, scale: Tensor) -> Any:
    _check(logits, target, scale)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), torch.empty_like(scale)


LIBRARY.impl("classifier_grad", classifier_grad, "CompositeExplicitAutograd")
torch.library.register_fake("pyguide::classifier_grad", _fake, lib=LIBRARY)
