"""The two passes of the CPU rasteriser, each one kernel: what runs after what, in which memory."""

# Numba compiles this file, mypy cannot follow it: every value is typed by the compiler.
# mypy: ignore-errors
# fmt: off
import numpy as np

from fresnel.render.kernels.bins import AHEAD, fill, sort
from fresnel.render.kernels.composite import composite, composite_backward, run_of
from fresnel.render.kernels.project import TILE, project, project_backward
from fresnel.render.kernels.tasks import BAD, TOTAL, array_at, doubles, floats, inline, kernel, wait


@inline
def shape_of(images, C, N, chunk_size, width, height):
    """The numbers that all stages share."""
    chunks = max(1, (N + chunk_size - 1) // chunk_size)
    tiles_x, tiles_y = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    return images, C, N, chunks, chunk_size, width, height, tiles_x, tiles_x * tiles_y


@inline
def ends(shape):
    """Where the parts of a pass's memory end, in doubles; each takes whole cache lines."""
    images, _, N, chunks, _, _, _, _, tiles = shape
    each = images * N + 7 & -8
    keys = 11 * each
    cameras = keys + each + 24 * images
    chunk_table = cameras + 8 * images * chunks
    starts = chunk_table + (images * tiles + 8 & -8)
    tile_counts = starts + (images * chunks * tiles + 15) // 16 * 8
    records, others = 8 * each, keys + each
    return (
        records, records + each, records + 2 * each, keys, others, cameras, chunk_table, starts,
        tile_counts,
    )


@inline
def parts_of(address, shape):
    """A pass's memory, cut up: see `project` and `sort` for what stands where."""
    images, _, N, chunks, _, _, _, _, tiles = shape
    e, each = ends(shape), images * N
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
def lists_of(address, capacity, shape):
    """What follows these parts, 10 bytes an entry: its Gaussian, its slot, the blocks touched."""
    entry_ids = address + 8 * ends(shape)[8]
    slots = entry_ids + 4 * (capacity + AHEAD)
    return (
        array_at(entry_ids, capacity + AHEAD, np.int32), array_at(slots, capacity, np.int32),
        array_at(slots + 4 * capacity, capacity, np.uint16),
    )


def memory_size(images: int, N: int, chunk_size: int, tiles: int, capacity: int) -> tuple[int, int]:
    """Doubles that a pass's memory takes, before its lists and with lists of `capacity` entries."""
    chunks = max(1, -(-N // chunk_size))
    fixed = ends.py_func((images, 0, N, chunks, 0, 0, 0, 0, tiles))[8]
    return fixed, fixed + (10 * capacity + 4 * AHEAD + 7) // 8


@inline
def scene_of(means, quats, scales, opacities, colors, sh, count):
    """Arrays of `count` Gaussians at five addresses; of `sh` coefficients, or 0 for colours."""
    return (
        floats(means, 3 * count), floats(quats, 4 * count), floats(scales, 3 * count),
        floats(opacities, count), floats(colors, 3 * max(sh, 1) * count),
    )


@inline
def images_of(rgb, alpha, depth, pixels):
    return floats(rgb, 3 * pixels), floats(alpha, pixels), floats(depth, pixels)


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
    shape = shape_of(images, C, N, chunk_size, width, height)
    chunks, tiles = shape[3], shape[8]
    parts = parts_of(memory, shape)
    if not again:
        scene = scene_of(means, quats, scales, opacities, colors, sh, images // max(C, 1) * N)
        poses = doubles(viewmats, 16 * images), doubles(Ks, 9 * images)
        project(progress, 0, scene, sh, poses, near, eps2d, shape, parts)
        wait(progress, 0, images * chunks)
        if progress[BAD] != 0:
            return
        sort(progress, 1, shape, parts)
        wait(progress, 1, images)
        if progress[TOTAL] > capacity:
            return
    lists = lists_of(memory, capacity, shape)
    fill(progress, 2, bands, shape, parts, lists)
    wait(progress, 2, images * bands)
    pictures = images_of(rgb, alpha, depth, images * width * height)
    composite(progress, 3, shape, parts, lists, floats(background, 3 * images), pictures)
    wait(progress, 3, (images * tiles + run_of(tiles) - 1) // run_of(tiles))


@kernel
def backward(
    progress, means, quats, scales, opacities, colors, sh, background, scenes, C, N, chunk_size,
    width, height, eps2d, memory, capacity, rgb, alpha, depth,
    v_rgb, v_alpha, v_depth, of_rgb, of_alpha, of_depth, sums, total,
    v_means, v_quats, v_scales, v_opacities, v_colors,
):
    """Gradients of images to gradients of Gaussians; `sums` is room for 16 floats an entry."""
    images = scenes * C
    shape = shape_of(images, C, N, chunk_size, width, height)
    chunks, tiles, pixels = shape[3], shape[8], images * width * height
    parts, lists = parts_of(memory, shape), lists_of(memory, capacity, shape)
    entry_sums = floats(sums, 16 * total)
    composite_backward(
        progress, 0, shape, parts, lists, floats(background, 3 * images),
        images_of(rgb, alpha, depth, pixels), images_of(v_rgb, v_alpha, v_depth, pixels),
        (of_rgb, of_alpha, of_depth), entry_sums,
    )
    wait(progress, 0, (images * tiles + run_of(tiles) - 1) // run_of(tiles))
    scene = scene_of(means, quats, scales, opacities, colors, sh, scenes * N)
    slopes = scene_of(v_means, v_quats, v_scales, v_opacities, v_colors, sh, scenes * N)
    project_backward(progress, 1, scenes, scene, sh, eps2d, shape, parts, lists, entry_sums, slopes)
    wait(progress, 1, scenes * chunks)
