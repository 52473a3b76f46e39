"""The captured loop: model and step as one CUDA graph, replayed once per evaluation.

A row is data on the device, so one capture serves every row of any solver; a run needs one for each set of branches
that its evaluations call (two with a guidance interval). Everything a capture reads and writes lies in the buffers that
the sampler keeps: a later run on them replays it, with its own noise, seeds, scales and conditions copied in.
"""

from __future__ import annotations

import linecache
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import arrays
from .arrays import Array
from .buffers import Buffers
from .conditions import Cond, Routing
from .extras import require

if TYPE_CHECKING:
    from .run import Run

WARM_UPS = 3  # model calls before a capture: autotuning, workspaces and compilation must be over
_recording = threading.Lock()  # a capture forbids others to wait for the device


class CaptureError(RuntimeError):
    """A model did something that a CUDA graph cannot record; names the call."""


class Graph(NamedTuple):
    """A recorded evaluation."""

    replay: Callable[[], None]
    memory: int  # bytes of device memory that it added to its pool
    gradient: Array | None = None  # where it leaves a classifier's


class Site:
    """Where the graphs of one set of buffers are recorded. They share a pool of memory, whatever the order of their
    replays: nothing in it outlives an evaluation. torch reuses the pool's blocks stream by stream."""

    def __init__(self, device: Any) -> None:
        cuda = require("torch").cuda
        self.device, self.stream, self.pool = device, cuda.Stream(device), cuda.graph_pool_handle()


class CapturedLoop:
    """The evaluations of a run as replays of graphs, recorded where there is none yet."""

    def __init__(self, run: Run) -> None:
        self.run = run
        step: Any = run.step
        settings = (run.wants_events, run.launch.check, step.supplied, run.backend, autocast(run.device))
        guided = None if run.gradient is None else run.gradient.key()
        moments, quantile = run.launch.moments, run.launch.quantile
        baked = (None if moments is None else moments.program, None if quantile is None else quantile[:3])
        models = run.sampler.branch_models
        weights = tuple(model.addresses() for model in models)
        self.common = (settings, step.resident.layout, models, weights, guided, baked)
        self.ready: dict[int, Graph] = {}
        self.rows = run.launch.samples["row"]  # the host's copy: all samples of a run stand at one row

    def turn(self, i: int, routing: Routing) -> None:
        """Evaluation i and the row that consumes it."""
        self.run.draw(i + 1)
        graph = self.ready.get(id(routing))
        if graph is None:
            graph = self.ready[id(routing)] = self._graph(i, routing)
        graph.replay()
        self.run.launch.attach(graph.gradient, None)
        self.rows += 1

    def _graph(self, i: int, routing: Routing) -> Graph:
        calls = [(call.key, frozen(call.cond)) for call in routing.calls]
        buffers, key = self.run.buffers, (self.common, routing.guided, routing.computed, *calls)
        if key not in buffers.graphs:
            buffers.keep_graph(key, self._recorded(i, routing))
        found: Graph = buffers.graphs[key]
        return found

    def _recorded(self, i: int, routing: Routing) -> Graph:
        """Nothing in it depends on i: what does is read on the device."""
        run = self.run
        step: Any = run.step

        def warm_up() -> None:
            for _ in range(WARM_UPS):
                outputs = run.evaluate(i, routing)
            step.warm_up(outputs)

        if run.buffers.site is None:
            run.buffers.site = Site(run.device)
        graph = record(warm_up, lambda: step.enqueue(run.evaluate(i, routing)), run.buffers.site)
        step.refresh()  # a model may have written into its inputs
        return graph._replace(gradient=run.launch.gradient if routing.guided else None)


def autocast(device: Any) -> tuple[bool, Any]:
    """What torch.autocast would do to the operators of a model on a device."""
    torch: Any = require("torch")
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def record(warm_up: Callable[[], None], body: Callable[[], None], site: Site) -> Graph:
    """The work that `body` puts on the current stream as a graph; it is not run. `warm_up` is.

    Raises CaptureError naming the line that called what a capture forbids.
    """
    torch: Any = require("torch")
    broken: BaseException | None = None
    with _recording, torch.cuda.device(site.device), torch.no_grad():
        here, cached = torch.cuda.current_stream(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # weights that it casts in a warm-up are freed when autocast ends
        try:
            site.stream.wait_stream(here)
            with torch.cuda.stream(site.stream):
                warm_up()
            here.wait_stream(site.stream)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
            # thread_local: other threads may allocate meanwhile
            with torch.cuda.graph(graph, pool=site.pool, stream=site.stream, capture_error_mode="thread_local"):
                try:
                    body()
                except BaseException as error:
                    broken = error
                    raise
            return Graph(graph.replay, torch.cuda.memory_reserved() - before)
        except Exception as error:  # of the model, or of ending a capture that it broke
            if broken is None and "capture" not in str(error):
                raise  # in a warm-up: the model's own
            _end_broken_capture(torch, site, here)
            if broken is not None and not isinstance(broken, Exception):
                raise broken from None
            told = f"the model: {error}" if broken is None else broken_call(broken)
            raise CaptureError(f"model: a CUDA graph cannot record {told}") from broken or error
        finally:
            torch.set_autocast_cache_enabled(cached)


def _end_broken_capture(torch: Any, site: Site, here: Any) -> None:
    """torch's own end of a capture stops at the first error: its stream stays current, its pool goes on allocating."""
    torch.cuda.set_stream(here)
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(site.stream.device_index, site.pool)
        torch._C._cuda_releasePool(site.stream.device_index, site.pool)


def broken_call(error: BaseException) -> str:
    """Where an error was raised, in words: the innermost line outside of torch and pyguide, or the innermost at all."""
    frames = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in walk_tb(error.__traceback__)]
    libraries = {Path(__file__).parent, Path(str(require("torch").__file__)).parent}
    outside = [f for f in frames if libraries.isdisjoint(Path(f[0]).parents)]
    if not frames:
        return f"it: {error}"
    file, line, name = (outside or frames)[-1]
    return f"`{linecache.getline(file, line).strip()}` in {name} ({file}:{line}): {error}"


def addresses(source: Any) -> tuple[Any, ...]:
    """Where the weights of a callable lie, if it is a module: a graph of it is stale once they have moved."""
    found = getattr(source, "parameters", None)
    return tuple((weight.data_ptr(), weight.dtype) for weight in found()) if callable(found) else ()


def keep(cond: Cond, buffers: Buffers, like: Array, name: tuple[Any, ...], told: str = "cond") -> dict[str, Any]:
    """Conditions whose tensors are copied into the buffers, where the graphs find those of every run.

    TypeError or ValueError naming the condition if it is an array that a graph cannot read.
    """
    kept: dict[str, Any] = {}
    for key, value in cond.items():
        if isinstance(value, Mapping):
            kept[key] = keep(value, buffers, like, (*name, key), f"{told}[{key!r}]")
        elif isinstance(value, np.ndarray):
            raise TypeError(f"{told}[{key!r}]: expected a tensor on {like.device}, like the noise, got ndarray")
        elif arrays.is_torch(value):
            if value.device != like.device:
                raise ValueError(
                    f"{told}[{key!r}]: expected a tensor on {like.device}, like the noise, got {value.device}"
                )
            kept[key] = buffers.array(repr((*name, key)), tuple(value.shape), arrays.dtype_name(value), like)
            arrays.copy_into(kept[key], value)
        else:
            kept[key] = value
    return kept


def frozen(cond: Cond) -> tuple[Any, ...]:
    """What of the conditions is baked into a graph: where tensors lie, and the values that are none."""
    parts: list[Any] = []
    for key, value in cond.items():
        if isinstance(value, Mapping):
            parts.append((key, frozen(value)))
        elif arrays.is_torch(value):
            parts.append((key, value.data_ptr(), tuple(value.shape), value.dtype))
        else:
            parts.append((key, type(value), value if _hashable(value) else repr(value)))
    return tuple(parts)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
