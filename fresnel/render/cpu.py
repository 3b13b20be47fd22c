"""The CPU rasteriser: Numba kernels behind one autograd function.

Tiles, front-to-back blending and the cut-offs are 3DGS's (arXiv 2308.04079) as gsplat 1.5.3 has
them. Of `kernels`, passes says what runs, and tasks why results have the same bits on any number of
threads.
"""

import weakref
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fresnel.render.kernels import passes as _passes
from fresnel.render.kernels.tasks import BAD, TOTAL, run
from fresnel.scene.cameras import Cameras
from fresnel.scene.gaussians import Gaussians

ROOM = 8  # entries for each Gaussian that there is room for at first
MOST_PIXELS = 32_767 * 16
_ZEROS = torch.zeros(48)  # stands for a gradient that is zero everywhere


class Pool:
    """Lends memory for passes, and lends it again once the last reference to it is gone.

    Fresh pages cost as much as the work of a small pass (the system clears each at its first
    touch), and autograd decides how long a pass's memory lives. So memory is an array that comes
    back when it dies, wherever the garbage collector runs and in any thread: nothing here waits for
    a lock, every step on `idle` is one of the dictionary's own, and who loses a race allocates.

    Args:
        limit: bytes kept idle at most; beyond, what has been idle longest is freed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.idle: dict[int, np.ndarray[Any, Any]] = {}  # longest idle first

    def take(self, size: int) -> np.ndarray[Any, Any]:
        """Uninitialised memory for at least `size` doubles, from a cache line on. Hold on to the
        array, not to a view."""
        idle = list(self.idle.values())[::-1]  # of equals the last: its pages are still warm
        fits = [memory for memory in idle if size <= memory.size <= 4 * size + 4096]
        best = min(fits, key=lambda memory: memory.size, default=None)
        memory = self.idle.pop(id(best), None)
        if memory is None:
            size += size // 8 + 512  # so that it serves a slightly larger pass too
            whole = np.empty(size + 8)
            skip = -whole.ctypes.data // 8 % 8
            memory = whole[skip : skip + size]
        loan = memory[:]
        weakref.finalize(loan, self._give_back, memory).atexit = False
        return loan

    def _give_back(self, memory: np.ndarray[Any, Any]) -> None:
        self.idle[id(memory)] = memory
        idle = list(self.idle.items())
        excess = sum(memory.nbytes for _, memory in idle) - self.limit
        for key, oldest in idle:
            if excess > 0 and self.idle.pop(key, None) is not None:
                excess -= oldest.nbytes


_pool = Pool(limit=256 << 20)  # a pass of 100k Gaussians at 512 px takes 40 MB


def rasterize(
    gaussians: Gaussians, cameras: Cameras, background: Tensor | None, near: float, eps2d: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Render; parameters and results as in `fresnel.render.render`.

    Raises:
        ValueError: for NaN or infinite values, and where there are more pixels or Gaussians than
            the kernels can count.
    """
    g, width, height = gaussians, cameras.width, cameras.height
    tensors = [t.float().contiguous() for t in (g.means, g.quats, g.scales, g.opacities, g.colors)]
    views = cameras.viewmats.shape[:-2]
    images, N = views.numel(), g.means.shape[-2]
    if max(width, height) > MOST_PIXELS:  # boxes of tiles are 16-bit
        size = f"{width} x {height} pixels, want at most {MOST_PIXELS} each way"
        raise ValueError(f"cameras: images of {size}")
    _check_count(images * N)
    if background is None:
        background = torch.zeros(*views, 3)
    job = SimpleNamespace(
        views=views,
        scenes=views[:-1].numel(),
        C=views[-1],
        N=N,
        coefficients=0 if g.colors.ndim == g.means.ndim else g.colors.shape[-2],
        # Enough chunks to share, and few enough: each counts the entries of every tile.
        chunk=min(4096, max(256, 1 << (images * N >> 3).bit_length())),
        width=width,
        height=height,
        viewmats=cameras.viewmats.double().contiguous(),
        Ks=cameras.Ks.double().contiguous(),
        near=float(near),
        eps2d=float(eps2d),
        threads=_threads(images * N, images * width * height),
    )
    tensors.append(background.float().contiguous())
    if torch.is_grad_enabled():
        return _Rasterize.apply(job, *tensors)
    return _forward(job, *tensors)[0]


def _check_count(count: int) -> None:
    """Entries are counted and named in 32 bits."""
    if count >= 1 << 31:
        raise ValueError(
            f"gaussians: {count} pairs of a Gaussian and a view or tile in one call, want fewer "
            "than 2^31. Render fewer views at a time"
        )


def _threads(projections: int, pixels: int) -> int:
    """How many threads to wake: each should find as much to do as waking it costs."""
    limit: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    microseconds = 0.08 * projections + 0.002 * pixels
    return max(1, min(limit, int(microseconds / 20)))


def _forward(
    job: Any, *tensors: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, tuple[int, int]]:
    """Images; memory that the backward pass needs; the entries it has room for and those it holds.

    Where the entries do not fit, which is rare, there is enough to do to come a second time.
    """
    images, N, tiles = job.scenes * job.C, job.N, -(-job.width // 16) * -(-job.height // 16)
    *scenes, background = (t.data_ptr() for t in tensors)
    rgb, alpha, depth = (torch.empty(*job.views, job.height, job.width, k) for k in (3, 1, 1))
    total, capacity = 0, ROOM * images * N
    fixed, size = _passes.memory_size(images, N, job.chunk, tiles, capacity)
    memory = torch.from_numpy(_pool.take(size))
    while True:
        progress = run(
            _passes.forward, job.threads, total > 0, *scenes, job.coefficients, background,
            job.viewmats.data_ptr(), job.Ks.data_ptr(), images, job.C, N, job.chunk,
            job.width, job.height, job.near, job.eps2d,
            1 if job.threads <= images else job.threads, memory.data_ptr(), capacity,
            rgb.data_ptr(), alpha.data_ptr(), depth.data_ptr(),
        )  # fmt: skip
        if progress[BAD]:
            what = "gaussians" if progress[BAD] == 1 else "cameras"
            raise ValueError(f"{what}: got NaN or infinite values, want finite ones")
        total = total or int(progress[TOTAL])
        _check_count(total)
        if total <= capacity:
            return (rgb, alpha, depth), memory, (capacity, total)
        capacity, smaller = total, memory
        size = _passes.memory_size(images, N, job.chunk, tiles, capacity)[1]
        memory = torch.from_numpy(_pool.take(size))
        memory[:fixed] = smaller[:fixed]


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Any, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images, memory, ctx.entries = _forward(job, *tensors)
        # Saved, not an attribute: so autograd lets the memory go as soon as the graph was used.
        ctx.save_for_backward(*tensors, *images, memory)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return images

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, background, rgb, alpha, depth, memory = ctx.saved_tensors
        job, (capacity, total) = ctx.job, ctx.entries
        given = [_ZEROS if v is None else v.contiguous() for v in slopes]
        sums = torch.from_numpy(_pool.take(8 * total))
        grads = [torch.empty_like(t) for t in tensors]
        run(
            _passes.backward, job.threads,
            *(t.data_ptr() for t in tensors), job.coefficients, background.data_ptr(),
            job.scenes, job.C, job.N, job.chunk, job.width, job.height, job.eps2d,
            memory.data_ptr(), capacity,
            rgb.data_ptr(), alpha.data_ptr(), depth.data_ptr(),
            *(v.data_ptr() for v in given), *(int(v is not None) for v in slopes),
            sums.data_ptr(), total, *(v.data_ptr() for v in grads),
        )  # fmt: skip
        v_background = None
        if ctx.needs_input_grad[6] and slopes[0] is not None:
            v_background = ((1 - alpha) * slopes[0]).sum((-3, -2))
        return (None, *grads, v_background)
