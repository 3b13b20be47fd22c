"""The two passes of the CPU rasteriser, each one kernel: what runs after what, in which memory."""

# Numba compiles this file, mypy cannot follow it: every value is typed by the compiler.
# mypy: ignore-errors
# fmt: off
from __future__ import annotations

import numpy as np

from fresnel.render.kernels.bins import AHEAD, fill, sort
from fresnel.render.kernels.composite import composite, composite_backward, run_of
from fresnel.render.kernels.project import TILE, project, project_backward
from fresnel.render.kernels.tasks import (
    BAD,
    TOTAL,
    array_at,
    doubles,
    floats,
    inline,
    kernel,
    wait,
)


@inline
def ends(images, N, chunks, tiles):
    """Where the parts of a pass's memory end, in doubles; each takes whole cache lines."""
    each = images * N + 7 & -8
    records = 8 * each
    boxes = records + each
    firsts = boxes + each
    keys = firsts + each
    others = keys + each
    cameras = others + 24 * images
    chunk_table = cameras + 8 * images * chunks
    starts = chunk_table + (images * tiles + 8 & -8)
    tile_counts = starts + (images * chunks * tiles + 15) // 16 * 8
    return records, boxes, firsts, keys, others, cameras, chunk_table, starts, tile_counts


@inline
def parts_of(address, images, N, chunks, tiles):
    """A pass's memory, cut up: see `project` and `sort` for what stands where."""
    e = ends(images, N, chunks, tiles)
    each = images * N
    return (
        doubles(address, 8 * each), floats(address, 16 * each),
        array_at(address + 8 * e[0], 4 * each, np.int16),
        array_at(address + 8 * e[1], each, np.int32),
        array_at(address + 8 * e[2], each, np.int64),
        array_at(address + 8 * e[3], each, np.int64),
        doubles(address + 8 * e[4], 24 * images),
        array_at(address + 8 * e[5], 8 * images * chunks, np.int64),
        array_at(address + 8 * e[6], images * tiles + 1, np.int64),
        array_at(address + 8 * e[7], images * chunks * tiles, np.int32),
    )


@inline
def lists_of(address, capacity, images, N, chunks, tiles):
    """What follows these parts, 10 bytes an entry: its Gaussian, its slot, the blocks touched."""
    entry_ids = address + 8 * ends(images, N, chunks, tiles)[8]
    slots = entry_ids + 4 * (capacity + AHEAD)
    return (
        array_at(entry_ids, capacity + AHEAD, np.int32), array_at(slots, capacity, np.int32),
        array_at(slots + 4 * capacity, capacity, np.uint16),
    )


def memory_size(images: int, N: int, chunk_size: int, tiles: int, capacity: int) -> tuple[int, int]:
    """Doubles that a pass's memory takes, before its lists and with lists of `capacity` entries."""
    fixed = ends.py_func(images, N, max(1, -(-N // chunk_size)), tiles)[8]
    return fixed, fixed + (10 * capacity + 4 * AHEAD + 7) // 8


@kernel
def forward(
    progress, again, means, quats, scales, opacities, colors, sh, background, viewmats, Ks,
    images, C, N, chunk_size, width, height, near, eps2d, bands,
    memory, capacity, rgb, alpha, depth,
):
    """Gaussians to images. Memory comes as addresses; see `memory_size` for its size.

    Stops before it fills lists of more than `capacity` entries, and says in `progress` how many
    there are; called `again` with the same memory and more behind it, it takes up from there.
    """
    tiles_x, tiles_y = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    tiles, scenes = tiles_x * tiles_y, images // max(C, 1)
    chunks = max(1, (N + chunk_size - 1) // chunk_size)
    (
        records, records32, boxes, firsts, keys, others, cameras, chunk_table, starts, tile_counts,
    ) = parts_of(memory, images, N, chunks, tiles)
    if not again:
        project(
            progress, 0, floats(means, 3 * scenes * N), floats(quats, 4 * scenes * N),
            floats(scales, 3 * scenes * N), floats(opacities, scenes * N),
            floats(colors, 3 * max(sh, 1) * scenes * N), sh, doubles(viewmats, 16 * images),
            doubles(Ks, 9 * images), images, C, N, chunks, chunk_size, width, height, tiles_x,
            tiles, near, eps2d, cameras, records, records32, boxes, firsts, keys, chunk_table,
            tile_counts,
        )
        wait(progress, 0, images * chunks)
        if progress[BAD] != 0:
            return
        sort(
            progress, 1, images, N, chunks, chunk_size, tiles, keys, others, chunk_table,
            tile_counts, starts,
        )
        wait(progress, 1, images)
        if progress[TOTAL] > capacity:
            return
    entry_ids, slots, touched = lists_of(memory, capacity, images, N, chunks, tiles)
    fill(
        progress, 2, images, bands, N, chunks, chunk_size, tiles_x, tiles, boxes, firsts, keys,
        others, chunk_table, starts, entry_ids, slots,
    )
    wait(progress, 2, images * bands)
    composite(
        progress, 3, images, tiles_x, tiles, width, height, records, records32, starts, entry_ids,
        floats(background, 3 * images), floats(rgb, 3 * images * width * height),
        floats(alpha, images * width * height),
        floats(depth, images * width * height), touched,
    )
    run = run_of(tiles)
    wait(progress, 3, (images * tiles + run - 1) // run)


@kernel
def backward(
    progress, means, quats, scales, opacities, colors, sh, background, scenes, C, N, chunk_size,
    width, height, eps2d, memory, capacity, rgb, alpha, depth,
    v_rgb, v_alpha, v_depth, of_rgb, of_alpha, of_depth, sums, total,
    v_means, v_quats, v_scales, v_opacities, v_colors,
):
    """Gradients of images to gradients of Gaussians; `sums` is room for 16 floats an entry."""
    tiles_x, tiles_y = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    tiles, images, pixels = tiles_x * tiles_y, scenes * C, scenes * C * width * height
    chunks = max(1, (N + chunk_size - 1) // chunk_size)
    records, records32, boxes, firsts, _, _, cameras, chunk_table, starts, _ = parts_of(
        memory, images, N, chunks, tiles
    )
    entry_ids, slots, touched = lists_of(memory, capacity, images, N, chunks, tiles)
    entry_sums = floats(sums, 16 * total)
    composite_backward(
        progress, 0, images, tiles_x, tiles, width, height, records, records32, starts, entry_ids,
        floats(background, 3 * images), floats(rgb, 3 * pixels),
        floats(alpha, pixels), floats(depth, pixels), touched, floats(v_rgb, 3 * pixels),
        floats(v_alpha, pixels), floats(v_depth, pixels), (of_rgb, of_alpha, of_depth), entry_sums,
    )
    run = run_of(tiles)
    wait(progress, 0, (images * tiles + run - 1) // run)
    project_backward(
        progress, 1, floats(means, 3 * scenes * N), floats(quats, 4 * scenes * N),
        floats(scales, 3 * scenes * N), floats(opacities, scenes * N),
        floats(colors, 3 * max(sh, 1) * scenes * N), sh, scenes, C, N, chunks, chunk_size, eps2d,
        cameras, records32, boxes, firsts, chunk_table, slots, touched, entry_sums,
        floats(v_means, 3 * scenes * N), floats(v_quats, 4 * scenes * N),
        floats(v_scales, 3 * scenes * N), floats(v_opacities, scenes * N),
        floats(v_colors, 3 * max(sh, 1) * scenes * N),
    )
    wait(progress, 1, scenes * chunks)
