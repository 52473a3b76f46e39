"""Respacing strings: which training timesteps a sampling run keeps (Nichol, Dhariwal 2021, section 4)."""

from __future__ import annotations

from itertools import accumulate, repeat

from ..checks import whole


def respace(text: str, train_steps: int = 1000) -> list[int]:
    """The training timesteps that a respacing string keeps, descending, for `Schedule.path(timesteps=...)`.

    text: "25": 25 timesteps from 0 to T-1, both included. "10,10,5": T is cut into that many sections of T // sections
    timesteps, the first T mod sections of them one longer; a section of n timesteps from s keeps its count k as

        s + round(j (n-1) / (k-1)),  j = 0 .. k-1,  half to even;  s alone for k = 1, nothing for k = 0,

    so that "25" is one section. "ddim25": every c-th timestep from 0 with the smallest c that keeps 25 of them
    (Song, Meng, Ermon 2021, appendix D.2, linear).
    train_steps: T.
    A model run on a respaced process has the alphas_cumprod of its timesteps: the betas 1 - abar_t / abar_t' between
    neighbours multiply back to them. Raises ValueError naming `text` or `train_steps`.
    Source: Nichol, Dhariwal 2021, section 4, as guided-diffusion's `timestep_respacing` has it.
    """
    return _respaced("text", text, whole("train_steps", train_steps, 1))


def _respaced(name: str, text: str, total: int) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(f'{name}: expected a respacing string such as "25", "ddim25" or "10,10,5", got {text!r}')
    if text.startswith("ddim"):
        count = _counted(name, text, text[len("ddim") :])
        if count >= 1:
            # ceil(T / c) falls as c grows: the smallest stride of at most `count` timesteps is the only candidate
            kept = range(0, total, -(-total // count))
            if len(kept) == count:
                return list(kept)[::-1]
        raise ValueError(f"{name}: no whole stride takes exactly {count} of {total} timesteps, got {text!r}")
    counts = [_counted(name, text, part) for part in text.split(",")]
    size, longer = divmod(total, len(counts))
    kept_all: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise ValueError(
                f"{name}: section {i} of {text!r} has {length} timesteps, fewer than the {count} asked for"
            )
        if count > 0:
            # A running sum, not j times the stride: where the exact value lies half way between two timesteps, its
            # rounding errors decide, and published runs have the timesteps that they decide for (23 of 1000).
            stride = (length - 1) / (count - 1) if count > 1 else 0.0
            kept_all += [start + round(at) for at in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += length
    if not kept_all:
        raise ValueError(f"{name}: expected at least one timestep to keep, got {text!r}")
    return kept_all[::-1]


def _counted(name: str, text: str, part: str) -> int:
    if not (part.strip().isascii() and part.strip().isdigit()):
        raise ValueError(
            f'{name}: expected a respacing string such as "25", "ddim25" or "10,10,5", got {text!r}'
            + (f" with {part!r} for a count" if part != text else "")
        )
    return int(part)
