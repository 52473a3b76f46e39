"""Classifier guidance (Dhariwal, Nichol 2021): the gradient of a classifier, or of any loss, moves the sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from ..checks import whole
from .base import Guidance, Scale, Scheduled

Form = Literal["mean", "score", "input"]
FORMS: tuple[str, ...] = get_args(Form)


class ClassifierGuidance(Scheduled):
    """The gradient g = d/dx of scale * log p(y | x) moves the noisy x towards what a classifier sees as y.

    classifier: anything that `models.wrap` takes, called as classifier(x, t) -> logits [B, classes] with the noisy x
        [B, C, *] and the timesteps that the model is told. What it is to see is the condition `labels`, of
        conds["classifier"] or else of cond (which the model is told too, if it has such an input): classes [B] int64;
        several [B, n], any of which will do, negative ones being none; or a target distribution [B, classes].
    scale: 0 is no guidance, 1 the classifier's posterior if its probabilities are right; see `Scheduled`. Outside the
        intervals the classifier is not called.
    form: how g enters a row.
        "score": D += (sigma^2 / alpha) g and E -= sigma g after the clip, not clipped again, in every solver written in
            them; the history holds the guided D. On flow paths that is v -= (sigma / alpha) g. Where alpha is 0, x says
            nothing of the sample, and the classifier is not called. (Dhariwal, Nichol 2021, algorithm 2)
        "mean": mu + Sigma g for a row that draws from N(mu, Sigma), the last one included: ancestral solvers of one
            evaluation a step, with the learned Sigma of ddpm too. (Algorithm 1)
        "input": x += g at the new x and its timestep, after every step but the last.
    loss: instead of a classifier, any differentiable loss(x, t, **cond) -> [B] or their sum, which guidance lowers: g
        is the gradient of -scale * loss. cond is conds["classifier"], or else cond.
    chunk: differentiate at most so many samples at a time, to bound the memory of the backward pass.
    cfg: classifier-free guidance of the model's own branches; None calls it with `cond`, CFG(0.0) is the unconditional
        model alone.
    scaled: the classifier sees c_in x, as the model does on an edm path, instead of x.

    Two launches an evaluation besides the model and the classifier, `classifier_grad` and `step`; a chunk, a `scaled` x
    and the scale of a loss cost a small one each. A classifier of a dtype of its own sees x in that, a function in the
    dtype of the noise; the gradient is float32 (float64 for float64 noise). Neither may write to x or t.
    Errors: TypeError or ValueError naming the argument; for a form that the plan cannot carry when the sampler is made;
    for a classifier that cannot be differentiated at its first call.
    """

    neutral = 0.0

    def __init__(
        self,
        classifier: Any,
        scale: Scale,
        *,
        form: Form = "score",
        loss: Callable[..., Any] | None = None,
        chunk: int | None = None,
        cfg: Guidance | None = None,
        interval: tuple[float, float] | None = None,
        sigma_interval: tuple[float, float] | None = None,
        scaled: bool = False,
    ) -> None:
        super().__init__(scale, interval=interval, sigma_interval=sigma_interval)
        if (classifier is None) == (loss is None):
            raise ValueError(
                f"classifier: expected a classifier or a loss, got {'neither' if loss is None else 'both'}"
            )
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: expected a function (x, t, **cond), got {type(loss).__name__}")
        if form not in FORMS:
            raise ValueError(f'form: expected "mean", "score" or "input", got {form!r}')
        chunk = None if chunk is None else whole("chunk", chunk, 1)
        if cfg is not None and not isinstance(cfg, Guidance):
            raise TypeError(f"cfg: expected a method such as CFG(scale), got {type(cfg).__name__}")
        self.classifier, self.loss, self.form, self.chunk, self.cfg = classifier, loss, form, chunk, cfg
        self.scaled = bool(scaled)

    def __repr__(self) -> str:
        with_cfg = "" if self.cfg is None else f", cfg={self.cfg!r}"
        return f"{type(self).__name__}(scale={self.scale}, form={self.form!r}{with_cfg})"


class GradientGuidance(ClassifierGuidance):
    """The same for a function that returns the gradient itself: gradient(x, t, **cond) -> [B, C, *].

    As guided-diffusion's cond_fn, which has its scale inside; numpy functions too. cond is conds["classifier"], or else
    cond. It is called without grad and opens torch.enable_grad() itself.
    """

    def __init__(
        self,
        gradient: Callable[..., Any],
        scale: Scale = 1.0,
        *,
        form: Form = "score",
        cfg: Guidance | None = None,
        interval: tuple[float, float] | None = None,
        sigma_interval: tuple[float, float] | None = None,
        scaled: bool = False,
    ) -> None:
        if not callable(gradient):
            raise TypeError(f"gradient: expected a function (x, t, **cond), got {type(gradient).__name__}")
        intervals: dict[str, Any] = {"interval": interval, "sigma_interval": sigma_interval}
        super().__init__(None, scale, form=form, loss=gradient, cfg=cfg, scaled=scaled, **intervals)
        self.loss, self.gradient = None, gradient
