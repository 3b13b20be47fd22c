"""Images of the CPU rasteriser: composite each tile's records, and gradients back.

No result depends on which thread claimed what: a tile belongs to one thread, and a Gaussian's
gradient is written entry by entry and summed later, in their order.
"""

# Numba compiles this file, mypy cannot follow it: every value is typed by the compiler.
# mypy: ignore-errors
# One line for one equation reads better than one line for one argument.
# fmt: off
import math

import numpy as np
from numba import literal_unroll

from fresnel.render.kernels.bins import AHEAD
from fresnel.render.kernels.project import TILE
from fresnel.render.kernels.simd import (
    absolute,
    deinterleave,
    exp2,
    fma,
    fnma,
    horizontal_sums,
    interleave,
    lanes,
    load,
    lowest_bit,
    maximum,
    minimum,
    prefetch,
    select,
    splat,
    store,
    swap_quads,
)
from fresnel.render.kernels.tasks import aligned, claim, finish, inline, stage

BATCH = 64  # entries of a tile looked at together
CUT = np.float32(math.log2(1 / 255))  # contributions below one 8-bit step are skipped
STOP = np.float32(1e-4)  # a pixel is finished before its transmittance would fall to this
ALPHA_MAX = np.float32(0.999)  # of one Gaussian at one pixel
CLAMP = np.float32(math.log2(ALPHA_MAX))
_F0, _F1 = np.float32(0), np.float32(1)

# Lane i of a block is its pixel (i % 4, i // 4); block j of a tile starts at 4 * (j % 4, j // 4).
_LANE_X = np.array([i % 4 for i in range(16)], np.float32)
_LANE_Y = np.array([i // 4 for i in range(16)], np.float32)
_MIDDLE_X, _MIDDLE_Y = 4 * _LANE_X + np.float32(1.5), 4 * _LANE_Y + np.float32(1.5)


@inline
def place(records, r, left, top, middle_x, middle_y):
    """A record as a tile sees it: u and v in the middles of its blocks, their slopes, a slack.

    The slack is how far float32 may be off at the far ends of long needles.
    """
    dx, dy = left + 0.5 - records[8 * r], top + 0.5 - records[8 * r + 1]
    l11, l12, l22 = records[8 * r + 2], records[8 * r + 3], records[8 * r + 4]
    across, down = l11 * dx, l12 * dy
    a, b, c = np.float32(l11), np.float32(l12), np.float32(l22)
    u = fma(middle_x, a, fma(middle_y, b, np.float32(across + down)))
    v = fma(middle_y, c, np.float32(l22 * dy))
    return u, v, a, b, c, np.float32(1e-6) * np.float32(abs(across) + abs(down))


@inline
def blocks_within(u, v, a, b, c, slack, limit):
    """Which of a tile's 16 blocks hold a point with u^2 + v^2 <= limit: one bit each, exact.

    Within a block of half width h the least |u| for a given y is max(0, |u(middle)| - h a). The
    minimum of the convex (that)^2 + v^2 over y is where the nearest vertical edge's own minimum
    is, clamped to the block (StopThePop, arXiv 2402.00525, appendix B).
    """
    half = np.float32(1.5) * a + slack + np.float32(1e-3)
    # Along y: u + b t and v + c t with |t| <= 1.5; v is 0 at t = -v / c.
    inverse = _F1 / c
    axis = fnma(v, b * inverse, u)
    edge = maximum(absolute(axis) - half, _F0)
    edge = select(axis < _F0, -edge, edge)
    best = fma(edge, b / (b * b + c * c), v * inverse)
    t = minimum(maximum(-best, np.float32(-1.5)), np.float32(1.5))
    near_u = maximum(absolute(fma(t, b, u)) - half, _F0)
    near_v = fma(t, c, v)
    return lanes(fma(near_u, near_u, near_v * near_v) <= limit + np.float32(1e-3))


@inline
def run_of(tiles):
    """Tiles in a task: tiles that touch share cache lines, so one thread takes a few."""
    return max(1, tiles // 64)


@inline
def next_tile(progress, number, tile, last, shape):
    """The next tile of this thread: it, the end of its task, its image, left and top in pixels.

    Reports a task that is through and claims another; there is none when the end is not beyond it.
    """
    images, tiles_x, tiles = shape[0], shape[7], shape[8]
    if tile == last:
        if last > 0:
            finish(progress, number, 1)
        tile = claim(progress, number) * run_of(tiles)
        last = min(tile + run_of(tiles), images * tiles)
    column, row = tile % tiles % tiles_x, tile % tiles // tiles_x
    return tile, last, tile // tiles, column * TILE, row * TILE


@inline
def blend(state, at, u, v, log2_opacity):
    """Put one Gaussian over a block whose transmittance is in `state`, and say what became of it.

    Returns which of its pixels it reaches and which of them are not finished, log2 of the opacity
    before the clamp, the opacity, the transmittance before, and the weight.
    """
    power = fnma(v, v, fnma(u, u, log2_opacity))
    seen = power >= CUT
    opaque = select(seen, minimum(exp2(power), ALPHA_MAX), _F0)
    before = load(state, at)
    weight = opaque * before
    after = before - weight
    live = after > STOP
    # A finished pixel keeps its transmittance with a minus sign.
    store(state, at, select(live, after, -absolute(before)))
    return seen, live, power, opaque, before, select(live, weight, _F0)


@stage
def composite(progress, number, shape, parts, lists, background, pictures):
    """Blend every tile's Gaussians front to back. A task is a run of tiles.

    Notes in `touched` which blocks an entry reached, for the backward pass. The entries are
    taken in batches, first to find which blocks each may reach, then to blend: a processor that
    already knows how often the inner loop runs does not guess wrong.
    """
    records, records32, _, _, _, _, _, _, starts, _ = parts
    entry_ids, _, touched = lists
    lane_x, lane_y = load(_LANE_X, 0) - np.float32(1.5), load(_LANE_Y, 0) - np.float32(1.5)
    middle_x, middle_y = load(_MIDDLE_X, 0), load(_MIDDLE_Y, 0)
    state = aligned(6 * 256)  # transmittance, weight, r, g, b, depth of each block
    places, slopes = aligned(BATCH * 32), np.empty(BATCH * 3, np.float32)
    reach = np.empty(BATCH, np.int64)
    tile = last = 0
    while True:
        tile, last, image, left, top = next_tile(progress, number, tile, last, shape)
        if tile >= last:
            break
        start, end = starts[tile], starts[tile + 1]
        tile += 1
        alive = open_tile(state, left, top, shape)
        while start < end and alive:
            size = min(BATCH, end - start)
            for i in range(size):
                prefetch(records, 8 * entry_ids[start + i + AHEAD])
                r = entry_ids[start + i]
                u, v, a, b, c, slack = place(records, r, left, top, middle_x, middle_y)
                limit = records32[16 * r + 10] - CUT
                reach[i] = blocks_within(u, v, a, b, c, slack, limit)
                store(places, 32 * i, (u, v))
                slopes[3 * i], slopes[3 * i + 1], slopes[3 * i + 2] = a, b, c
            for i in range(size):
                blocks = reach[i] & alive
                if blocks == 0:
                    touched[start + i] = 0
                    continue
                r = entry_ids[start + i]
                a, b, c = slopes[3 * i], slopes[3 * i + 1], slopes[3 * i + 2]
                u0, v0 = fma(lane_x, a, lane_y * b), lane_y * c
                log2_opacity = splat(records32[16 * r + 10])
                red, green = splat(records32[16 * r + 11]), splat(records32[16 * r + 12])
                blue, z = splat(records32[16 * r + 13]), splat(records32[16 * r + 14])
                reached = 0
                while blocks:
                    j = lowest_bit(blocks)
                    blocks &= blocks - 1
                    u, v = u0 + places[32 * i + j], v0 + places[32 * i + 16 + j]
                    seen, live, _, _, _, weight = blend(state, 96 * j, u, v, log2_opacity)
                    reached |= np.int64(lanes(seen) != 0) << j
                    store(state, 96 * j + 16, load(state, 96 * j + 16) + weight)
                    store(state, 96 * j + 32, fma(weight, red, load(state, 96 * j + 32)))
                    store(state, 96 * j + 48, fma(weight, green, load(state, 96 * j + 48)))
                    store(state, 96 * j + 64, fma(weight, blue, load(state, 96 * j + 64)))
                    store(state, 96 * j + 80, fma(weight, z, load(state, 96 * j + 80)))
                    if lanes(live) == 0:
                        alive &= ~(1 << j)
                touched[start + i] = reached
            start += size
        for e in range(start, end):  # behind all that can be seen
            touched[e] = 0
        close_tile(state, left, top, image, shape, background, pictures)


@inline
def open_tile(state, left, top, shape):
    """Clear a tile's state; pixels outside the image start finished. Returns the live blocks."""
    lane_x, lane_y, width, height = load(_LANE_X, 0), load(_LANE_Y, 0), shape[5], shape[6]
    alive = 0
    for j in range(16):
        x, y = np.float32(left + 4 * (j & 3)), np.float32(top + (j & 12))
        inside = (lane_x + x < np.float32(width)) & (lane_y + y < np.float32(height))
        alive |= np.int64(lanes(inside) != 0) << j
        zero = splat(_F0)
        store(state, 96 * j, (select(inside, splat(_F1), -_F1), zero, zero, zero, zero, zero))
    return alive


@inline
def close_tile(state, left, top, image, shape, background, pictures):
    """Put a finished tile on its background and write its pixels."""
    rgb, alpha, depth = pictures
    width, height = shape[5], shape[6]
    for j in range(16):
        weight = load(state, 96 * j + 16)
        remaining = _F1 - weight
        for channel in range(3):
            at = 96 * j + 32 + 16 * channel
            store(state, at, fma(remaining, background[3 * image + channel], load(state, at)))
        expected = load(state, 96 * j + 80) / select(weight > _F0, weight, _F1)
        store(state, 96 * j + 80, expected)
    if left + TILE <= width and top + TILE <= height:
        for blocks in range(4):
            pixel = (image * height + top + 4 * blocks) * width + left
            weights = four_blocks(state, 96, blocks, 16)
            reds, greens = four_blocks(state, 96, blocks, 32), four_blocks(state, 96, blocks, 48)
            blues, depths = four_blocks(state, 96, blocks, 64), four_blocks(state, 96, blocks, 80)
            for row in literal_unroll((0, 1, 2, 3)):
                store(alpha, pixel, weights[row])
                store(depth, pixel, depths[row])
                store(rgb, 3 * pixel, interleave(reds[row], greens[row], blues[row]))
                pixel += width
        return
    for j in range(16):
        x, y = left + 4 * (j & 3), top + (j & 12)
        columns = min(4, width - x)
        for row in range(min(4, height - y)):
            pixel = (image * height + y + row) * width + x
            for column in range(columns):
                i = 96 * j + 4 * row + column
                alpha[pixel + column] = state[i + 16]
                depth[pixel + column] = state[i + 80]
                rgb[3 * (pixel + column)] = state[i + 32]
                rgb[3 * (pixel + column) + 1] = state[i + 48]
                rgb[3 * (pixel + column) + 2] = state[i + 64]


@inline
def four_blocks(state, stride, blocks, field):
    """A field of the four blocks side by side, as their four rows of 16 pixels."""
    at = 4 * blocks * stride + field
    first, second = load(state, at), load(state, at + stride)
    return swap_quads(first, second, load(state, at + 2 * stride), load(state, at + 3 * stride))


@stage
def composite_backward(
    progress, number, shape, parts, lists, background, pictures, v_pictures, strides, sums
):
    """Gradients of the images with respect to every entry's record. A task is a run of tiles.

    With w_i = T_i alpha_i and s_i = dLoss/dw_i (linear in the colour and depth of Gaussian i),

        dLoss/dalpha_i = T_i s_i - sum_{j > i} w_j s_j / (1 - alpha_i).

    The sum over all j is known from the images, so this goes front to back like the forward pass:
    the same transmittances to the last bit, and no division to undo them.

    Writes to the 16 `sums` of an entry, over the tile's pixels, with g = alpha_i dLoss/dalpha_i:
    g, g u, g v, g u u, g u v, g v v, and the gradients of r, g, b and z.
    """
    records, records32, _, _, _, _, _, _, starts, _ = parts
    entry_ids, _, touched = lists
    lane_x, lane_y = load(_LANE_X, 0) - np.float32(1.5), load(_LANE_Y, 0) - np.float32(1.5)
    middle_x, middle_y = load(_MIDDLE_X, 0), load(_MIDDLE_Y, 0)
    # transmittance, remainder, slopes: r, g, b, z, constant; and room for four rows of the image
    state = aligned(7 * 256 + 4 * 96)
    places = aligned(32)
    zero = splat(_F0)
    tile = last = 0
    while True:
        tile, last, image, left, top = next_tile(progress, number, tile, last, shape)
        if tile >= last:
            break
        start, end = starts[tile], starts[tile + 1]
        tile += 1
        if start < end:
            open_gradients(
                state, left, top, image, shape, background, pictures, v_pictures, strides
            )
        for e in range(start, end):
            prefetch(records, 8 * entry_ids[e + AHEAD])
            blocks = np.int64(touched[e])
            if blocks == 0:
                continue
            r = entry_ids[e]
            u, v, a, b, c, _ = place(records, r, left, top, middle_x, middle_y)
            store(places, 0, (u, v))
            u0, v0 = fma(lane_x, a, lane_y * b), lane_y * c
            log2_opacity = splat(records32[16 * r + 10])
            red, green = splat(records32[16 * r + 11]), splat(records32[16 * r + 12])
            blue, z = splat(records32[16 * r + 13]), splat(records32[16 * r + 14])
            s, su, sv, suu, suv, svv = zero, zero, zero, zero, zero, zero
            s_red, s_green, s_blue, s_z = zero, zero, zero, zero
            while blocks:
                j = lowest_bit(blocks)
                blocks &= blocks - 1
                u, v = u0 + places[j], v0 + places[16 + j]
                _, live, power, opaque, before, weight = blend(state, 112 * j, u, v, log2_opacity)
                v_red, v_green = load(state, 112 * j + 32), load(state, 112 * j + 48)
                v_blue, v_z = load(state, 112 * j + 64), load(state, 112 * j + 80)
                shade = fma(v_z, z, load(state, 112 * j + 96))
                shade = fma(v_red, red, fma(v_green, green, fma(v_blue, blue, shade)))
                remainder = fnma(weight, shade, load(state, 112 * j + 16))
                store(state, 112 * j + 16, remainder)
                slope = fma(before, shade, -remainder / (_F1 - opaque))
                g = select(live & (power <= CLAMP), opaque * slope, _F0)
                gu, gv = g * u, g * v
                s, su, sv = s + g, su + gu, sv + gv
                suu, suv, svv = fma(gu, u, suu), fma(gu, v, suv), fma(gv, v, svv)
                s_red, s_green = fma(weight, v_red, s_red), fma(weight, v_green, s_green)
                s_blue, s_z = fma(weight, v_blue, s_blue), fma(weight, v_z, s_z)
            fields = s, su, sv, suu, suv, svv, s_red, s_green, s_blue, s_z
            store(sums, 16 * e, horizontal_sums(fields))


@inline
def open_gradients(state, left, top, image, shape, background, pictures, v_pictures, strides):
    """Set up a tile's state for the backward pass from the images and their gradients.

    `strides` are 1 for gradients as large as their image, 0 for those that are a few zeros.
    """
    width, height = shape[5], shape[6]
    rgb, alpha, depth = pictures
    v_rgb, v_alpha, v_depth = v_pictures
    of_rgb, of_alpha, of_depth = strides
    behind_red, behind_green = background[3 * image], background[3 * image + 1]
    behind_blue = background[3 * image + 2]
    if left + TILE <= width and top + TILE <= height:
        rows = 7 * 256
        for j in range(16):
            pixel = (image * height + top + j) * width + left
            red, green, blue = deinterleave(
                load(rgb, 3 * pixel), load(rgb, 3 * pixel + 16), load(rgb, 3 * pixel + 32)
            )
            v_red, v_green, v_blue = deinterleave(
                load(v_rgb, 3 * pixel * of_rgb), load(v_rgb, (3 * pixel + 16) * of_rgb),
                load(v_rgb, (3 * pixel + 32) * of_rgb),
            )
            weight, slope = load(alpha, pixel), load(v_alpha, pixel * of_alpha)
            remainder = fma(v_red, red - behind_red, weight * slope)
            remainder = fma(v_green, green - behind_green, remainder)
            remainder = fma(v_blue, blue - behind_blue, remainder)
            slope = fnma(v_red, behind_red, fnma(v_green, behind_green, slope))
            v_z = load(v_depth, pixel * of_depth) / maximum(weight, np.float32(1e-30))
            constant = fnma(v_z, load(depth, pixel), fnma(v_blue, behind_blue, slope))
            fields = remainder, v_red, v_green, v_blue, v_z, constant
            store(state, rows + 96 * (j & 3), fields)
            if j & 3 == 3:
                for field in range(6):
                    quads = four_blocks(state, 96, 0, rows + 16 * field)
                    to = 112 * (j - 3) + 16 * field + 16
                    store(state, to, quads[0])
                    store(state, to + 112, quads[1])
                    store(state, to + 224, quads[2])
                    store(state, to + 336, quads[3])
            store(state, 112 * j, splat(_F1))
        return
    for j in range(16):
        at, x, y = 112 * j, left + 4 * (j & 3), top + (j & 12)
        for field in range(7):
            store(state, at + 16 * field, splat(-_F1 if field == 0 else _F0))
        columns = min(4, width - x)
        for row in range(min(4, height - y)):
            for column in range(columns):
                i = at + 4 * row + column
                pixel = (image * height + y + row) * width + x + column
                weight, slope = alpha[pixel], v_alpha[pixel * of_alpha]
                remainder = weight * slope
                for channel in range(3):
                    v = v_rgb[(3 * pixel + channel) * of_rgb]
                    behind = background[3 * image + channel]
                    state[i + 32 + 16 * channel] = v
                    slope -= v * behind
                    remainder += v * (rgb[3 * pixel + channel] - behind)
                v_z = v_depth[pixel * of_depth] / max(weight, np.float32(1e-30))
                state[i] = _F1
                state[i + 16] = remainder
                state[i + 80] = v_z
                state[i + 96] = slope - v_z * depth[pixel]
