"""The gradient of classifier guidance within a run: the classifier, its backward pass, and the kernel between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arrays
from .arrays import Array
from .classifier_grad import ClassifierGrad
from .conditions import Cond, Routing, check
from .extras import require
from .graph import frozen, keep
from .guidance import ClassifierGuidance, GradientGuidance
from .layout import C_IN, SAMPLE
from .models import Model
from .models.torch_model import from_numpy
from .path import Floats

if TYPE_CHECKING:
    from .run import Run

ROW = SAMPLE.fields["row"][1] // 4  # type: ignore[index]  # the word of a sample that holds it


def gradient(run: Run, guidance: ClassifierGuidance, model: Model | None, cond: Cond, scales: Floats) -> Gradient:
    """The gradient of a guidance method in a run.

    model: the wrapped classifier, if there is one. cond: what it sees besides x and t. scales: [R + 1, B], by the row
    that consumes an evaluation. Raises TypeError or ValueError naming the condition that does not fit.
    """
    if isinstance(guidance, GradientGuidance):
        return GivenGradient(run, guidance, cond, scales)
    if model is None:
        return LossGradient(run, guidance, cond, scales)
    return ClassifierGradient(run, guidance, model, cond, scales)


class Gradient(ABC):
    """g [B, C, *] at the state as it is, in the dtype of the state: `gradient(i, routing)` at evaluation i."""

    name: str  # of the argument that it comes from, in errors
    log_prob: Array | None = None  # [B] log p(y | x) of the last call

    def __init__(self, run: Run, guidance: ClassifierGuidance, like: Array, scales: Floats) -> None:
        self.guidance, self.batch, self.launch, self.step = guidance, run.batch, run.launch, run.step
        self.buffers, self.captured = run.buffers, run.sampler.cuda_graph
        self.x: Array = like  # the state, seen by what differentiates it
        self.is_numpy, self.real = run.is_numpy, arrays.dtype_name(run.launch.state)
        self.scales, self.tables = scales, dict[str, Array]()
        c_in = run.plan.table[:-1, C_IN]
        self.scaled = guidance.scaled and bool((c_in != 1).any())
        if self.scaled:
            self._place("c_in", np.broadcast_to(np.append(0, c_in)[:, None], scales.shape))
        if self.weighed:
            self._place("scales", scales)

    @property
    def weighed(self) -> bool:
        """Whether a scale other than 1 is used."""
        return bool((self.scales[1:] != 1).any())

    def _place(self, name: str, values: Floats) -> None:
        """A table [R + 1, B] where the gradient is computed."""
        buffer = self.buffers.array(f"classifier {name}", values.shape, self.real, self.x)
        arrays.copy_into(buffer, arrays.from_numpy(values.astype(self.real), self.x))
        self.tables[name] = buffer

    def _row(self, name: str, i: int, first: int, count: int) -> Array:
        """[count, 1, ...] of a table at evaluation i: known to the host, or read on the device by a captured graph."""
        table, spread = self.tables[name], (-1, *(1,) * (self.x.ndim - 1))
        step: Any = self.step
        if not self.captured:
            row = table[i + 1]
        else:
            row = table.gather(0, step.resident.samples[:, ROW].long()[None])[0]
        return row[first : first + count].reshape(spread)

    def _times(self, routing: Routing) -> Array:
        """[B] what the model is told at this evaluation: all samples of a run stand at one row."""
        call = routing.calls[0] if routing.calls else None
        times = self.launch.times[0 if call is None else call.branch]
        if isinstance(times, np.ndarray) and not isinstance(self.x, np.ndarray):
            times = arrays.tensor(times)
        if call is None or call.size >= self.batch:
            return times[: self.batch]
        first = times[:1]
        return np.broadcast_to(first, (self.batch,)) if isinstance(first, np.ndarray) else first.expand(self.batch)

    def _walkable(self, g: Array) -> Array:
        """g as a kernel can read it beside the state that it writes."""
        walks = arrays.plain(g) and arrays.merged_strides(tuple(g.shape), arrays.strides(g)) is not None
        apart = not arrays.pointer(self.x) <= arrays.pointer(g) < arrays.pointer(self.x) + self.x.nbytes
        return g if walks and apart and arrays.dtype_name(g) == self.real else arrays.cast(g, self.real)

    def key(self) -> tuple[Any, ...]:
        """What of it is baked into a captured graph."""
        return type(self), self.weighed, self.guidance.chunk

    @abstractmethod
    def __call__(self, i: int, routing: Routing) -> Array: ...


class GivenGradient(Gradient):
    """That of a function which computes it itself."""

    name = "gradient"
    guidance: GradientGuidance

    def __init__(self, run: Run, guidance: GradientGuidance, cond: Cond, scales: Floats) -> None:
        super().__init__(run, guidance, run.launch.state[0], scales)
        self.cond = keep(cond, self.buffers, self.x, ("classifier",)) if self.captured else dict(cond)

    def key(self) -> tuple[Any, ...]:
        return (*super().key(), self.guidance.gradient, frozen(self.cond))

    def __call__(self, i: int, routing: Routing) -> Array:
        x = self.x if self.is_numpy else self.x.detach()
        c_in = self._row("c_in", i, 0, self.batch) if self.scaled else None
        g = self.guidance.gradient(x if c_in is None else x * c_in, self._times(routing), **self.cond)
        if not arrays.is_array(g) or isinstance(g, np.ndarray) != self.is_numpy:
            raise TypeError(f"gradient: expected {type(x).__name__}, like the noise, got {type(g).__name__}")
        if tuple(g.shape) != tuple(x.shape):
            raise ValueError(f"gradient: expected shape {tuple(x.shape)}, like x, got {tuple(g.shape)}")
        g = g if self.is_numpy else g.detach()
        if c_in is not None:
            g = g * c_in
        if self.weighed:
            g = g * self._row("scales", i, 0, self.batch)
        return self._walkable(g)


class AutogradGradient(Gradient):
    """That of what torch differentiates, in chunks of samples."""

    def __init__(self, run: Run, guidance: ClassifierGuidance, scales: Floats) -> None:
        self.torch: Any = require("torch")
        state = run.launch.state[0]
        super().__init__(run, guidance, arrays.tensor(state) if run.is_numpy else state.detach(), scales)
        self.chunk = min(guidance.chunk or self.batch, self.batch)

    @property
    def dtype(self) -> str | None:
        """In which x is seen; None: as it is."""
        return None

    @abstractmethod
    def forward(self, x: Array, t: Array, first: int) -> Array:
        """What is differentiated, for samples first .. first + len(x)."""

    @abstractmethod
    def seed(self, out: Array, i: int, first: int, count: int) -> Array:
        """The gradient of scale * log p(y | x) (of -scale * loss) with respect to it."""

    def __call__(self, i: int, routing: Routing) -> Array:
        t = self._times(routing)
        if self.chunk == self.batch:
            g = self._part(i, self.x, t, 0)
        else:
            cuts = [slice(first, first + self.chunk) for first in range(0, self.batch, self.chunk)]
            g = self.torch.cat([self._part(i, self.x[cut], t[cut], cut.start) for cut in cuts])
        return g.numpy() if self.is_numpy else g

    def _part(self, i: int, x: Array, t: Array, first: int) -> Array:
        torch, leaf = self.torch, x.detach().requires_grad_(True)
        with torch.enable_grad():
            seen = leaf * self._row("c_in", i, first, len(leaf)) if self.scaled else leaf
            if self.dtype is not None and self.dtype != self.real:
                seen = seen.to(getattr(torch, self.dtype))
            out = self.forward(seen, t, first)
        if not arrays.is_torch(out):
            raise TypeError(f"{self.name}: expected a torch tensor, got {type(out).__name__}")
        if not out.requires_grad:
            raise ValueError(
                f"{self.name}: is not differentiable: its output does not require grad (it runs without grad, or "
                "detaches x)"
            )
        (g,) = torch.autograd.grad(out, leaf, self.seed(out.detach(), i, first, len(leaf)), allow_unused=True)
        if g is None:
            raise ValueError(f"{self.name}: its output does not depend on x, so that the gradient is None")
        return self._walkable(g)


class LossGradient(AutogradGradient):
    """-scale times that of a loss."""

    name = "loss"

    def __init__(self, run: Run, guidance: ClassifierGuidance, cond: Cond, scales: Floats) -> None:
        super().__init__(run, guidance, scales)
        kept = keep(cond, self.buffers, self.x, ("classifier",)) if self.captured else dict(cond)
        self.cond: Cond = from_numpy(kept, "cpu") if self.is_numpy else kept
        self.shared = bool((scales == scales[:, :1]).all())

    def key(self) -> tuple[Any, ...]:
        return (*super().key(), self.guidance.loss, frozen(self.cond))

    def forward(self, x: Array, t: Array, first: int) -> Array:
        assert self.guidance.loss is not None
        return self.guidance.loss(x, t, **_samples(self.cond, first, len(x), self.batch))

    def seed(self, out: Array, i: int, first: int, count: int) -> Array:
        shape = tuple(out.shape)
        if shape != (count,) and out.numel() != 1:
            raise ValueError(f"loss: expected one number per sample [{count}] or their sum, got shape {shape}")
        if shape != (count,) and not self.shared:
            raise ValueError("loss: expected one number per sample [B], for the samples have scales of their own")
        if not self.weighed:
            return self.torch.full_like(out, -1.0)
        scale = -self._row("scales", i, first, count).reshape(-1).to(out.dtype)
        return scale if shape == (count,) else scale[:1].reshape(shape)


class ClassifierGradient(AutogradGradient):
    """scale times that of log softmax(classifier(x, t)), at the labels."""

    name = "classifier"

    def __init__(self, run: Run, guidance: ClassifierGuidance, model: Model, cond: Cond, scales: Floats) -> None:
        super().__init__(run, guidance, scales)
        self.model, self.classes = model, 0  # unknown until it has been called
        if "labels" not in cond:
            raise ValueError(
                'labels: expected what the classifier is to see, as cond["labels"] or conds["classifier"]["labels"], '
                f"got {sorted(cond) or 'no condition'}"
            )
        target, self.highest = _target(cond["labels"], self.batch, self.x, self.real)
        array = self.buffers.array
        step: Any = run.step
        self.target = array("classifier target", tuple(target.shape), arrays.dtype_name(target), self.x)
        arrays.copy_into(self.target, target)
        log_prob = self.log_prob = array("classifier log_prob", (self.batch,), self.real, self.x)
        log_prob[:] = 0
        resident = step.resident.samples if step.on_device else None
        checked = run.launch.check
        where = run.launch.samples, resident
        self.kernel = ClassifierGrad(run.backend, self.target, self.tables["scales"], log_prob, *where, check=checked)

    @property
    def weighed(self) -> bool:
        return True  # its kernel reads the scales

    @property
    def dtype(self) -> str | None:
        return self.model.dtype

    def key(self) -> tuple[Any, ...]:
        return (*super().key(), self.model, self.model.addresses(), tuple(self.target.shape), self.target.dtype)

    def forward(self, x: Array, t: Array, first: int) -> Array:
        return self.model.with_grad(x, t)

    def seed(self, out: Array, i: int, first: int, count: int) -> Array:
        if out.ndim != 2 or out.shape[0] != count or out.shape[1] == 0:
            raise ValueError(f"classifier: expected logits [{count}, classes], got shape {tuple(out.shape)}")
        if out.shape[1] != self.classes:
            self._check(out)
        return self.kernel(out, first)

    def _check(self, logits: Array) -> None:
        classes, width = logits.shape[1], self.target.shape[1]
        if arrays.dtype_name(logits) not in arrays.FLOATS:
            raise TypeError(f"classifier: expected logits of {', '.join(arrays.FLOATS)}, got {logits.dtype}")
        if logits.device != self.x.device:
            raise ValueError(f"classifier: expected logits on {self.x.device}, like the noise, got {logits.device}")
        if self.kernel.distribution and width != classes:
            raise ValueError(f"labels: expected a distribution over {classes} classes, got one over {width}")
        if not self.kernel.distribution and self.highest >= classes:
            raise ValueError(f"labels: expected classes below {classes}, which the classifier has, got {self.highest}")
        self.classes = classes


def _target(labels: Any, batch: int, like: Array, real: str) -> tuple[Array, int]:
    """[B, n] int64 labels or [B, classes] probabilities, where `like` is, and the highest label.

    TypeError or ValueError naming labels.
    """
    if not arrays.is_array(labels) or labels.ndim not in (1, 2) or 0 in labels.shape:
        got = f"shape {tuple(labels.shape)}" if arrays.is_array(labels) else type(labels).__name__
        raise ValueError(f"labels: expected classes [B], several [B, n], or a distribution [B, classes], got {got}")
    check("cond", {"labels": labels}, batch)
    values = labels if isinstance(labels, np.ndarray) else labels.detach().cpu().double().numpy()
    if (labels.dtype.kind == "f") if isinstance(labels, np.ndarray) else labels.dtype.is_floating_point:
        if values.ndim != 2 or not np.isfinite(values).all() or (values < 0).any():
            raise ValueError("labels: a distribution is [B, classes] of finite numbers, none of them negative")
        return arrays.from_numpy(values.astype(real), like), -1
    if "int" not in arrays.dtype_name(labels):
        raise TypeError(f"labels: expected integers (classes) or floating point (a distribution), got {labels.dtype}")
    values = values.astype(np.int64).reshape(batch, -1)
    for b in np.flatnonzero((values < 0).all(axis=1)):
        raise ValueError(f"labels: expected classes from 0, and sample {b} has {values[b].tolist()}")
    return arrays.from_numpy(values, like), int(values.max())


def _samples(cond: Mapping[str, Any], first: int, count: int, batch: int) -> dict[str, Any]:
    """The conditions of a chunk of samples."""
    if count == batch:
        return dict(cond)
    chunk: dict[str, Any] = {}
    for key, value in cond.items():
        if isinstance(value, Mapping):
            chunk[key] = _samples(value, first, count, batch)
        else:
            chunk[key] = value[first : first + count] if arrays.is_array(value) else value
    return chunk
