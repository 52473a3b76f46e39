"""The gradient of classifier guidance within a run: the classifier, its backward pass, and the kernel between them."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arrays
from .arrays import Array
from .classifier_grad import ClassifierGrad
from .conditions import Cond, Routing, check
from .extras import require
from .graph import addresses, frozen, keep
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
        self.span = arrays.pointer(like), arrays.pointer(like) + like.nbytes
        self.is_numpy, self.real = run.is_numpy, arrays.dtype_name(run.launch.state)
        self.dtype = run.dtype  # in which x is seen
        self.scales, self.tables, self.times = scales, dict[str, Array](), dict[int, Array]()
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
        with np.errstate(over="ignore"):
            rounded = values.astype(self.real)
        if not np.isfinite(rounded).all():
            raise ValueError(f"scale: expected numbers that {self.real} holds, got {np.abs(values).max():g}")
        buffer = self.buffers.array(f"classifier {name}", values.shape, self.real, self.x)
        arrays.copy_into(buffer, arrays.from_numpy(rounded, self.x))
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

    def _told(self, routing: Routing) -> Array:
        """[B] the times of an evaluation: the same view for all that call the same."""
        held = self.times.get(id(routing))
        if held is None:
            held = self.times[id(routing)] = self._times(routing)
        return held

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

    def _asked(self, function: Callable[..., Any], x: Array, t: Array, cond: Cond) -> Any:
        """function(x, t, **cond); the two usual mistakes in one are named."""
        try:
            return function(x, t, **cond)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise TypeError(f"{self.name}: is called as {self.name}(x, t, {', '.join(cond)}): {error}") from error
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ValueError(
                f"{self.name}: needs torch.enable_grad() around what it differentiates: {error}"
            ) from error

    def _readable(self, g: Array) -> Array:
        """g as a kernel can read it beside the state that it writes."""
        apart = not self.span[0] <= arrays.pointer(g) < self.span[1]
        if apart and not self.is_numpy and g.dtype == self.x.dtype and g.is_contiguous() and not g.is_neg():
            return g  # what the rest finds out too, in more time
        readable = apart and arrays.walkable(g) and arrays.dtype_name(g) == self.real
        return g if readable else arrays.cast(g, self.real)

    def _untouched(self, t: Array, version: tuple[Any, ...]) -> None:
        """x and t are read by the model after this: ValueError if somebody's function has written to them."""
        if self._versions(t) != version:
            raise ValueError(
                f"{self.name}: wrote to x or t in place, which are the sampler's and not its own: copy them"
            )

    def _versions(self, t: Array) -> tuple[Any, ...]:
        """Counters that move with every write, where arrays have one; of numpy's the times themselves."""
        if isinstance(t, np.ndarray):
            return (t.tobytes(),)
        return tuple(tensor._version for tensor in (self.x, t) if not tensor.is_inference())

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
        self.cond = _kept(cond, self)

    def key(self) -> tuple[Any, ...]:
        return (*super().key(), id(self.guidance.gradient), addresses(self.guidance.gradient), frozen(self.cond))

    def __call__(self, i: int, routing: Routing) -> Array:
        if self.is_numpy:
            return self._called(i, self.x, self._told(routing))
        with sys.modules["torch"].no_grad():
            return self._called(i, self.x.detach(), self._told(routing))

    def _called(self, i: int, x: Array, t: Array) -> Array:
        c_in = self._row("c_in", i, 0, self.batch) if self.scaled else None
        seen = x if c_in is None else x * c_in
        seen = seen if self.dtype == self.real else arrays.cast(seen, self.dtype)
        version = self._versions(t)
        g = self._asked(self.guidance.gradient, seen, t, self.cond)
        self._untouched(t, version)
        if not arrays.is_array(g) or isinstance(g, np.ndarray) != self.is_numpy:
            raise TypeError(f"gradient: expected {type(x).__name__}, like the noise, got {type(g).__name__}")
        if tuple(g.shape) != tuple(x.shape):
            raise ValueError(f"gradient: expected shape {tuple(x.shape)}, like x, got {tuple(g.shape)}")
        if arrays.dtype_name(g) not in arrays.FLOATS:
            raise TypeError(f"gradient: expected {', '.join(arrays.FLOATS)}, got {arrays.dtype_name(g)}")
        if not self.is_numpy and g.device != x.device:
            raise ValueError(f"gradient: expected a tensor on {x.device}, like the noise, got {g.device}")
        g = g if self.is_numpy else g.detach()
        if c_in is not None:
            g = g * c_in
        if self.weighed:
            g = g * self._row("scales", i, 0, self.batch)
        return self._readable(g)


class AutogradGradient(Gradient):
    """That of what torch differentiates, in chunks of samples."""

    def __init__(self, run: Run, guidance: ClassifierGuidance, scales: Floats) -> None:
        self.torch: Any = require("torch")
        state = run.launch.state[0]
        super().__init__(run, guidance, arrays.tensor(state) if run.is_numpy else state.detach(), scales)
        self.chunk = min(guidance.chunk or self.batch, self.batch)

    @abstractmethod
    def forward(self, x: Array, t: Array, first: int) -> Array:
        """What is differentiated, for samples first .. first + len(x)."""

    @abstractmethod
    def seed(self, out: Array, i: int, first: int, count: int) -> Array:
        """The gradient of scale * log p(y | x) (of -scale * loss) with respect to it."""

    def __call__(self, i: int, routing: Routing) -> Array:
        t = self._told(routing)
        version = self._versions(t)
        if self.chunk == self.batch:
            g = self._readable(self._part(i, self.x, t, 0))
        else:
            g = self.buffers.array("classifier gradient", tuple(self.x.shape), self.real, self.x)
            for first in range(0, self.batch, self.chunk):
                cut = slice(first, first + self.chunk)
                g[cut] = self._part(i, self.x[cut], t[cut], first)
        self._untouched(t, version)
        return g.numpy() if self.is_numpy else g

    def _part(self, i: int, x: Array, t: Array, first: int) -> Array:
        torch = self.torch
        if not torch.is_inference_mode_enabled() and not x.is_inference():
            return self._differentiated(i, x.detach().requires_grad_(True), t, first)
        with torch.inference_mode(False):  # whose tensors no backward pass may read
            return self._differentiated(i, x.clone().requires_grad_(True), t.clone(), first)

    def _differentiated(self, i: int, leaf: Array, t: Array, first: int) -> Array:
        torch = self.torch
        with torch.enable_grad():
            seen = leaf * self._row("c_in", i, first, len(leaf)).clone() if self.scaled else leaf
            if self.dtype != self.real:
                seen = seen.to(getattr(torch, self.dtype))
            out = self.forward(seen, t, first)
        if not arrays.is_torch(out):
            raise TypeError(f"{self.name}: expected a torch tensor, got {type(out).__name__}")
        if not out.requires_grad:
            raise ValueError(
                f"{self.name}: is not differentiable: its output does not require grad (it runs without grad, or "
                "detaches x)"
            )
        with torch.no_grad():
            seed = self.seed(out.detach(), i, first, len(leaf))
        (g,) = torch.autograd.grad(out, leaf, seed, allow_unused=True)
        if g is None:
            raise ValueError(f"{self.name}: its output does not depend on x, so that the gradient is None")
        return g


class LossGradient(AutogradGradient):
    """-scale times that of a loss."""

    name = "loss"

    def __init__(self, run: Run, guidance: ClassifierGuidance, cond: Cond, scales: Floats) -> None:
        super().__init__(run, guidance, scales)
        self.cond: Cond = from_numpy(cond, "cpu") if self.is_numpy else _kept(cond, self)
        self.shared = bool((scales == scales[:, :1]).all())

    def key(self) -> tuple[Any, ...]:
        return (*super().key(), id(self.guidance.loss), addresses(self.guidance.loss), frozen(self.cond))

    def forward(self, x: Array, t: Array, first: int) -> Array:
        assert self.guidance.loss is not None
        return self._asked(self.guidance.loss, x, t, _samples(self.cond, first, len(x), self.batch))

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
        self.model, self.sampler, self.dtype = model, run.sampler, model.dtype or run.dtype
        self.classes = 0  # checked against
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
        if self.sampler.classes:  # from an earlier run: a graph will not ask again
            self._check_labels(self.sampler.classes)

    @property
    def weighed(self) -> bool:
        return True  # its kernel reads the scales

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
        classes = logits.shape[1]
        if arrays.dtype_name(logits) not in arrays.FLOATS:
            raise TypeError(f"classifier: expected logits of {', '.join(arrays.FLOATS)}, got {logits.dtype}")
        if logits.device != self.x.device:
            raise ValueError(f"classifier: expected logits on {self.x.device}, like the noise, got {logits.device}")
        largest = float(np.abs(self.scales).max())
        if largest > self.torch.finfo(logits.dtype).max:
            raise ValueError(f"scale: expected numbers that the classifier's {logits.dtype} holds, got {largest:g}")
        self._check_labels(classes)
        self.classes = self.sampler.classes = classes

    def _check_labels(self, classes: int) -> None:
        width = self.target.shape[1]
        if self.kernel.distribution and width != classes:
            raise ValueError(f"labels: expected a distribution over {classes} classes, got one over {width}")
        if not self.kernel.distribution and self.highest >= classes:
            raise ValueError(
                f"labels: expected classes below {classes}, which the classifier has, got {self.highest}; what it "
                'alone is to see may be given as conds["classifier"]'
            )
        if not self.kernel.distribution and width == classes > 2 and bool((self.target <= 1).all()):
            raise ValueError(
                f"labels: {classes} of 0 and 1 for each sample look like a one-hot code, and mean the classes 0 and 1; "
                "expected classes, or .float() for a distribution"
            )


def _target(labels: Any, batch: int, like: Array, real: str) -> tuple[Array, int]:
    """[B, n] int64 labels or [B, classes] probabilities, where `like` is, and the highest label.

    TypeError or ValueError naming labels.
    """
    if not arrays.is_array(labels) or labels.ndim not in (1, 2) or 0 in labels.shape:
        got = f"shape {tuple(labels.shape)}" if arrays.is_array(labels) else type(labels).__name__
        raise ValueError(f"labels: expected classes [B], several [B, n], or a distribution [B, classes], got {got}")
    check("cond", {"labels": labels}, batch)
    probabilities = arrays.dtype_name(labels) in arrays.FLOATS
    values = labels if isinstance(labels, np.ndarray) else labels.detach().cpu()
    if probabilities:
        values = values if isinstance(values, np.ndarray) else values.double().numpy()
        if values.ndim != 2 or not np.isfinite(values).all() or (values < 0).any():
            got = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(
                "labels: floating point is a distribution, [B, classes] of finite numbers of which none is negative, "
                f"got {got}; classes are integers (labels.long())"
            )
        return arrays.from_numpy(values.astype(real), like), -1
    if "int" not in arrays.dtype_name(labels):
        raise TypeError(f"labels: expected integers (classes) or floating point (a distribution), got {labels.dtype}")
    values = np.asarray(values).astype(np.int64).reshape(batch, -1)
    for b in np.flatnonzero((values < 0).all(axis=1)):
        raise ValueError(f"labels: expected classes from 0, and sample {b} has {values[b].tolist()}")
    return arrays.from_numpy(values, like), int(values.max())


def _kept(cond: Cond, gradient: Gradient) -> dict[str, Any]:
    """The conditions, where a graph finds those of every run if there is one."""
    if not gradient.captured:
        return dict(cond)
    return keep(cond, gradient.buffers, gradient.x, ("classifier",), 'conds["classifier"]')


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
