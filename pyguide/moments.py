"""What a launch computes from the branches before a row: a guidance method's program, its parameters, and where the
kernels put what they find."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arrays
from .arrays import Array
from .buffers import Buffers
from .guidance import BranchMoments, CustomGuidance, MomentGuidance
from .guidance.moments import reduced
from .guidance.program import Program
from .layout import CHUNK, PARAMETERS, moments_count, weights_width
from .path import Floats
from .plan import Plan

ACTING, P_X, P_M = (PARAMETERS.index(name) for name in ("acting", "p_x", "p_m"))
OWN = len(PARAMETERS)


@dataclass
class Moments:
    """The weights blocks that are computed: those of the samples whose row acts. B samples, R + 1 rows, n vectors.

    The host's blocks, for the other rows, begin the launch's weights; behind them every sample has a block of its own.
    """

    guidance: MomentGuidance | CustomGuidance
    program: Program
    names: tuple[str, ...]  # of the parameters behind those of every program
    parameters: Floats  # [R + 1, B or 1, P]
    pattern: NDArray[Any]  # [width] a block that is not 0 where a computed one may not be
    plain_sample_stride: int  # from the host's blocks of one sample to those of the next, 0: all have the same
    partial: Array | None  # [B, chunks, count] float64: scratch; none where a sample has groups
    moments: Array | None  # [B, count] float64: of the samples that act, for a function of them
    axes: tuple[int, ...] = ()  # of [C, *], over which moments are taken
    groups: tuple[int, int, int] = (0, 0, 0)  # outer, reduce, inner of a sample; no reduce: one group
    guided: Array | None = None  # [B, C, *] in the dtype of the state: the guided output, if a sample has groups
    guided_source: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))  # [R + 1, B, K]

    @property
    def row_stride(self) -> int:
        return int(self.parameters[0].size)

    @property
    def sample_stride(self) -> int:
        return int(self.parameters.shape[2]) if self.parameters.shape[1] > 1 else 0

    @property
    def own(self) -> bool:
        """Whether the program gives the weights, and not a function of the moments."""
        return isinstance(self.guidance, MomentGuidance)

    def acts(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[B] whether the samples' rows act."""
        return np.asarray(self.of_rows(rows)[:, ACTING] != 0)

    def scalars(self, row: int, b: int) -> tuple[float, float, dict[str, float]]:
        """p_x, p_m and the scalars of the method's equation, for one sample at a row."""
        values = self.parameters[row, b if self.parameters.shape[1] > 1 else 0].tolist()
        named = dict(zip(self.names, values[OWN:], strict=False))
        named.pop("size")
        return values[P_X], values[P_M], named

    def of_rows(self, rows: NDArray[np.int32]) -> Floats:
        """[B, P] the parameters of the rows that the samples stand at."""
        table = self.parameters
        found: Floats = table[rows, np.arange(len(rows)) if table.shape[1] > 1 else 0]
        return found

    def weigh(self, values: Array, parameters: Array, block: Array, state: int) -> None:
        """Ask a custom function: the blocks [B, width] from the moments [B, count] and parameters [B, P]."""
        guidance: Any = self.guidance
        model = guidance.space == "model"
        named: dict[str, Any] = {name: parameters[:, OWN + i] for i, name in enumerate(self.names)}
        named["p_x"], named["p_m"] = (0.0, 1.0) if model else (parameters[:, P_X], parameters[:, P_M])
        seen = BranchMoments(guidance.branches, values, named)
        with arrays.without_grad(values), np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            entries = seen.block(guidance.weights(seen), state)
            block[:] = 0
            for place, value in entries.items():
                block[:, place] = value


def moments_of(
    guidance: Any,
    plan: Plan,
    computed: NDArray[np.bool_],  # [R, B]
    weights: NDArray[Any],  # the host's blocks, [1 or B, R + 1, width] in the dtype of the state
    source: NDArray[np.int32],  # [R + 1, B, K] where the rows find the branches
    shape: tuple[int, ...],  # [B, C, *]
    buffers: Buffers,
    like: Array,
) -> Moments | None:
    """The moments of a run, None if its guidance needs none at any row."""
    custom = isinstance(guidance, CustomGuidance) and guidance.guided is None
    if not computed.any() or not (custom or isinstance(guidance, MomentGuidance)):
        return None
    batch, K, Sg = shape[0], len(guidance.branches), guidance.slots
    S, width = plan.slots + Sg, weights.shape[2]
    if custom:
        own = {"scale": guidance.scales(plan, batch), "sigma": plan.sigma[:, None]}
        program = Program(K, OWN + 1 + len(own), (), (), sums=True)
        names, constants, pattern = ("size", *own), (), (*range(K), 2 * K)
    else:
        program, names, constants, pattern = guidance.traced(S)
        own = _told(guidance, plan, batch)
    axes = reduced(guidance, shape)
    whole = len(axes) == len(shape) - 1
    groups = (0, 0, 0) if whole else _groups(shape, axes)
    size = int(np.prod([shape[axis] for axis in axes]))
    columns = {"size": np.full(computed.shape, float(size)), **own}
    table = np.zeros((plan.evaluations + 1, batch, program.parameters))
    table[1:, :, ACTING] = computed
    for column, values in zip((P_X, P_M), space_factors(plan, guidance.space), strict=True):
        table[1:, :, column] = values[:, None]
    for i, name in enumerate(names):
        table[1:, :, OWN + i] = columns[name]
    table[1:, :, OWN + len(names) :] = constants
    shared = weights.shape[0] == 1 and bool((table == table[:, :1]).all())
    real, count = str(weights.dtype), moments_count(program.vectors)
    written = np.zeros(width, real)
    written[list(pattern)] = 1.0
    chunks = -(-int(np.prod(shape[1:])) // CHUNK)
    found = Moments(
        guidance=guidance,
        program=program,
        names=names,
        parameters=np.ascontiguousarray(table[:, :1] if shared else table),
        pattern=written,
        plain_sample_stride=0 if weights.shape[0] == 1 else weights[0].size,
        partial=buffers.array("partial moments", (batch, chunks, count), "float64", like) if whole else None,
        moments=buffers.array("moments", (batch, count), "float64", like) if custom else None,
        axes=tuple(axis - 1 for axis in axes),
        groups=groups,
    )
    if not whole:
        found.guided = buffers.array("guided", shape, real, like)
        found.guided_source = guided_routes(source)
    return found


def _told(guidance: MomentGuidance, plan: Plan, batch: int) -> dict[str, Floats]:
    """The scalars of its equation, [R, B] each; ValueError naming the one that is not."""
    given, told = guidance.parameters(plan, batch), {}
    for name in guidance.names:
        values = np.asarray(given.get(name, np.nan), np.float64)
        if values.shape not in ((), (plan.evaluations, batch)) or name not in given:
            got = f"shape {values.shape}" if name in given else f"only {sorted(given)}"
            raise ValueError(
                f"parameters: {type(guidance).__name__} gives {name!r} as {got}, expected {(plan.evaluations, batch)}"
            )
        told[name] = values
    return told


def own_blocks(moments: Moments, batch: int, width: int, slots: int, K: int) -> NDArray[np.float64]:
    """The samples' own blocks [B, width] as a run begins: with groups the guided output is the one branch of a row."""
    blocks = np.zeros((batch, width))
    if moments.guided is not None:
        blocks[:, 0] = 1.0
        blocks[:, weights_width(K, slots, 0) :] = 1.0
    return blocks


def guided_routes(source: NDArray[np.int32]) -> NDArray[np.int32]:
    """Sources [R + 1, B, K] of rows whose first branch is a guided tensor [B, C, *]. The others stay as they are: one
    of them may say where a learned variance lies."""
    routes = source.copy()
    routes[1:, :, 0] = np.arange(source.shape[1])
    return routes


def space_factors(plan: Plan, space: str) -> tuple[Floats, Floats]:
    """p_x and p_m [R]: P = p_x x + p_m m is a model output m at noisy x in another space.

    denoised: D = a_x x + a_g m. v: alpha E - sigma D with E = (x - alpha D) / sigma.
    """
    rows = plan.rows[1:]
    a_x, a_g = np.array([row.a_x for row in rows]), np.array([row.a_g for row in rows])
    if space == "model":
        return np.zeros_like(a_x), np.ones_like(a_g)
    if space == "denoised":
        return a_x, a_g
    alpha, sigma = plan.alpha, plan.sigma
    power = alpha**2 + sigma**2
    return (alpha - power * a_x) / sigma, -power * a_g / sigma


def _groups(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int, int]:
    """outer, reduce, inner of a sample."""
    sizes = [shape[1 : axes[0]], shape[axes[0] : axes[-1] + 1], shape[axes[-1] + 1 :]]
    outer, reduce, inner = (int(np.prod(part)) for part in sizes)
    return outer, reduce, inner
