"""The training side of classifier-free guidance: conditioning dropout and the two regression losses.

A model can be guided only if it also learned the unconditional branch. That takes one line in a training loop: now and
then the condition is replaced by a null one. The model is called as in sampling, `model(x, t, **cond)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pyguide.extras import require

if TYPE_CHECKING:
    import torch

    Tensor: TypeAlias = torch.Tensor

Model: TypeAlias = Callable[..., Any]
Cond = TypeVar("Cond")  # a tensor [B, *] or a (nested) mapping of such tensors


# ---- conditioning dropout -------------------------------------------------------------------------------------------


def drop_condition(cond: Cond, null: Any, p: float, *, generator: torch.Generator | None = None) -> Cond:
    """Conditioning dropout: with probability p a sample's whole condition becomes the null one.

        c_b <- null  if u_b < p,  u_b ~ U[0, 1) independent for each sample b

    Args:
        cond: tensor [B, *] or a nested mapping of them, all with the same B. Never modified.
        null: the same structure. A leaf is a number or a tensor [*], [1, *] or [B, *]; it may be a learned parameter.
        p: probability in [0, 1]; 0.1 to 0.2 in the paper.
        generator: a torch generator; torch's global one if None. B uniforms are drawn, whatever p is.

    Returns:
        The same structure with new tensors of the same shapes and dtypes.

    Raises:
        ValueError: p outside [0, 1], structures or shapes that do not match; TypeError: p or a leaf of the wrong type.

    Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1 (p_uncond).
    """
    _check_probability(p, 1.0)
    dropped: Cond = _replace(cond, null, _uniform(cond, generator) < p)
    return dropped


def drop_two_conditions(
    text: Cond, image: Cond, null_text: Any, null_image: Any, p: float, *, generator: torch.Generator | None = None
) -> tuple[Cond, Cond]:
    """Dropout for two conditions (instruction editing): text alone, image alone, or both, each with probability p.

        one u_b ~ U[0, 1) per sample:  [0, p) text only | [p, 2p) both | [2p, 3p) image only | [3p, 1) none

    The three cases exclude each other, so each condition is dropped with probability 2p. Guidance of an
    edit needs the branches (null, null), (null, image) and (text, image); image alone dropped keeps the text
    branch usable too.

    Args:
        text, image: as `cond` of `drop_condition`, with the same B. Never modified.
        null_text, null_image: as `null` of `drop_condition`.
        p: probability of each of the three cases, in [0, 1/3]; 0.05 in the paper.
        generator: a torch generator; torch's global one if None. B uniforms are drawn.

    Returns:
        (text, image) as new structures.

    Raises:
        ValueError, TypeError: as `drop_condition`.

    Source: Brooks, Holynski & Efros 2023, "InstructPix2Pix", section 3.2.1.
    """
    _check_probability(p, 1 / 3)
    u = _uniform({"text": text, "image": image}, generator)
    return _replace(text, null_text, u < 2 * p), _replace(image, null_image, (u >= p) & (u < 3 * p))


def _check_probability(p: float, highest: float) -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"p must be a number, got {type(p).__name__}")
    if not 0 <= p <= highest:  # NaN fails this comparison too
        raise ValueError(f"p must be a probability in [0, {highest:.4g}], got {p}")


def _leaves(cond: Any, name: str = "cond") -> Iterator[tuple[str, Tensor]]:
    torch = require("torch")
    if isinstance(cond, Mapping):
        for key, value in cond.items():
            yield from _leaves(value, f"{name}.{key}")
    elif isinstance(cond, torch.Tensor) and cond.ndim:
        yield name, cond
    else:
        raise TypeError(f"{name} must be a tensor [B, *] or a mapping of them, got {type(cond).__name__}")


def _uniform(cond: Any, generator: torch.Generator | None) -> Tensor:
    """One uniform number for each sample of `cond`: [B], on the device of the first leaf."""
    leaves = list(_leaves(cond))
    if not leaves:
        raise ValueError("cond holds no tensor")
    first, leaf = leaves[0]
    for name, other in leaves:
        if len(other) != len(leaf):
            raise ValueError(f"{name} has batch {len(other)}, but {first} has {len(leaf)}")
    device = leaf.device if generator is None else generator.device
    uniform: Tensor = require("torch").rand(len(leaf), generator=generator, device=device)
    return uniform.to(leaf.device)


def _replace(cond: Any, null: Any, mask: Tensor, name: str = "cond") -> Any:
    """`cond` with `null` where the sample's mask [B] is set."""
    if not isinstance(cond, Mapping):
        null = _null_leaf(cond, null, name)
        return require("torch").where(mask.to(cond.device).view(-1, *[1] * (cond.ndim - 1)), null, cond)
    if not isinstance(null, Mapping) or set(null) != set(cond):
        keys = sorted(null) if isinstance(null, Mapping) else type(null).__name__
        raise ValueError(f"null must have the keys of {name}, {sorted(cond)}, got {keys}")
    return {key: _replace(value, null[key], mask, f"{name}.{key}") for key, value in cond.items()}


def _null_leaf(cond: Tensor, null: Any, name: str) -> Tensor:
    """`null` as a tensor that broadcasts to `cond` [B, *] in its dtype; only numbers and whole samples broadcast."""
    torch = require("torch")
    leaf: Tensor = torch.as_tensor(null, device=cond.device)
    if leaf.ndim and leaf.shape not in (cond.shape[1:], (1, *cond.shape[1:]), cond.shape):
        raise ValueError(f"null for {name} must have shape {tuple(cond.shape[1:])}, got {tuple(leaf.shape)}")
    if not torch.can_cast(leaf.dtype, cond.dtype):
        raise TypeError(f"null for {name} must fit {cond.dtype}, got {leaf.dtype}")
    return leaf.to(cond.dtype)


# ---- losses ---------------------------------------------------------------------------------------------------------


def denoising_score_matching(
    model: Model,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    timestep: Tensor,
    cond: Mapping[str, Any] | None = None,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Denoising score matching for an epsilon model, one value per sample.

        x_t = alpha x0 + sigma noise,    loss_b = mean over elements of (model(x_t, t, **cond) - noise)^2

    The score is -epsilon / sigma, so this is Vincent's objective weighted by sigma^2 ("L_simple"). To weight it
    otherwise multiply the result before the mean: 1 / alpha^2 gives the v-loss (Salimans & Ho 2022, section 4).

    Args:
        model: called as model(x_t [B, *], timestep [B], **cond); returns epsilon [B, *].
        x0: clean samples [B, *].
        alpha, sigma: signal and noise coefficients [B] at the timestep, e.g. sqrt(ab_t) and sqrt(1 - ab_t).
        timestep: what the model is told [B], in its own units.
        cond: conditions by name, after `drop_condition`.
        noise: standard normal [B, *]; drawn (from `generator`) if None.

    Returns:
        Losses [B]; `.mean()` of them is the usual scalar.

    Raises:
        ValueError: a shape that does not match, naming the argument. Nothing is broadcast silently.

    Source: Vincent 2011, "A Connection Between Score Matching and Denoising Autoencoders", equation 9;
        Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models", equation 14.
    """
    noise = _noise(x0, noise, generator)
    x_t = _column(alpha, x0, "alpha") * x0 + _column(sigma, x0, "sigma") * noise
    return _square_error(model(x_t, timestep, **(cond or {})), noise)


def conditional_flow_matching(
    model: Model,
    x0: Tensor,
    t: Tensor,
    cond: Mapping[str, Any] | None = None,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    train_steps: int = 1000,
) -> Tensor:
    """Conditional flow matching on the straight path, one value per sample.

        x_t = (1 - t) x0 + t noise
        loss_b = mean over elements of (model(x_t, train_steps t, **cond) - (noise - x0))^2

    Time runs as in the diffusion literature: t = 0 is data, t = 1 noise, and t is the path's sigma (Lipman et al. count
    the other way).

    Args:
        model: called as model(x_t [B, *], train_steps * t [B], **cond); returns the velocity dx/dt [B, *].
        x0: clean samples [B, *].
        t: times [B] in [0, 1].
        cond: conditions by name, after `drop_condition`.
        noise: standard normal [B, *]; drawn (from `generator`) if None.
        train_steps: unit of the model's timestep.

    Returns:
        Losses [B].

    Raises:
        ValueError: a shape that does not match, naming the argument.

    Source: Lipman et al. 2023, "Flow Matching for Generative Modeling", equation 23 with sigma_min = 0;
        Liu, Gong & Liu 2023, "Flow Straight and Fast", equation 1.
    """
    noise = _noise(x0, noise, generator)
    column = _column(t, x0, "t")
    x_t = (1 - column) * x0 + column * noise
    return _square_error(model(x_t, train_steps * t, **(cond or {})), noise - x0)


def _noise(x0: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if noise is None:
        drawn: Tensor = require("torch").randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        return drawn
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}")
    return noise


def _column(value: Tensor, x0: Tensor, name: str) -> Tensor:
    """Per-sample numbers [B] as [B, 1, ...] in the dtype of x0 [B, *]."""
    if value.shape != x0.shape[:1]:
        raise ValueError(f"{name} must have shape {tuple(x0.shape[:1])}, got {tuple(value.shape)}")
    return value.to(x0).view(-1, *[1] * (x0.ndim - 1))


def _square_error(output: Tensor, target: Tensor) -> Tensor:
    if output.shape != target.shape:
        raise ValueError(f"model must return the shape of x0, {tuple(target.shape)}, got {tuple(output.shape)}")
    return (output - target).square().flatten(1).mean(1)
