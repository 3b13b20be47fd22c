"""The CPU rasteriser: Numba kernels behind one autograd function.

Tiles, front-to-back blending and the cut-offs are 3DGS's (arXiv 2308.04079) as gsplat 1.5.3 has
them. See `_project` and `_composite` for what runs, and why its results have the same bits on any
number of threads.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from fresnel.render import _composite, _project

Array = np.ndarray[Any, Any]


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    background: Tensor | None,
    *,
    near: float,
    far: float,
    eps2d: float,
    alpha_max: float,
    threads: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Render B scenes from C cameras each; shapes as in `fresnel.render.gpu.rasterize`.

    Raises:
        ValueError: for NaN or infinite values.
    """
    scenes = [t.float().contiguous() for t in (means, quats, scales, opacities, colors)]
    B, C = viewmats.shape[:2]
    if background is None:
        background = torch.zeros(B, C, 3)
    shape = _Shape(
        images=B * C,
        views=C,
        gaussians=means.shape[1],
        coefficients=0 if colors.ndim == 3 else colors.shape[-2],
        width=width,
        height=height,
        near=float(near),
        far=float(far),
        eps2d=float(eps2d),
        alpha_max=float(np.float32(alpha_max)),
        threads=threads or numba.config.NUMBA_NUM_THREADS,  # type: ignore[attr-defined]
    )
    cameras = _camera_rows(viewmats, Ks, width, height)
    images: tuple[Tensor, Tensor, Tensor] = _Rasterize.apply(
        *scenes, background.float().contiguous(), cameras, shape
    )
    return images


@dataclass(frozen=True)
class _Shape:
    images: int
    views: int
    gaussians: int
    coefficients: int
    width: int
    height: int
    near: float
    far: float
    eps2d: float
    alpha_max: float
    threads: int

    def threads_for(self, work: int, enough: int) -> int:
        """How many threads to wake: none for work that is done before they are awake."""
        return self.threads if work >= enough else 1

    @property
    def tiles_x(self) -> int:
        return -(-self.width // _project.TILE)

    @property
    def tiles(self) -> int:
        return self.tiles_x * -(-self.height // _project.TILE)


def _camera_rows(viewmats: Tensor, Ks: Tensor, width: int, height: int) -> Array:
    """Cameras as rows of 24 doubles: the 3x4 pose, fx fy cx cy, slope limits, centre, padding."""
    pose = viewmats.detach().double().numpy().reshape(-1, 4, 4)
    K = Ks.detach().double().numpy().reshape(-1, 3, 3)
    rows = np.zeros((len(pose), 24))
    rows[:, :12] = pose[:, :3].reshape(-1, 12)
    for at, (f, c, size) in enumerate(
        ((K[:, 0, 0], K[:, 0, 2], width), (K[:, 1, 1], K[:, 1, 2], height))
    ):
        rows[:, 12 + at], rows[:, 14 + at] = f, c
        # gsplat evaluates the projection's Jacobian no farther than 15 % outside the image.
        rows[:, 16 + 2 * at] = -(c + 0.15 * size) / f
        rows[:, 17 + 2 * at] = (size - c + 0.15 * size) / f
    rows[:, 20:23] = -(pose[:, None, :3, 3] @ pose[:, :3, :3])[:, 0]
    if not np.isfinite(rows).all():
        raise ValueError("cameras: got NaN or infinite values, want finite ones")
    return rows


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, cameras, s = args
        means, quats, scales, opacities, colors, background = (
            t.detach().numpy().reshape(-1) for t in tensors
        )
        M, N = s.images, s.gaussians
        size = (s.tiles_x, s.tiles, s.width, s.height)
        records = _aligned(8 * M * N)
        records32 = records.view(np.float32)
        boxes, firsts = np.empty(4 * M * N, np.int16), np.empty(M * N, np.int32)
        keys = np.empty(M * N, np.uint64)
        chunks = -(-N // _project.CHUNK)
        counts, entries, bases = (np.empty(M * chunks, np.int64) for _ in range(3))
        tile_counts = np.empty(M * chunks * s.tiles, np.int32)
        bad = np.zeros(1, np.int64)
        with _compiling_notice(_composite.composite):
            many = s.threads_for(M * N, 20_000)
            _run(
                _project.project, many,
                means, quats, scales, opacities, colors, s.coefficients, cameras, s.views, N,
                s.width, s.height, s.tiles_x, s.tiles, s.near, s.far, s.eps2d,
                records, records32, boxes, firsts, keys, counts, entries, tile_counts, bad,
            )  # fmt: skip
            if bad[0]:
                raise ValueError("gaussians: got NaN or infinite values, want finite ones")
            total = int(entries.sum())
            starts = np.zeros(M * s.tiles + 1, np.int64)
            _run(
                _composite.sort, min(M, many),
                M, N, s.tiles, keys, counts, entries, tile_counts, bases, starts,
            )  # fmt: skip
            entry_ids = np.zeros(total + _composite.AHEAD, np.int32)
            slots = np.empty(total, np.int32)
            bands = 1 if many <= M else many
            _run(
                _composite.fill, many,
                M, bands, N, s.tiles_x, s.tiles, boxes, firsts, keys, counts, bases, starts,
                entry_ids, slots,
            )  # fmt: skip
            touched = np.zeros(total, np.uint16)
            rgb = _aligned_images(M // max(s.views, 1), s.views, s.height, s.width, 3)
            alpha = _aligned_images(M // max(s.views, 1), s.views, s.height, s.width, 1)
            depth = _aligned_images(M // max(s.views, 1), s.views, s.height, s.width, 1)
            _run(
                _composite.composite, s.threads_for(total + 8 * M * s.tiles, 5_000),
                M, *size, records, records32, starts, entry_ids,
                np.float32(s.alpha_max), background,
                rgb.reshape(-1), alpha.reshape(-1), depth.reshape(-1), touched,
            )  # fmt: skip
        images = (torch.from_numpy(rgb), torch.from_numpy(alpha), torch.from_numpy(depth))
        ctx.save_for_backward(*tensors, *images)
        ctx.touched = touched
        ctx.rest = (cameras, s, records, boxes, firsts, bases, starts, entry_ids, slots)
        return images

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, background, rgb, alpha, depth = ctx.saved_tensors
        cameras, s, records, boxes, firsts, bases, starts, entry_ids, slots = ctx.rest
        touched = ctx.touched
        M, N = s.images, s.gaussians
        records32 = records.view(np.float32)
        flat = [t.contiguous().numpy().reshape(-1) for t in slopes]
        images = [t.numpy().reshape(-1) for t in (background, rgb, alpha, depth)]
        sums = _aligned(8 * len(touched)).view(np.float32)
        scenes = [t.detach().numpy().reshape(-1) for t in tensors]
        grads = [np.zeros_like(t) for t in scenes]
        chunks = -(-N // _project.CHUNK)
        scenes_total = M // max(s.views, 1)
        with _compiling_notice(_project.project_backward):
            _run(
                _composite.composite_backward, s.threads_for(len(touched) + 8 * M * s.tiles, 3_000),
                M, s.tiles_x, s.tiles, s.width, s.height, records, records32, starts, entry_ids,
                np.float32(s.alpha_max), *images, touched, *flat, sums,
            )  # fmt: skip
            _run(
                _project.project_backward, s.threads_for(M * N, 10_000),
                *scenes, s.coefficients, cameras, s.views, N, s.width, s.height, s.eps2d,
                records, records32, boxes, firsts, bases, slots, touched, sums,
                scenes_total * chunks, *grads,
            )  # fmt: skip
        v_background = None
        if ctx.needs_input_grad[5]:
            v_background = ((1 - alpha) * slopes[0]).sum((2, 3))
        v_scenes = (
            torch.from_numpy(v).reshape(t.shape) for v, t in zip(grads, tensors, strict=True)
        )
        return (*v_scenes, v_background, None, None)


def _aligned(doubles: int) -> Array:
    """Uninitialised float64 memory that starts at a cache line."""
    memory = np.empty(doubles + 8)
    skip = -memory.ctypes.data // 8 % 8
    return memory[skip : skip + doubles]


def _aligned_images(*shape: int) -> Array:
    size = math.prod(shape)
    return _aligned((size + 1) // 2).view(np.float32)[:size].reshape(shape)


def _run(kernel: Callable[..., None], threads: int, *args: Any) -> None:
    """Run a kernel on this thread and `threads - 1` others until its tasks are done."""
    counter = np.zeros(1, np.int64)
    if threads <= 1:
        kernel(counter, *args)
        return
    pool = _pool(os.getpid(), threads - 1)
    helpers = [pool.submit(kernel, counter, *args) for _ in range(threads - 1)]
    kernel(counter, *args)
    for helper in helpers:
        helper.result()


@functools.lru_cache(maxsize=4)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """Threads that live as long as the process (a forked child, with its own id, gets its own)."""
    return ThreadPoolExecutor(workers, thread_name_prefix="fresnel-render")


class _compiling_notice:
    """Say what takes so long when kernels are compiled rather than loaded from Numba's cache.

    Takes the last kernel of a pass: once that has been compiled, all of them have.
    """

    def __init__(self, kernel: Any) -> None:
        self.timer: threading.Timer | None = None
        if not kernel.overloads:
            text = "fresnel: compiling the CPU renderer, once per machine (about 10 s) ..."
            self.timer = threading.Timer(2.0, print, (text,), {"file": sys.stderr, "flush": True})
            self.timer.daemon = True

    def __enter__(self) -> None:
        if self.timer is not None:
            self.timer.start()

    def __exit__(self, *_: object) -> None:
        if self.timer is not None:
            self.timer.cancel()
