"""Arrays that outlive a run: what it wrote to is kept for the next one, and the graphs that were recorded on it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from . import arrays
from .arrays import Array

GRAPHS = 16  # that hang on one set of arrays at most; the oldest goes


class Buffers:
    """The arrays of a run by name. A sampler keeps those of its last run: large ones cost page faults when fresh."""

    def __init__(self) -> None:
        self._arrays: dict[str, tuple[Any, Array]] = {}
        self.graphs: dict[Any, Any] = {}  # graph.Graph by what is baked into it, reading and writing these arrays
        self.site: Any = None  # graph.Site of their recordings

    def array(self, name: str, shape: Sequence[int], dtype: str, like: Array) -> Array:
        """An uninitialised array: the one of that name if it still fits, else a new one."""
        key, held = (tuple(shape), dtype, arrays.place(like)), self._arrays.get(name)
        if held is None or held[0] != key:
            if held is not None:  # a graph may use it
                self.graphs.clear()
            held = self._arrays[name] = (key, arrays.empty(shape, dtype, like))
        return held[1]

    def keep_graph(self, key: Any, graph: Any) -> None:
        while len(self.graphs) >= GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        self.graphs[key] = graph


class Spare:
    """Buffers that runs of a sampler gave back, for later ones: those of the last `kept` kinds of noise (shape, dtype,
    device, stream). A run that is under way has taken its own out."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._free: list[tuple[Any, Buffers]] = []  # oldest first
        self._lock = threading.RLock()  # a run that is collected gives its buffers back, wherever that happens

    def take(self, like: Array) -> tuple[Any, Buffers]:
        """The kind of a run from such noise and buffers for it: of that kind if there are any, else others that may fit
        in part where one is kept, else new ones."""
        kind = tuple(like.shape), arrays.dtype_name(like), arrays.place(like)
        with self._lock:
            for i in range(len(self._free) - 1, -1, -1):
                if self._free[i][0] == kind or self.kept == 1:
                    return kind, self._free.pop(i)[1]
        return kind, Buffers()

    def give(self, kind: Any, buffers: Buffers) -> None:
        with self._lock:
            self._free.append((kind, buffers))
            del self._free[: -self.kept]

    def graphs(self) -> list[Any]:
        """Those on buffers that no run has taken."""
        with self._lock:
            return [graph for _, buffers in self._free for graph in buffers.graphs.values()]

    def __getstate__(self) -> int:
        return self.kept  # a copy begins without buffers

    def __setstate__(self, kept: int) -> None:
        self.__init__(kept)  # type: ignore[misc]
