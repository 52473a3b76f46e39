"""openai/guided-diffusion: its flags and sampling loops, run by a plan; its cond_fn and models as they are.

    diffusion = Diffusion(timestep_respacing="250", learn_sigma=True)          # the flags of its scripts
    images = diffusion.p_sample_loop(model_fn, (16, 3, 256, 256), cond_fn=cond_fn, model_kwargs={"y": classes})
    save_npz("samples.npz", images, classes)

p_sample_loop is ddpm with the gradient on the mean, mu + Sigma g (Dhariwal, Nichol 2021, algorithm 1), ddim_sample_loop
is ddim on the guided score (algorithm 2), its noise estimate re-derived from the clipped sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from .. import models, schedules
from ..arrays import Array, is_array
from ..checks import choice, flag, number, whole
from ..compiler import compile
from ..extras import require
from ..guidance import ClassifierGuidance, GradientGuidance
from ..path import NoisePath
from ..plan import Plan
from ..sampler import Sampler
from ..schedules.respacing import _respaced

ALL_BETAS_BELOW_1 = 21  # the linear schedule of N steps ends at beta = 20 / N


class Diffusion:
    """What create_gaussian_diffusion makes of the flags: the process that a model was trained on, respaced.

    diffusion_steps: N, the training timesteps. noise_schedule: "linear" (beta from 0.1 / N to 20 / N) or "cosine".
    timestep_respacing: the timesteps of a run, "250", "10,10,5", "ddim25", see `schedules.respace`; "" all of them.
    learn_sigma: the model has 2 C channels, whose second half is the variance, between beta~ and beta;
        ddim_sample_loop leaves it out. sigma_small: without learn_sigma, the variance is beta~ instead of beta.
    predict_xstart: the model predicts the clean sample and not epsilon.
    rescale_timesteps: models are told the timestep times 1000 / N, as a floating point number.
    use_kl, rescale_learned_sigmas: accepted and without effect, because they choose the training loss.

    Raises ValueError naming the flag, TypeError for one that there is not: those of its models (image_size,
    num_channels) belong to its create_model.
    """

    def __init__(
        self,
        *,
        diffusion_steps: int = 1000,
        noise_schedule: str = "linear",
        timestep_respacing: str = "",
        learn_sigma: bool = False,
        sigma_small: bool = False,
        predict_xstart: bool = False,
        rescale_timesteps: bool = False,
        use_kl: bool = False,
        rescale_learned_sigmas: bool = False,
    ) -> None:
        self.noise_schedule = choice("noise_schedule", noise_schedule, ("linear", "cosine"))
        self.diffusion_steps = whole("diffusion_steps", diffusion_steps, 2)
        if self.noise_schedule == "linear" and self.diffusion_steps < ALL_BETAS_BELOW_1:
            raise ValueError(
                f"diffusion_steps: the linear schedule ends at beta = 20 / diffusion_steps, which must be below 1: "
                f"expected at least {ALL_BETAS_BELOW_1}, got {self.diffusion_steps}"
            )
        if not isinstance(timestep_respacing, str):
            raise ValueError(
                f'timestep_respacing: expected a string, "250", "10,10,5" or "ddim25", got {timestep_respacing!r}'
            )
        self.timesteps: Sequence[int] = range(self.diffusion_steps)[::-1]
        if timestep_respacing:
            self.timesteps = _respaced("timestep_respacing", timestep_respacing, self.diffusion_steps)
        self.learn_sigma, self.sigma_small = flag("learn_sigma", learn_sigma), flag("sigma_small", sigma_small)
        self.prediction = "sample" if flag("predict_xstart", predict_xstart) else "epsilon"
        self.rescale_timesteps = flag("rescale_timesteps", rescale_timesteps)
        flag("use_kl", use_kl)
        flag("rescale_learned_sigmas", rescale_learned_sigmas)
        self._plans: dict[tuple[bool, bool, float], Plan] = {}
        self._last: tuple[list[str], list[Any], Sampler] | None = None

    @property
    def variance(self) -> str:
        """The variance that p_sample_loop draws with, in the words of the solver ddpm."""
        return "learned_range" if self.learn_sigma else "small" if self.sigma_small else "large"

    @cached_property
    def path(self) -> NoisePath:
        """The respaced grid, with what the model is told there."""
        N = self.diffusion_steps
        if self.noise_schedule == "linear":
            scale = 1000 / N  # the same share of noise in every N
            schedule = schedules.linear(scale * 1e-4, scale * 0.02, N)
        else:
            schedule = schedules.cosine(N)
        path = schedule.path(timesteps=list(self.timesteps))
        return replace(path, timestep=path.timestep * (1000 / N), made=None) if self.rescale_timesteps else path

    def plan(self, *, use_ddim: bool = False, clip_denoised: bool = True, eta: float = 0.0) -> Plan:
        """The plan of p_sample_loop, or with use_ddim that of ddim_sample_loop.

        clip_denoised: clip the predicted clean sample to [-1, 1], before the gradient. eta: ddim's share of noise, in
        [0, 1], of no meaning without use_ddim.
        """
        use_ddim, clip_denoised = flag("use_ddim", use_ddim), flag("clip_denoised", clip_denoised)
        eta = number("eta", eta, high=1.0)
        if eta > 0 and not use_ddim:
            raise ValueError(f"eta: p_sample_loop has none, it belongs to use_ddim=True; got {eta!r}")
        key = (use_ddim, clip_denoised, eta)
        if key not in self._plans:
            clip = 1.0 if clip_denoised else None
            if use_ddim:
                options: dict[str, Any] = {"eta": eta, "use_clipped_model_output": True}
            else:
                options = {"variance": self.variance}
            solver = "ddim" if use_ddim else "ddpm"
            plan = compile(solver, self.path, prediction=self.prediction, clip=clip, **options)
            # whole numbers too are told as floating point ones where they are rescaled
            self._plans[key] = replace(plan, integer_time=False) if self.rescale_timesteps else plan
        return self._plans[key]

    def sampler(
        self,
        model: Any,
        cond_fn: Callable[..., Any] | None = None,
        *,
        classifier: Any = None,
        classifier_scale: float | None = None,
        use_ddim: bool = False,
        clip_denoised: bool = True,
        eta: float = 0.0,
        **settings: Any,
    ) -> Sampler:
        """A sampler of `plan`, to be called as sampler(noise, cond=model_kwargs).

        model: model_fn(x, t, **model_kwargs), or a module. cond_fn: cond_fn(x, t, **model_kwargs) -> [B, C, *], the
        gradient with its scale inside; None samples without.
        classifier, classifier_scale: instead of cond_fn a classifier(x, t) -> logits, whose gradient is formed by
        pyguide's kernel, times the scale (1); its classes are the condition `labels`, or conds["classifier"]["labels"].
        settings: of `Sampler`: backend, cuda_graph, check, progress.
        """
        plan = self.plan(use_ddim=use_ddim, clip_denoised=clip_denoised, eta=eta)
        form: Any = "score" if use_ddim else "mean"
        guidance: ClassifierGuidance | None = None
        if cond_fn is not None and classifier is not None:
            raise ValueError("classifier: expected a cond_fn or a classifier, got both")
        if classifier_scale is not None and classifier is None:
            raise ValueError(
                "classifier_scale: it belongs to a classifier; a cond_fn multiplies its gradient by it itself, "
                f"got {classifier_scale!r}"
            )
        if cond_fn is not None:
            guidance = GradientGuidance(cond_fn, form=form)
        elif classifier is not None:
            guidance = ClassifierGuidance(classifier, 1.0 if classifier_scale is None else classifier_scale, form=form)
        if self.learn_sigma:
            model = copy(models.wrap(model))
            model.learned_variance = True  # which ddim leaves out
        return Sampler(model, plan, guidance, **settings)

    def p_sample_loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Array | None = None,
        clip_denoised: bool = True,
        denoised_fn: None = None,
        cond_fn: Callable[..., Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
        **given: Any,
    ) -> Array:
        """Ancestral samples [B, C, *], with the arguments of its p_sample_loop.

        given: classifier, classifier_scale (whose labels are model_kwargs["y"]) and settings as `sampler` takes them;
        seeds, generator or noises as a sampler is called with; without, torch's global generator.
        denoised_fn: refused, it is no row of a plan; a model that returns the clean sample can hold it.
        """
        given = dict(use_ddim=False, clip_denoised=clip_denoised, progress=progress, **given)
        return self._loop(model, shape, noise, denoised_fn, cond_fn, model_kwargs, device, given)

    def ddim_sample_loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Array | None = None,
        clip_denoised: bool = True,
        denoised_fn: None = None,
        cond_fn: Callable[..., Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
        **given: Any,
    ) -> Array:
        """DDIM samples [B, C, *], with the arguments of its ddim_sample_loop; the others as in `p_sample_loop`."""
        given = dict(use_ddim=True, clip_denoised=clip_denoised, eta=eta, progress=progress, **given)
        return self._loop(model, shape, noise, denoised_fn, cond_fn, model_kwargs, device, given)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # somebody's model

    def _loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Array | None,
        denoised_fn: Any,
        cond_fn: Callable[..., Any] | None,
        model_kwargs: Mapping[str, Any] | None,
        device: Any,
        given: dict[str, Any],
    ) -> Array:
        if denoised_fn is not None:
            raise ValueError("denoised_fn: a function of the clean sample is no row of a plan; put it into a model")
        draws = {name: given.pop(name) for name in ("seeds", "generator", "noises") if name in given}
        if noise is None:
            torch: Any = require("torch")
            noise = torch.randn(*shape, device=_device_of(model) if device is None else device)
        if tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise: expected the shape {tuple(shape)}, got {tuple(noise.shape)}")
        conds: dict[str, Any] = {"cond": dict(model_kwargs or {})}
        if given.get("classifier") is not None:
            if "y" not in conds["cond"]:
                raise ValueError(f'model_kwargs: a classifier needs its labels as "y", got {sorted(conds["cond"])}')
            conds["classifier"] = {"labels": conds["cond"]["y"]}
        return self._kept(model, cond_fn, given)(noise, conds=conds, **draws)

    def _kept(self, model: Any, cond_fn: Any, given: dict[str, Any]) -> Sampler:
        """The sampler of the last loop if it is the same: scripts call one for every batch, and buffers are kept."""
        names = sorted(given)
        made_of = [model, cond_fn, *(given[name] for name in names)]
        if self._last is not None:
            names_before, before, sampler = self._last
            if names == names_before and all(map(_same, before, made_of)):
                return sampler
        sampler = self.sampler(model, cond_fn, **given)
        self._last = (names, made_of, sampler)
        return sampler


def _same(a: Any, b: Any) -> bool:
    """Whether a setting is the one that it was; an array may have changed in place."""
    return not is_array(a) and (a is b or (isinstance(a, (int, float, str)) and type(a) is type(b) and a == b))


def _device_of(model: Any) -> Any:
    """Where a module's parameters are; None, torch's default, for a function."""
    parameters = getattr(model, "parameters", None)
    first = None if parameters is None else next(iter(parameters()), None)
    return None if first is None else first.device


def save_npz(file: str | os.PathLike[str], images: Array, labels: Array | None = None) -> None:
    """Samples as guided-diffusion's evaluator reads them: arr_0 [N, H, W, C] uint8, and arr_1 [N] int64 with labels.

        arr_0 = floor(clamp(127.5 (x + 1), 0, 255))

    images: [N, C, H, W] in [-1, 1], torch or numpy; values outside are clamped. The evaluator's network wants C = 3.
    labels: [N] whole numbers. file: ".npz" is added if it is missing. Raises ValueError or TypeError naming the
    argument, for NaN among the images too, before a file is made.
    """
    pixels, classes = _host("images", images), None if labels is None else _host("labels", labels)
    if pixels.ndim != 4 or pixels.dtype.kind != "f":
        raise ValueError(f"images: expected [N, C, H, W] of floating point, got {pixels.dtype} {pixels.shape}")
    if np.isnan(pixels).any():
        raise ValueError(f"images: {int(np.isnan(pixels).any(axis=(1, 2, 3)).sum())} of {len(pixels)} have NaN")
    arrays = [np.clip((pixels + 1) * 127.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)]
    if classes is not None:
        if classes.shape != pixels.shape[:1] or classes.dtype.kind not in "iu":
            raise ValueError(
                f"labels: expected one whole number for each of {len(pixels)} images, got {classes.dtype} "
                f"{classes.shape}"
            )
        arrays.append(classes.astype(np.int64))
    # C order: the evaluator streams such an array out of the archive, and loads others as a whole
    np.savez(file, *(np.ascontiguousarray(array) for array in arrays))


def _host(name: str, array: Array) -> np.ndarray[Any, Any]:
    """The array in host memory; 16-bit floating point in float32, in which it is scaled without loss."""
    if not is_array(array):
        raise TypeError(f"{name}: expected a numpy array or a torch tensor, got {type(array).__name__}")
    if not isinstance(array, np.ndarray):
        array = (array.float() if array.is_floating_point() and array.itemsize == 2 else array).detach().cpu().numpy()
    result: np.ndarray[Any, Any] = array.astype(np.float32) if array.dtype == np.float16 else array
    return result
