"""The loops of the CPU rasteriser: project, sort, bin, composite, and their gradients.

Each kernel is run by any number of threads at once; they share the work by claiming tasks from an
atomic counter, and no result depends on who claimed what. Positions are float64 until they are
relative to a tile, the compositing is float32.

A projected Gaussian is a record of 64 bytes. With d = pixel - mean and L the Cholesky factor of the
inverse covariance, scaled so that exp(-d^T Sigma^-1 d / 2) = 2^-(u^2 + v^2), (u, v) = L d:

    float64  0: mean x   1: mean y   2: L11   3: L12   4: L22
    float32 10: log2 opacity   11..13: r, g, b   14: z-depth   15: opacity
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math

import numpy as np

from fresnel.render._simd import (
    absolute, ceiling, claim, exp2, floor, fma, fnma, horizontal_sums, inline, kernel, lanes, load,
    load_1,
    load_3, load_4, lowest_bit, maximum, minimum, prefetch, root, select, splat, split_exponent, store,
)  # fmt: skip

TILE = 16  # pixels; a tile is 4 x 4 blocks of 4 x 4 pixels, and a block is one vector
CHUNK = 4096  # Gaussians projected as one task
BATCH = 64  # entries of a tile looked at together
AHEAD = 8  # entries between the one at work and the one being fetched from memory
CUT = np.float32(math.log2(1 / 255))  # contributions below one 8-bit step are skipped
STOP = np.float32(1e-4)  # a pixel is finished before its transmittance would fall to this
_KAPPA = math.sqrt(0.5 / math.log(2.0))
_LOG2_255 = math.log2(255.0)
_LN2 = math.log(2.0)
_F0, _F1 = np.float32(0), np.float32(1)

# Lane i of a block is its pixel (i % 4, i // 4); block j of a tile starts at 4 * (j % 4, j // 4).
_LANE_X = np.array([i % 4 for i in range(16)], np.float32)
_LANE_Y = np.array([i // 4 for i in range(16)], np.float32)
_MIDDLE_X, _MIDDLE_Y = 4 * _LANE_X + np.float32(1.5), 4 * _LANE_Y + np.float32(1.5)


@inline
def aligned(floats):
    """Uninitialised float32 memory that starts at a cache line: vectors never straddle two."""
    memory = np.empty(floats + 16, np.float32)
    skip = (-memory.ctypes.data // 4) % 16
    return memory[skip : skip + floats]


@inline
def log2_of(x):
    """log2 of 8 positive doubles: with s = (m - 1) / (m + 1), ln m = 2 (s + s^3/3 + s^5/5 + ...)."""
    m, e = split_exponent(x)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    high = fma(fma(t, 1 / 13, 1 / 11), t, 1 / 9)
    series = fma(fma(fma(fma(high, t, 1 / 7), t, 1 / 5), t, 1 / 3), t, 1.0)
    return fma(series * s, 2.0 / math.log(2.0), e)


@inline
def rotation_of(qw, qx, qy, qz):
    """Rotation matrix, row by row, and 1 / |q|."""
    square = fma(qw, qw, fma(qx, qx, fma(qy, qy, qz * qz)))
    inverse = 1.0 / maximum(root(square), 1e-12)
    w, x, y, z = qw * inverse, qx * inverse, qy * inverse, qz * inverse
    x2, y2, z2 = x + x, y + y, z + z
    return (
        1.0 - fma(y, y2, z * z2), x * y2 - w * z2, fma(x, z2, w * y2),
        fma(x, y2, w * z2), 1.0 - fma(x, x2, z * z2), y * z2 - w * x2,
        x * z2 - w * y2, fma(y, z2, w * x2), 1.0 - fma(x, x2, y * y2),
        w, x, y, z, inverse,
    )  # fmt: skip


@inline
def camera_of(cameras, image):
    """The 21 numbers of a camera, see `cpu._camera_rows`."""
    c = cameras[image]
    return (
        c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11],
        c[12], c[13], c[14], c[15], c[16], c[17], c[18], c[19],
    )  # fmt: skip


@kernel
def project(
    counter, means, quats, scales, opacities, colors, sh, cameras, C, N, width, height,
    near, far, eps2d, records, records32, boxes, firsts, visible, counts, entries, bad,
):  # fmt: skip
    """Project every Gaussian into every image. One task is one chunk of one image.

    Writes the record, the range of tiles (x0, y0, x1, y1) and the first slot within the chunk of
    every Gaussian that can touch a pixel; an empty range for all others; per chunk the list of
    visible Gaussians and the number of (Gaussian, tile) entries. Sets `bad` for values not finite.
    """
    chunks = (N + CHUNK - 1) // CHUNK
    scratch = np.empty(13 * 8, np.float64)
    tiles_x, tiles_y = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    while True:
        task = claim(counter)
        if task >= counts.size:
            break
        image, chunk = task // chunks, task % chunks
        scene = image // C
        (
            w00, w01, w02, t0, w10, w11, w12, t1, w20, w21, w22, t2,
            fx, fy, cx, cy, low_x, high_x, low_y, high_y,
        ) = camera_of(cameras, image)  # fmt: skip
        found, slots = 0, 0
        for g0 in range(chunk * CHUNK, min(N, (chunk + 1) * CHUNK), 8):
            count = min(8, N - g0)
            s = scene * N + g0
            mx, my, mz = load_3(means, s, count)
            qw, qx, qy, qz = load_4(quats, s, count)
            sx, sy, sz = load_3(scales, s, count)
            (opacity,) = load_1(opacities, s, count)
            # Not finite minus itself is NaN, and a sum with NaN stays NaN.
            total = mx + my + mz + qw + qx + qy + qz + sx + sy + sz + opacity
            if sh == 0:
                red, green, blue = load_3(colors, s, count)
                total = total + red + green + blue
            total = total - total
            if lanes(total >= 0.0) != 255:
                bad[0] = 1
            # camera frame
            x = fma(mx, w00, fma(my, w01, fma(mz, w02, t0)))
            y = fma(mx, w10, fma(my, w11, fma(mz, w12, t1)))
            z = fma(mx, w20, fma(my, w21, fma(mz, w22, t2)))
            seen = (z >= near) & (z <= far) & (opacity >= 1 / 255)
            if lanes(seen) == 0:
                for k in range(count):
                    boxes[4 * (image * N + g0 + k) + 2] = 0
                    boxes[4 * (image * N + g0 + k)] = 0
                continue
            # P = J W R S, so that the projected covariance is P P^T
            r00, r01, r02, r10, r11, r12, r20, r21, r22, _, _, _, _, _ = rotation_of(qw, qx, qy, qz)
            inverse = 1.0 / z
            slope_x, slope_y = x * inverse, y * inverse
            jx, jy = inverse * fx, inverse * fy
            ex = -minimum(maximum(slope_x, low_x), high_x) * jx
            ey = -minimum(maximum(slope_y, low_y), high_y) * jy
            a0, a1, a2 = fma(jx, w00, ex * w20), fma(jx, w01, ex * w21), fma(jx, w02, ex * w22)
            b0, b1, b2 = fma(jy, w10, ey * w20), fma(jy, w11, ey * w21), fma(jy, w12, ey * w22)
            p00 = fma(a0, r00, fma(a1, r10, a2 * r20)) * sx
            p01 = fma(a0, r01, fma(a1, r11, a2 * r21)) * sy
            p02 = fma(a0, r02, fma(a1, r12, a2 * r22)) * sz
            p10 = fma(b0, r00, fma(b1, r10, b2 * r20)) * sx
            p11 = fma(b0, r01, fma(b1, r11, b2 * r21)) * sy
            p12 = fma(b0, r02, fma(b1, r12, b2 * r22)) * sz
            a = fma(p00, p00, fma(p01, p01, fma(p02, p02, eps2d)))
            b = fma(p00, p10, fma(p01, p11, p02 * p12))
            c = fma(p10, p10, fma(p11, p11, fma(p12, p12, eps2d)))
            determinant = fnma(b, b, a * c)
            u = fma(slope_x, fx, cx)
            v = fma(slope_y, fy, cy)
            # Farther out than this many standard deviations opacity falls below 1/255.
            log2_opacity = log2_of(maximum(opacity, 1e-30))
            reach = root(maximum((log2_opacity + _LOG2_255) * (2 * math.log(2.0)), 0.0)) + 1e-6
            reach_x, reach_y = reach * root(a), reach * root(c)
            # pixels whose centres lie within reach, then tiles; the clamps keep integers in range
            limit_x, limit_y = float(width), float(height)
            x0 = maximum(ceiling(u - reach_x - 0.5), 0.0)
            y0 = maximum(ceiling(v - reach_y - 0.5), 0.0)
            x1 = minimum(floor(u + reach_x + 0.5), limit_x)
            y1 = minimum(floor(v + reach_y + 0.5), limit_y)
            seen = seen & (determinant > 0.0) & (x0 < x1) & (y0 < y1)
            bits = lanes(seen)
            l11 = root(c / determinant) * _KAPPA
            store(scratch, 0, u)
            store(scratch, 8, v)
            store(scratch, 16, l11)
            store(scratch, 24, -b / c * l11)
            store(scratch, 32, _KAPPA / root(c))
            store(scratch, 40, log2_opacity)
            store(scratch, 48, z)
            store(scratch, 56, opacity)
            store(scratch, 64, x0)
            store(scratch, 72, y0)
            store(scratch, 80, x1)
            store(scratch, 88, y1)
            for k in range(count):
                g = image * N + g0 + k
                if (bits >> k) & 1 == 0:
                    boxes[4 * g] = 0
                    boxes[4 * g + 2] = 0
                    continue
                for field in range(5):
                    records[8 * g + field] = scratch[8 * field + k]
                records32[16 * g + 10] = scratch[40 + k]
                records32[16 * g + 14] = scratch[48 + k]
                records32[16 * g + 15] = scratch[56 + k]
                if sh == 0:
                    for channel in range(3):
                        records32[16 * g + 11 + channel] = colors[3 * (s + k) + channel]
                else:
                    shade(means, colors, sh, cameras, image, s + k, records32, 16 * g + 11, bad)
                bx0, by0 = int(scratch[64 + k]) // TILE, int(scratch[72 + k]) // TILE
                bx1 = (int(scratch[80 + k]) + TILE - 1) // TILE
                by1 = (int(scratch[88 + k]) + TILE - 1) // TILE
                boxes[4 * g], boxes[4 * g + 1] = bx0, by0
                boxes[4 * g + 2], boxes[4 * g + 3] = bx1, by1
                firsts[g] = slots
                slots += (bx1 - bx0) * (by1 - by0)
                visible[image * N + chunk * CHUNK + found] = g0 + k
                found += 1
        counts[task] = found
        entries[task] = slots


@inline
def sh_basis(x, y, z, sh, basis):
    """Real spherical harmonics at a unit direction, `sh` of them, in 3DGS's order."""
    basis[0] = 0.28209479177387814
    if sh > 1:
        basis[1], basis[2], basis[3] = (
            -0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x,
        )  # fmt: skip
    if sh > 4:
        basis[4] = 1.0925484305920792 * x * y
        basis[5] = -1.0925484305920792 * y * z
        basis[6] = 0.31539156525252005 * (3 * z * z - 1)
        basis[7] = -1.0925484305920792 * x * z
        basis[8] = 0.5462742152960396 * (x * x - y * y)
    if sh > 9:
        basis[9] = -0.5900435899266435 * y * (3 * x * x - y * y)
        basis[10] = 2.890611442640554 * x * y * z
        basis[11] = -0.4570457994644658 * y * (5 * z * z - 1)
        basis[12] = 0.3731763325901154 * z * (5 * z * z - 3)
        basis[13] = -0.4570457994644658 * x * (5 * z * z - 1)
        basis[14] = 1.445305721320277 * z * (x * x - y * y)
        basis[15] = -0.5900435899266435 * x * (x * x - 3 * y * y)


@inline
def sh_slopes(x, y, z, sh, k, slopes):
    """Derivatives of basis function k with respect to x, y and z (taken as independent)."""
    dx, dy, dz = 0.0, 0.0, 0.0
    if k == 1:
        dy = -0.4886025119029199
    elif k == 2:
        dz = 0.4886025119029199
    elif k == 3:
        dx = -0.4886025119029199
    elif k == 4:
        dx, dy = 1.0925484305920792 * y, 1.0925484305920792 * x
    elif k == 5:
        dy, dz = -1.0925484305920792 * z, -1.0925484305920792 * y
    elif k == 6:
        dz = 0.31539156525252005 * 6 * z
    elif k == 7:
        dx, dz = -1.0925484305920792 * z, -1.0925484305920792 * x
    elif k == 8:
        dx, dy = 1.0925484305920792 * x, -1.0925484305920792 * y
    elif k == 9:
        dx = -0.5900435899266435 * 6 * x * y
        dy = -0.5900435899266435 * 3 * (x * x - y * y)
    elif k == 10:
        dx, dy, dz = 2.890611442640554 * y * z, 2.890611442640554 * x * z, 2.890611442640554 * x * y
    elif k == 11:
        dy = -0.4570457994644658 * (5 * z * z - 1)
        dz = -0.4570457994644658 * 10 * y * z
    elif k == 12:
        dz = 0.3731763325901154 * (15 * z * z - 3)
    elif k == 13:
        dx = -0.4570457994644658 * (5 * z * z - 1)
        dz = -0.4570457994644658 * 10 * x * z
    elif k == 14:
        dx, dy = 2.890611442640554 * x * z, -2.890611442640554 * y * z
        dz = 1.445305721320277 * (x * x - y * y)
    elif k == 15:
        dx = -0.5900435899266435 * 3 * (x * x - y * y)
        dy = 0.5900435899266435 * 6 * x * y
    slopes[0], slopes[1], slopes[2] = dx, dy, dz


@inline
def direction_of(means, cameras, image, s):
    """Unit vector from the camera to Gaussian s, and one over the distance."""
    c = cameras[image]
    dx = means[3 * s] - c[20]
    dy = means[3 * s + 1] - c[21]
    dz = means[3 * s + 2] - c[22]
    inverse = 1.0 / max(math.sqrt(dx * dx + dy * dy + dz * dz), 1e-12)
    return dx * inverse, dy * inverse, dz * inverse, inverse


@inline
def shade(means, colors, sh, cameras, image, s, out, at, bad):
    """Colour of Gaussian s from its spherical harmonics: max(0, 0.5 + sum c Y)."""
    basis = np.empty(16, np.float64)
    x, y, z, _ = direction_of(means, cameras, image, s)
    sh_basis(x, y, z, sh, basis)
    for channel in range(3):
        value = 0.5
        for k in range(sh):
            value += basis[k] * colors[3 * (sh * s + k) + channel]
        if not math.isfinite(value):
            bad[0] = 1
        out[at + channel] = max(value, 0.0)


@kernel
def sort_and_bin(
    counter, images, N, tiles_x, tiles, records32, boxes, firsts, visible, counts, entries,
    starts, entry_ids, entry_slots,
):  # fmt: skip
    """Sort each image's visible Gaussians by depth and list them, front to back, for every tile.

    One task is one image. `starts[image * tiles + tile]` is where the tile's list begins.
    A radix sort on the bits of the float32 depth (positive, so they order as the floats do);
    stable, so equal depths keep the order of the Gaussians, as in gsplat.
    """
    chunks = (N + CHUNK - 1) // CHUNK
    keys = np.empty(N, np.uint64)
    other = np.empty(N, np.uint64)
    histogram = np.empty(3 * 2048, np.int64)
    fill = np.empty(tiles, np.int64)
    depths = records32.view(np.uint32)
    while True:
        image = claim(counter)
        if image >= images:
            break
        base = 0  # of this image's entries among all
        for task in range(image * chunks):
            base += entries[task]
        n = 0
        slot = base
        histogram[:] = 0
        fill[:] = 0
        for chunk in range(chunks):
            first = image * N + chunk * CHUNK
            for i in range(counts[image * chunks + chunk]):
                g = visible[first + i]
                r = image * N + g
                key = np.uint64(depths[16 * r + 14])
                keys[n] = (key << np.uint64(32)) | np.uint64(g)
                n += 1
                histogram[np.int64(key & np.uint64(2047))] += 1
                histogram[2048 + np.int64((key >> np.uint64(11)) & np.uint64(2047))] += 1
                histogram[4096 + np.int64(key >> np.uint64(22))] += 1
                firsts[r] += slot
                for ty in range(boxes[4 * r + 1], boxes[4 * r + 3]):
                    for tx in range(boxes[4 * r], boxes[4 * r + 2]):
                        fill[ty * tiles_x + tx] += 1
            slot += entries[image * chunks + chunk]
        for digit in range(3):
            shift = np.uint64(32 + 11 * digit)
            total = 0
            for i in range(2048):
                here = histogram[2048 * digit + i]
                histogram[2048 * digit + i] = total
                total += here
            for i in range(n):
                k = keys[i]
                at = 2048 * digit + np.int64((k >> shift) & np.uint64(2047))
                other[histogram[at]] = k
                histogram[at] += 1
            keys, other = other, keys
        total = base
        for tile in range(tiles):
            here = fill[tile]
            fill[tile] = total
            starts[image * tiles + tile] = total
            total += here
        if image == images - 1:
            starts[images * tiles] = total
        for i in range(n):
            r = image * N + np.int64(keys[i] & np.uint64(0xFFFFFFFF))
            slot = firsts[r]
            for ty in range(boxes[4 * r + 1], boxes[4 * r + 3]):
                for tx in range(boxes[4 * r], boxes[4 * r + 2]):
                    at = fill[ty * tiles_x + tx]
                    fill[ty * tiles_x + tx] = at + 1
                    entry_ids[at] = r
                    entry_slots[at] = slot
                    slot += 1


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


@kernel
def composite(
    counter, images, tiles_x, tiles, width, height, records, records32, starts, entry_ids,
    entry_slots, alpha_max, background, rgb, alpha, depth, touched,
):  # fmt: skip
    """Blend every tile's Gaussians front to back. One task is one tile of one image.

    Notes in `touched[slot]` which blocks an entry reached, for the backward pass. The entries are
    taken in batches, first to find which blocks each may reach, then to blend: a processor that
    already knows how often the inner loop runs does not guess wrong.
    """
    lane_x, lane_y = load(_LANE_X, 0) - np.float32(1.5), load(_LANE_Y, 0) - np.float32(1.5)
    middle_x, middle_y = load(_MIDDLE_X, 0), load(_MIDDLE_Y, 0)
    state = aligned(6 * 256)  # transmittance, weight, r, g, b, depth of each block
    places, slopes = aligned(BATCH * 32), np.empty(BATCH * 3, np.float32)
    reach = np.empty(BATCH, np.int64)
    while True:
        task = claim(counter)
        if task >= images * tiles:
            break
        image, tile = task // tiles, task % tiles
        left, top = (tile % tiles_x) * TILE, (tile // tiles_x) * TILE
        alive = open_tile(state, left, top, width, height)
        start, end = starts[task], starts[task + 1]
        while start < end and alive:
            size = min(BATCH, end - start)
            for i in range(size):
                prefetch(records, 8 * entry_ids[start + i + AHEAD])
                r = entry_ids[start + i]
                u, v, a, b, c, slack = place(records, r, left, top, middle_x, middle_y)
                limit = records32[16 * r + 10] - CUT
                reach[i] = blocks_within(u, v, a, b, c, slack, limit)
                store(places, 32 * i, u)
                store(places, 32 * i + 16, v)
                slopes[3 * i], slopes[3 * i + 1], slopes[3 * i + 2] = a, b, c
            for i in range(size):
                blocks = reach[i] & alive
                if blocks == 0:
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
                    power = fnma(v, v, fnma(u, u, log2_opacity))
                    opaque = minimum(exp2(power), alpha_max)
                    transmittance = load(state, 96 * j)
                    weight = opaque * transmittance
                    after = transmittance - weight
                    seen = (power >= CUT) & (transmittance > _F0)
                    live = seen & (after > STOP)
                    reached |= np.int64(lanes(seen) != 0) << j
                    # A finished pixel keeps its transmittance with the sign turned.
                    after = select(live, after, select(seen, -transmittance, transmittance))
                    weight = select(live, weight, _F0)
                    store(state, 96 * j, after)
                    store(state, 96 * j + 16, load(state, 96 * j + 16) + weight)
                    store(state, 96 * j + 32, fma(weight, red, load(state, 96 * j + 32)))
                    store(state, 96 * j + 48, fma(weight, green, load(state, 96 * j + 48)))
                    store(state, 96 * j + 64, fma(weight, blue, load(state, 96 * j + 64)))
                    store(state, 96 * j + 80, fma(weight, z, load(state, 96 * j + 80)))
                    if lanes(after > _F0) == 0:
                        alive &= ~(1 << j)
                touched[entry_slots[start + i]] = reached
            start += size
        close_tile(state, left, top, width, height, image, background, rgb, alpha, depth)


@inline
def open_tile(state, left, top, width, height):
    """Clear a tile's state; pixels outside the image start finished. Returns the live blocks."""
    lane_x, lane_y = load(_LANE_X, 0), load(_LANE_Y, 0)
    alive = 0
    for j in range(16):
        x, y = np.float32(left + 4 * (j & 3)), np.float32(top + (j & 12))
        inside = (lane_x + x < np.float32(width)) & (lane_y + y < np.float32(height))
        alive |= np.int64(lanes(inside) != 0) << j
        store(state, 96 * j, select(inside, splat(_F1), -_F1))
        for field in range(1, 6):
            store(state, 96 * j + 16 * field, splat(_F0))
    return alive


@inline
def close_tile(state, left, top, width, height, image, background, rgb, alpha, depth):
    """Put a finished tile on its background and write its pixels."""
    for j in range(16):
        x, y = left + 4 * (j & 3), top + (j & 12)
        weight = load(state, 96 * j + 16)
        remaining = _F1 - weight
        for channel in range(3):
            at = 96 * j + 32 + 16 * channel
            store(state, at, fma(remaining, background[3 * image + channel], load(state, at)))
        expected = load(state, 96 * j + 80) / select(weight > _F0, weight, _F1)
        store(state, 96 * j + 80, expected)
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


@kernel
def composite_backward(
    counter, images, tiles_x, tiles, width, height, records, records32, starts, entry_ids,
    entry_slots, alpha_max, background, rgb, alpha, depth, touched, v_rgb, v_alpha, v_depth, sums,
):  # fmt: skip
    """Gradients of the images with respect to every entry's record. One task is one tile.

    With w_i = T_i alpha_i and s_i = dLoss/dw_i (linear in the colour and depth of Gaussian i),

        dLoss/dalpha_i = T_i s_i - sum_{j > i} w_j s_j / (1 - alpha_i).

    The sum over all j is known from the images, so this goes front to back like the forward pass:
    the same transmittances to the last bit, and no division to undo them.

    Writes to `sums[slot]`, with g = alpha_i dLoss/dalpha_i summed over the tile's pixels:
    g, g u, g v, g u u, g u v, g v v, and the gradients of r, g, b and z.
    """
    lane_x, lane_y = load(_LANE_X, 0) - np.float32(1.5), load(_LANE_Y, 0) - np.float32(1.5)
    middle_x, middle_y = load(_MIDDLE_X, 0), load(_MIDDLE_Y, 0)
    state = aligned(7 * 256)  # transmittance, remainder, slopes: r, g, b, z, constant
    places = aligned(32)
    zero = splat(_F0)
    clamp = np.float32(math.log2(alpha_max))
    while True:
        task = claim(counter)
        if task >= images * tiles:
            break
        image, tile = task // tiles, task % tiles
        left, top = (tile % tiles_x) * TILE, (tile // tiles_x) * TILE
        if starts[task] == starts[task + 1]:
            continue
        open_gradients(
            state, left, top, width, height, image, background, rgb, alpha, depth,
            v_rgb, v_alpha, v_depth,
        )  # fmt: skip
        for e in range(starts[task], starts[task + 1]):
            prefetch(records, 8 * entry_ids[e + AHEAD])
            slot = entry_slots[e]
            blocks = np.int64(touched[slot])
            if blocks == 0:
                continue
            r = entry_ids[e]
            u, v, a, b, c, _ = place(records, r, left, top, middle_x, middle_y)
            store(places, 0, u)
            store(places, 16, v)
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
                power = fnma(v, v, fnma(u, u, log2_opacity))
                opaque = minimum(exp2(power), alpha_max)
                transmittance = load(state, 112 * j)
                weight = opaque * transmittance
                after = transmittance - weight
                seen = (power >= CUT) & (transmittance > _F0)
                live = seen & (after > STOP)
                after = select(live, after, select(seen, -transmittance, transmittance))
                store(state, 112 * j, after)
                weight = select(live, weight, _F0)
                v_red, v_green = load(state, 112 * j + 32), load(state, 112 * j + 48)
                v_blue, v_z = load(state, 112 * j + 64), load(state, 112 * j + 80)
                shade = fma(v_z, z, load(state, 112 * j + 96))
                shade = fma(v_red, red, fma(v_green, green, fma(v_blue, blue, shade)))
                remainder = fnma(weight, shade, load(state, 112 * j + 16))
                store(state, 112 * j + 16, remainder)
                slope = fma(transmittance, shade, -remainder / (_F1 - opaque))
                g = select(live & (power <= clamp), opaque * slope, _F0)
                gu, gv = g * u, g * v
                s, su, sv = s + g, su + gu, sv + gv
                suu, suv, svv = fma(gu, u, suu), fma(gu, v, suv), fma(gv, v, svv)
                s_red, s_green = fma(weight, v_red, s_red), fma(weight, v_green, s_green)
                s_blue, s_z = fma(weight, v_blue, s_blue), fma(weight, v_z, s_z)
            store(
                sums,
                16 * slot,
                horizontal_sums((s, su, sv, suu, suv, svv, s_red, s_green, s_blue, s_z)),
            )


@inline
def open_gradients(
    state, left, top, width, height, image, background, rgb, alpha, depth, v_rgb, v_alpha, v_depth
):
    """Set up a tile's state for the backward pass from the images and their gradients."""
    for j in range(16):
        at, x, y = 112 * j, left + 4 * (j & 3), top + (j & 12)
        for field in range(7):
            store(state, at + 16 * field, splat(-_F1 if field == 0 else _F0))
        columns = min(4, width - x)
        for row in range(min(4, height - y)):
            for column in range(columns):
                i = at + 4 * row + column
                pixel = (image * height + y + row) * width + x + column
                state[i] = _F1
                slope = v_alpha[pixel]
                remainder = _F0
                for channel in range(3):
                    v, behind = v_rgb[3 * pixel + channel], background[3 * image + channel]
                    state[i + 32 + 16 * channel] = v
                    slope -= v * behind
                    remainder += v * (rgb[3 * pixel + channel] - behind)
                weight = alpha[pixel]
                v_z = v_depth[pixel] / max(weight, np.float32(1e-30))
                state[i + 16] = remainder + weight * v_alpha[pixel]
                state[i + 80] = v_z
                state[i + 96] = slope - v_z * depth[pixel]


@kernel
def project_backward(
    counter, means, quats, scales, opacities, colors, sh, cameras, C, N, width, height, eps2d,
    records, records32, boxes, firsts, touched, sums, tasks,
    v_means, v_quats, v_scales, v_opacities, v_colors,
):  # fmt: skip
    """Carry the entries' gradients back to the Gaussians. One task is one chunk of one scene.

    Every Gaussian sums its own entries, tile by tile and camera by camera, in a fixed order.
    """
    chunks = (N + CHUNK - 1) // CHUNK
    acc = np.empty(16, np.float32)
    grads = np.empty(10 * 8, np.float64)
    out = np.empty(10 * 8, np.float64)
    basis, slopes = np.empty(16, np.float64), np.empty(3, np.float64)
    zero16, zero = load(_LANE_X, 0) * _F0, load(grads, 0) * 0.0
    while True:
        task = claim(counter)
        if task >= tasks:
            break
        scene, chunk = task // chunks, task % chunks
        for g0 in range(chunk * CHUNK, min(N, (chunk + 1) * CHUNK), 8):
            count = min(8, N - g0)
            first = scene * N + g0
            mx, my, mz = load_3(means, first, count)
            qw, qx, qy, qz = load_4(quats, first, count)
            sx, sy, sz = load_3(scales, first, count)
            (
                r00, r01, r02, r10, r11, r12, r20, r21, r22, nw, nx, ny, nz, norm_inverse,
            ) = rotation_of(qw, qx, qy, qz)  # fmt: skip
            vm00, vm01, vm02, vm10, vm11 = zero, zero, zero, zero, zero
            vm12, vm20, vm21, vm22 = zero, zero, zero, zero
            v_x, v_y, v_z = zero, zero, zero
            for k in range(80):
                out[k] = 0.0
            for view in range(C):
                image = scene * C + view
                any_seen = False
                for k in range(80):
                    grads[k] = 0.0
                for k in range(count):
                    r = image * N + g0 + k
                    extent = (boxes[4 * r + 2] - boxes[4 * r]) * (
                        boxes[4 * r + 3] - boxes[4 * r + 1]
                    )
                    if boxes[4 * r + 2] == 0:
                        continue
                    total = zero16
                    hit = False
                    for slot in range(firsts[r], firsts[r] + extent):
                        if touched[slot] != 0:
                            total = total + load(sums, 16 * slot)
                            hit = True
                    if not hit:
                        continue
                    any_seen = True
                    store(acc, 0, total)
                    for field in range(10):
                        grads[8 * field + k] = acc[field]
                    out[k] += grads[k] / opacities[first + k]
                    if sh == 0:
                        for channel in range(3):
                            v_colors[3 * (first + k) + channel] += acc[6 + channel]
                    else:
                        shade_backward(
                            means, colors, sh, cameras, image, first + k, records32, 16 * r + 11,
                            acc, basis, slopes, v_colors, out, k,
                        )  # fmt: skip
                if not any_seen:
                    continue
                (
                    w00, w01, w02, t0, w10, w11, w12, t1, w20, w21, w22, t2,
                    fx, fy, cx, cy, low_x, high_x, low_y, high_y,
                ) = camera_of(cameras, image)  # fmt: skip
                x = fma(mx, w00, fma(my, w01, fma(mz, w02, t0)))
                y = fma(mx, w10, fma(my, w11, fma(mz, w12, t1)))
                z = fma(mx, w20, fma(my, w21, fma(mz, w22, t2)))
                # Lanes that were culled have zero gradients; keep them finite.
                seen = absolute(load(grads, 0)) + absolute(load(grads, 72)) >= 0.0
                z = select(seen & (z > 1e-12), z, 1.0)
                inverse = 1.0 / z
                slope_x, slope_y = x * inverse, y * inverse
                jx, jy = inverse * fx, inverse * fy
                bound_x = minimum(maximum(slope_x, low_x), high_x)
                bound_y = minimum(maximum(slope_y, low_y), high_y)
                ex, ey = -bound_x * jx, -bound_y * jy
                a0, a1, a2 = fma(jx, w00, ex * w20), fma(jx, w01, ex * w21), fma(jx, w02, ex * w22)
                b0, b1, b2 = fma(jy, w10, ey * w20), fma(jy, w11, ey * w21), fma(jy, w12, ey * w22)
                p00 = fma(a0, r00, fma(a1, r10, a2 * r20)) * sx
                p01 = fma(a0, r01, fma(a1, r11, a2 * r21)) * sy
                p02 = fma(a0, r02, fma(a1, r12, a2 * r22)) * sz
                p10 = fma(b0, r00, fma(b1, r10, b2 * r20)) * sx
                p11 = fma(b0, r01, fma(b1, r11, b2 * r21)) * sy
                p12 = fma(b0, r02, fma(b1, r12, b2 * r22)) * sz
                a = fma(p00, p00, fma(p01, p01, fma(p02, p02, eps2d)))
                b = fma(p00, p10, fma(p01, p11, p02 * p12))
                c = fma(p10, p10, fma(p11, p11, fma(p12, p12, eps2d)))
                determinant = fnma(b, b, a * c)
                determinant = select(determinant > 0.0, determinant, 1.0)
                c = select(c > 0.0, c, 1.0)
                l11 = root(c / determinant) * _KAPPA
                l12, l22 = -b / c * l11, _KAPPA / root(c)
                gu, gv = load(grads, 8), load(grads, 16)
                guu, guv, gvv = load(grads, 24), load(grads, 32), load(grads, 40)
                # centre and covariance of the ellipse: L^T g w and L^T (g w w^T) L / 2
                v_u, v_v = l11 * gu * (2 * _LN2), (l12 * gu + l22 * gv) * (2 * _LN2)
                mixed = fma(l12, guu, l22 * guv)
                v_a = l11 * l11 * guu * (4 * _LN2 * _LN2)
                v_b = l11 * mixed * (4 * _LN2 * _LN2)
                v_c = fma(l12, mixed, l22 * fma(l12, guv, l22 * gvv)) * (4 * _LN2 * _LN2)
                # P = T M with T = J W and M = R S
                q00, q01, q02 = (
                    fma(v_a, p00, v_b * p10),
                    fma(v_a, p01, v_b * p11),
                    fma(v_a, p02, v_b * p12),
                )
                q10, q11, q12 = (
                    fma(v_b, p00, v_c * p10),
                    fma(v_b, p01, v_c * p11),
                    fma(v_b, p02, v_c * p12),
                )
                vm00, vm01, vm02 = (
                    vm00 + fma(a0, q00, b0 * q10),
                    vm01 + fma(a0, q01, b0 * q11),
                    vm02 + fma(a0, q02, b0 * q12),
                )
                vm10, vm11, vm12 = (
                    vm10 + fma(a1, q00, b1 * q10),
                    vm11 + fma(a1, q01, b1 * q11),
                    vm12 + fma(a1, q02, b1 * q12),
                )
                vm20, vm21, vm22 = (
                    vm20 + fma(a2, q00, b2 * q10),
                    vm21 + fma(a2, q01, b2 * q11),
                    vm22 + fma(a2, q02, b2 * q12),
                )
                q00, q01, q02, q10, q11, q12 = (
                    q00 * sx,
                    q01 * sy,
                    q02 * sz,
                    q10 * sx,
                    q11 * sy,
                    q12 * sz,
                )
                va0 = fma(q00, r00, fma(q01, r01, q02 * r02))
                va1 = fma(q00, r10, fma(q01, r11, q02 * r12))
                va2 = fma(q00, r20, fma(q01, r21, q02 * r22))
                vb0 = fma(q10, r00, fma(q11, r01, q12 * r02))
                vb1 = fma(q10, r10, fma(q11, r11, q12 * r12))
                vb2 = fma(q10, r20, fma(q11, r21, q12 * r22))
                v_ex = fma(va0, w20, fma(va1, w21, va2 * w22))
                v_ey = fma(vb0, w20, fma(vb1, w21, vb2 * w22))
                v_jx = fma(va0, w00, fma(va1, w01, va2 * w02)) - bound_x * v_ex
                v_jy = fma(vb0, w10, fma(vb1, w11, vb2 * w12)) - bound_y * v_ey
                within_x = (slope_x >= low_x) & (slope_x <= high_x)
                within_y = (slope_y >= low_y) & (slope_y <= high_y)
                v_slope_x = fma(v_u, fx, select(within_x, -jx * v_ex, 0.0))
                v_slope_y = fma(v_v, fy, select(within_y, -jy * v_ey, 0.0))
                along_x, along_y = v_slope_x * inverse, v_slope_y * inverse
                along_z = load(grads, 72) - inverse * (
                    v_slope_x * slope_x + v_slope_y * slope_y + v_jx * jx + v_jy * jy
                )
                v_x = v_x + fma(along_x, w00, fma(along_y, w10, along_z * w20))
                v_y = v_y + fma(along_x, w01, fma(along_y, w11, along_z * w21))
                v_z = v_z + fma(along_x, w02, fma(along_y, w12, along_z * w22))
            store(out, 8, v_x + load(out, 8))
            store(out, 16, v_y + load(out, 16))
            store(out, 24, v_z + load(out, 24))
            store(out, 32, fma(vm00, r00, fma(vm10, r10, vm20 * r20)))
            store(out, 40, fma(vm01, r01, fma(vm11, r11, vm21 * r21)))
            store(out, 48, fma(vm02, r02, fma(vm12, r12, vm22 * r22)))
            # M = R S, then the rotation's quaternion, then its normalisation
            vm00, vm01, vm02 = vm00 * sx, vm01 * sy, vm02 * sz
            vm10, vm11, vm12 = vm10 * sx, vm11 * sy, vm12 * sz
            vm20, vm21, vm22 = vm20 * sx, vm21 * sy, vm22 * sz
            vw = nx * (vm21 - vm12) + ny * (vm02 - vm20) + nz * (vm10 - vm01)
            vx = (
                ny * (vm01 + vm10)
                + nz * (vm02 + vm20)
                + nw * (vm21 - vm12)
                - 2.0 * nx * (vm11 + vm22)
            )
            vy = (
                nx * (vm01 + vm10)
                + nz * (vm12 + vm21)
                + nw * (vm02 - vm20)
                - 2.0 * ny * (vm00 + vm22)
            )
            vz = (
                nx * (vm02 + vm20)
                + ny * (vm12 + vm21)
                + nw * (vm10 - vm01)
                - 2.0 * nz * (vm00 + vm11)
            )
            radial = fma(vw, nw, fma(vx, nx, fma(vy, ny, vz * nz)))
            double = norm_inverse * 2.0
            store(grads, 0, (vw - radial * nw) * double)
            store(grads, 8, (vx - radial * nx) * double)
            store(grads, 16, (vy - radial * ny) * double)
            store(grads, 24, (vz - radial * nz) * double)
            for k in range(count):
                v_opacities[first + k] = out[k]
                for axis in range(3):
                    v_means[3 * (first + k) + axis] = out[8 + 8 * axis + k]
                    v_scales[3 * (first + k) + axis] = out[32 + 8 * axis + k]
                for axis in range(4):
                    v_quats[4 * (first + k) + axis] = grads[8 * axis + k]


@inline
def shade_backward(
    means, colors, sh, cameras, image, s, records32, at, acc, basis, slopes, v_colors, out, k
):
    """Gradients of `shade` for coefficients and (through the direction) the mean."""
    x, y, z, inverse = direction_of(means, cameras, image, s)
    sh_basis(x, y, z, sh, basis)
    vx, vy, vz = 0.0, 0.0, 0.0
    for i in range(sh):
        sh_slopes(x, y, z, sh, i, slopes)
        along = 0.0
        for channel in range(3):
            if records32[at + channel] > _F0:
                slope = acc[6 + channel]
                v_colors[3 * (sh * s + i) + channel] += basis[i] * slope
                along += colors[3 * (sh * s + i) + channel] * slope
        vx += along * slopes[0]
        vy += along * slopes[1]
        vz += along * slopes[2]
    radial = vx * x + vy * y + vz * z
    out[8 + k] += (vx - radial * x) * inverse
    out[16 + k] += (vy - radial * y) * inverse
    out[24 + k] += (vz - radial * z) * inverse
