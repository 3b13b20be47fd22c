"""Steps recorded as CUDA graphs: the GPU is told once what to do, not a thousand times a step.

Launching a kernel costs the host 5 to 40 microseconds, and a step of a small network is a thousand
of them.  A recording runs the very same kernels, so it changes no result.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fresnel.host.machine import is_out_of_memory
from fresnel.render import Views
from fresnel.scene.cameras import Cameras
from fresnel.scene.gaussians import Gaussians

_WARM_UP = 3
"""Runs before a recording: cuDNN's trials and first allocations must not be recorded."""
_TRIES = 3
"""Recordings of a part that are tried: what an earlier step left alive can spoil one."""


class Recorder:
    """Runs a piece of work that has no inputs and waits for nothing: first as it is, then recorded.

    All that changes from one run to the next must lie in tensors that stay where they are, and in
    `generator`, which the caller seeds before each run.

    Attributes:
        graphs: the recorded kinds of work; they run one at a time and share their memory.
        refused: why a recording failed; from then on everything runs as it is.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.refused: str | None = None
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._runs: Counter[Hashable] = Counter()
        self._pool: Any = None

    def run(self, kind: Hashable, work: Callable[[], None]) -> None:
        """Do `work`; work of another kind is recorded by itself."""
        if kind not in self.graphs and self.refused is None and self._runs[kind] >= _WARM_UP:
            try:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                graph = torch.cuda.CUDAGraph()
                graph.register_generator_state(self.generator)
                # other threads, such as the one that writes checkpoints, go on as they like
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    work()
                self.graphs[kind] = graph
            except Exception as error:  # whatever can't be recorded must still run
                self.refused = _refusal("steps run", error)
        if kind in self.graphs:
            self.graphs[kind].replay()
        else:
            self._runs[kind] += 1
            work()


def _refusal(what: str, error: Exception) -> str:
    """Warns of it, too."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    warnings.warn(f"{what} unrecorded, slower but the same: {reason}", stacklevel=3)
    return reason


class Recorded:
    """A function of tensors, recorded with its gradient after its first runs.

    For pieces of a step that can't be recorded whole, as a rasteriser's that asks the GPU how much
    there is to do.  Gradients live where the next run writes them: one batch a step.

    Args:
        function: of tensors, also in dicts, tuples and dataclasses, and of what stays the same.
        model: whose parameters the function uses; None: of none.
    """

    def __init__(self, function: Callable[..., Any], model: nn.Module | None = None) -> None:
        self.function, self.model = function, model
        self.refused: str | None = None
        self.flat: nn.Module | None = None
        self._known, self._rest, self._differentiable = list[Any](), None, list[bool]()
        self._runs, self._tries = 0, 0

    def __call__(self, *given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled() or self.refused is not None:
            return self.function(*given, **named)
        tensors, rest = taken_apart((given, named))
        known = [(t.shape, t.dtype, t.requires_grad) for t in tensors]
        self._runs += 1
        if self.flat is None and self._runs > _WARM_UP:
            self._record(tensors, rest)
            self._known = known
        if self.flat is None or known != self._known:
            return self.function(*given, **named)
        made = zip(self.flat(*tensors), self._differentiable, strict=True)
        return put_together([t if wanted else t.detach() for t, wanted in made], self._rest)

    def _record(self, tensors: list[Tensor], rest: Any) -> None:
        def from_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            given, named = put_together(tensors, rest)
            made, self._rest = taken_apart(self.function(*given, **named))
            self._differentiable = [tensor.requires_grad for tensor in made]
            return tuple(made)

        # what torch's recorder wants: a module, for its parameters, from tensors to tensors
        flat = nn.ModuleList([] if self.model is None else [self.model])
        flat.forward = from_tensors
        samples = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
        # gsplat leaves cycles behind that keep the last step's graph, and with it nodes of another
        # stream, which a recording must not touch
        gc.collect()
        device = samples[0].device.type
        enabled, kind = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        try:
            with torch.autocast(device, kind, enabled=enabled, cache_enabled=False):
                torch.cuda.make_graphed_callables(flat, samples, allow_unused_input=True)
            self.flat = flat
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._runs, self._tries = 0, self._tries + 1
            if self._tries == _TRIES:
                name = getattr(self.function, "__name__", "a part")
                self.refused = _refusal(f"{name} runs", error)


for _kind in (Cameras, Gaussians, Views):
    pytree.register_dataclass(_kind)


def taken_apart(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors of nested dicts, lists, tuples and registered dataclasses, and the rest."""
    leaves, structure = pytree.tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    # a tensor's place is kept by its class
    return tensors, ([Tensor if isinstance(x, Tensor) else x for x in leaves], structure)


def put_together(tensors: Sequence[Tensor], rest: Any) -> Any:
    """What `taken_apart` took apart."""
    given = iter(tensors)
    leaves = [next(given) if leaf is Tensor else leaf for leaf in rest[0]]
    return pytree.tree_unflatten(leaves, rest[1])
