"""Steps recorded as CUDA graphs: the GPU is told once what to do, not a thousand times a step.

Launching a kernel costs the host 5 to 40 microseconds, and a step of a small network is a thousand
of them.  A recording runs the very same kernels, so it changes no result.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from fresnel.training import host as surroundings

_WARM_UP = 3
"""Runs before a recording: cuDNN's trials and first allocations must not be recorded."""
_TRIES = 3
"""Recordings of a part that are tried: what an earlier step left alive can spoil one."""


class Recorder:
    """Runs a piece of work that has no inputs and waits for nothing: first as it is, then recorded.

    All that changes from one run to the next must lie in tensors that stay where they are, and in
    `generator`, which the caller seeds before each run.

    Attributes:
        refused: why a recording failed; from then on everything runs as it is.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.refused: str | None = None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._runs: Counter[Hashable] = Counter()
        self._pool: Any = None

    @property
    def count(self) -> int:
        """How many kinds of work are recorded."""
        return len(self._graphs)

    def run(self, kind: Hashable, work: Callable[[], None]) -> bool:
        """Do `work`; work of another kind is recorded by itself. Returns whether this took longer
        than it will from now on."""
        new = kind not in self._graphs and self.refused is None
        if new and self._runs[kind] >= _WARM_UP:
            self._record(kind, work)
        graph = self._graphs.get(kind)
        if graph is None:
            self._runs[kind] += 1
            work()
        else:
            graph.replay()
        return new

    def _record(self, kind: Hashable, work: Callable[[], None]) -> None:
        """Record without running it. Recordings run one at a time, so they share their memory."""
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            # other threads, such as the one that writes checkpoints, go on as they like
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except Exception as error:  # whatever can't be recorded must still run
            self.refused = _reason(error)
            warnings.warn(
                f"steps run unrecorded, slower but the same: {self.refused}", stacklevel=2
            )
            return
        self._graphs[kind] = graph


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Recorded:
    """A function of tensors, recorded with its gradient after its first runs.

    For pieces of a step that can't be recorded whole, as a rasteriser's that asks the GPU how much
    there is to do.  Gradients live where the next run writes them, so nothing can be added to them:
    one batch a step.

    Args:
        function: of tensors, in dicts, tuples and dataclasses, and of anything that stays the same.
        model: whose parameters the function uses; None: of none.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module | None = None) -> None:
        self.function, self.model = function, model
        self.refused: str | None = None
        self._flat: _Flat | None = None
        self._known: list[Any] = []
        self._runs, self._tries = 0, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled() or self.refused is not None:
            return self.function(*given, **named)
        tensors, shape = taken_apart((given, named))
        known = [(t.shape, t.dtype, t.requires_grad) for t in tensors]
        if self._flat is None:
            self._runs += 1
            if self._runs <= _WARM_UP:
                return self.function(*given, **named)
            self._record(tensors, shape)
            self._known = known
        if self._flat is None or known != self._known:
            return self.function(*given, **named)
        made = zip(self._flat(*tensors), self._flat.differentiable, strict=True)
        return put_together([t if wanted else t.detach() for t, wanted in made], self._flat.shape)

    def _record(self, tensors: list[Tensor], shape: Any) -> None:
        flat = _Flat(self.function, self.model, shape)
        samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
        # gsplat leaves cycles behind that keep the last step's graph, and with it nodes of another
        # stream, which a recording must not touch
        gc.collect()
        device = samples[0].device.type
        enabled = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device)
        try:
            with torch.autocast(device, kind, enabled=enabled, cache_enabled=False):
                torch.cuda.make_graphed_callables(flat, samples, allow_unused_input=True)
        except Exception as error:
            if surroundings.is_out_of_memory(error):
                raise
            self._runs, self._tries = 0, self._tries + 1
            if self._tries < _TRIES:
                return
            self.refused = _reason(error)
            warnings.warn(
                f"{getattr(self.function, '__name__', 'a part')} runs unrecorded, slower but the "
                f"same: {self.refused}",
                stacklevel=3,
            )
            return
        self._flat = flat


class _Flat(nn.Module):
    """The function as a module from tensors to tensors, as torch's recorder wants it."""

    def __init__(self, function: Callable[..., Any], model: nn.Module | None, given: Any) -> None:
        super().__init__()
        self.function, self.model, self.given = function, model, given
        self.shape: Any = None
        self.differentiable: list[bool] = []
        if model is not None:
            self.train(model.training)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given, named = put_together(list(tensors), self.given)
        made, self.shape = taken_apart(self.function(*given, **named))
        self.differentiable = [tensor.requires_grad for tensor in made]
        return tuple(made)


def taken_apart(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors of nested dicts, lists, tuples and dataclasses, and what is left without them."""
    tensors: list[Tensor] = []

    def without(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _Place(len(tensors) - 1)
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(without(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            return _Made(type(value), {name: without(getattr(value, name)) for name in names})
        return value

    left = without(value)
    return tensors, left


def put_together(tensors: list[Tensor], left: Any) -> Any:
    """What `taken_apart` took apart."""
    if isinstance(left, _Place):
        return tensors[left.index]
    if isinstance(left, _Made):
        return left.kind(**{name: put_together(tensors, v) for name, v in left.fields.items()})
    if isinstance(left, dict):
        return {key: put_together(tensors, item) for key, item in left.items()}
    if isinstance(left, (list, tuple)):
        return type(left)(put_together(tensors, item) for item in left)
    return left


@dataclasses.dataclass(frozen=True)
class _Place:
    index: int


@dataclasses.dataclass(frozen=True)
class _Made:
    kind: type
    fields: dict[str, Any]
