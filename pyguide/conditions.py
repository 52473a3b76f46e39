"""Which samples of which branches share a model call, and the conditions stacked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Array, concatenate, is_array, pick

Cond = Mapping[str, Any]


@dataclass
class Call:
    """One model call: n rows, branch by branch, the samples of each in order."""

    members: list[tuple[int, NDArray[np.int64]]]  # (branch, samples)
    size: int
    x: Array = None  # views of the launch's buffers, set when it is bound
    t: Array = None
    cond: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()  # of x, and so of the output
    branch: int = 0  # the first one

    @property
    def key(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """What tells this call from others of the run: its branches and their samples."""
        return tuple((k, tuple(samples.tolist())) for k, samples in self.members)


@dataclass
class Routing:
    """The calls of one evaluation; index[b, k] is the row of branch k of sample b in its call, -1 if it is not run."""

    calls: list[Call]
    index: NDArray[np.int32]  # [B, K]
    guided: bool = False  # a classifier is called too
    computed: bool = False  # the outputs decide what their weights are


def route(active: NDArray[np.bool_], batched: bool) -> tuple[list[Call], NDArray[np.int32]]:
    """Calls for the active branches [B, K], one for all of them or one per branch, and the index of a Routing."""
    index = np.full(active.shape, -1, np.int32)
    members = [(k, np.flatnonzero(active[:, k])) for k in range(active.shape[1])]
    members = [(k, samples) for k, samples in members if len(samples)]
    calls = []
    for group in [members] if batched else [[member] for member in members]:
        size = 0
        for k, samples in group:
            index[samples, k] = size + np.arange(len(samples))
            size += len(samples)
        if size:
            calls.append(Call(group, size))
    return calls, np.ascontiguousarray(index)


@dataclass
class Told:
    """The conditions that a caller gave."""

    branches: dict[str, Cond]
    classifier: Cond | None = None  # what a classifier sees, if it was told by itself
    shared: bool = False  # it sees those of cond, of which `labels` may be for it alone


def assign(
    cond: Cond | None, uncond: Cond | None, conds: Mapping[str, Cond] | None, batch: int, classifier: str | None
) -> Told:
    """Conditions by branch, checked; those under the name `classifier` apart. Errors name the argument."""
    given: dict[str, Cond] = {} if conds is None else dict(conds)
    for name, value in (("cond", cond), ("uncond", uncond)):
        if value is None:
            continue
        if name in given:
            raise ValueError(f"{name}: given by itself and in conds")
        given[name] = value
    for name, value in given.items():
        check(name, value, batch)
    if classifier is None:
        return Told(given)
    own = given.pop(classifier, None)
    return Told(given, own, shared=own is None)


def check(name: str, cond: Any, batch: int) -> None:
    """Conditions are a mapping of names to arrays with one row per sample, or to nested mappings of such."""
    if not isinstance(cond, Mapping):
        raise TypeError(f"{name}: expected a mapping of names to arrays, got {type(cond).__name__}")
    for key, value in cond.items():
        if isinstance(value, Mapping):
            check(f"{name}[{key!r}]", value, batch)
        elif isinstance(value, (list, tuple)):
            raise TypeError(f"{name}[{key!r}]: expected an array with one row per sample, got {type(value).__name__}")
        elif is_array(value) and (value.ndim == 0 or value.shape[0] != batch):
            raise ValueError(
                f"{name}[{key!r}]: expected one row per sample ({batch}), got shape {tuple(value.shape)}; "
                "expand one row to all samples; what has none belongs into the model: wrap a function that passes it"
            )


def stack(conds: list[Cond], call: Call, batch: int, name: str = "cond") -> dict[str, Any]:
    """The conditions of a call, its rows in order; values that are not arrays must be the same in all branches."""
    used = [conds[k] for k, _ in call.members]
    if any(set(cond) != set(used[0]) for cond in used):
        raise ValueError(f"{name}: the branches have different conditions: {[sorted(cond) for cond in used]}")
    stacked: dict[str, Any] = {}
    for key in used[0]:
        values = [cond[key] for cond in used]
        if all(isinstance(value, Mapping) for value in values):
            nested = [dict(cond).get(key, {}) for cond in conds]
            stacked[key] = stack(nested, call, batch, f"{name}[{key!r}]")
        elif all(is_array(value) for value in values):
            rows = [v if len(s) == batch else pick(v, s) for v, (_, s) in zip(values, call.members, strict=True)]
            if any(row.shape[1:] != rows[0].shape[1:] or type(row) is not type(rows[0]) for row in rows):
                shapes = [tuple(row.shape) for row in rows]
                raise ValueError(f"{name}[{key!r}]: the branches have shapes that cannot be stacked: {shapes}")
            stacked[key] = concatenate(rows)
        elif any(is_array(value) or isinstance(value, Mapping) for value in values) or any(
            v != values[0] for v in values
        ):
            raise ValueError(f"{name}[{key!r}]: the branches cannot share one call: {values}")
        else:
            stacked[key] = values[0]
    return stacked


def routings(
    active: NDArray[np.bool_],
    batched: bool,
    model: NDArray[np.bool_],
    guided: NDArray[np.bool_],
    computed: NDArray[np.bool_],
) -> list[Routing]:
    """One routing per evaluation, for the branches that are run [R, B, K], whether the model and a classifier are
    called at all [R], and whether outputs decide their weights [R]; evaluations that do the same for the same samples
    share it.
    """
    known: dict[Any, Routing] = {}
    routes: list[Routing] = []
    flags = np.stack([model, guided, computed], axis=-1)  # [R, 3]
    repeated = ((active[1:] == active[:-1]).all(axis=(1, 2)) & (flags[1:] == flags[:-1]).all(axis=1)).tolist()
    for i, here in enumerate(active):
        if i and repeated[i - 1]:
            routes.append(routes[-1])
            continue
        key = here.tobytes(), flags[i].tobytes()
        if key not in known:
            if not model[i]:  # a place for the timestep, which the classifier is told
                here = np.broadcast_to(np.arange(here.shape[1]) == 0, here.shape)
            calls, index = route(here, batched)
            known[key] = Routing(calls if model[i] else [], index, bool(guided[i]), bool(computed[i]))
        routes.append(known[key])
    return routes
