"""Geometry of the CPU rasteriser: Gaussians to projected records, and gradients back.

A projected Gaussian is a record of 64 bytes. With d = pixel - mean and L the Cholesky factor of the
inverse covariance, scaled so that exp(-d^T Sigma^-1 d / 2) = 2^-(u^2 + v^2), (u, v) = L d:

    float64  0: mean x   1: mean y   2: L11   3: L12   4: L22
    float32 10: log2 opacity   11..13: r, g, b   14: z-depth   15: unused

All of it is computed in float64, 8 Gaussians at a time: conditioning of thin, far-reaching
Gaussians is what separates two renderers, and here it costs little.
"""

# Numba compiles this file, mypy cannot follow it: every value is typed by the compiler.
# mypy: ignore-errors
# One line for one equation reads better than one line for one argument.
# fmt: off
import math

import numpy as np

from fresnel.render.kernels.harmonics import shade, shade_backward
from fresnel.render.kernels.simd import (
    ceiling,
    floor,
    fma,
    fnma,
    lanes,
    load,
    load_1,
    load_3,
    load_4,
    maximum,
    minimum,
    prefetch,
    root,
    select,
    splat,
    split_exponent,
    store,
)
from fresnel.render.kernels.tasks import BAD, array_at, claim, finish, inline, stage

TILE = 16  # pixels; a tile is 4 x 4 blocks of 4 x 4 pixels, and a block is one vector
_KAPPA = math.sqrt(0.5 / math.log(2.0))
_LN2, _LOG2_255 = math.log(2.0), math.log2(255.0)
_F0 = np.float32(0)
# A chunk's row of 8 int64 in the chunk table: its visible Gaussians, their entries, the lowest and
# the highest bits of a depth, its first slot; in an image's first row, what `sort` says of it all.
FOUND, ENTRIES, LOW, HIGH, BASE, SORTED, SWAPPED = range(7)


@inline
def log2_of(x):
    """log2 of 8 positive doubles: ln m = 2 (s + s^3/3 + s^5/5 + ...), s = (m - 1) / (m + 1)."""
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
    )


@inline
def write_camera(viewmats, Ks, image, width, height, row):
    """A camera as a row of 24 doubles: pose (3 x 4), fx fy cx cy, slope limits, centre, padding.

    Returns whether all of it is finite.
    """
    total = 0.0
    for k in range(12):
        row[k] = viewmats[16 * image + k]
    for axis in range(2):
        f, c = Ks[9 * image + 4 * axis], Ks[9 * image + 3 * axis + 2]
        size = float(height if axis else width)
        row[12 + axis], row[14 + axis] = f, c
        # gsplat evaluates the projection's Jacobian no farther than 15 % outside the image.
        row[16 + 2 * axis], row[17 + 2 * axis] = -(c + 0.15 * size) / f, (1.15 * size - c) / f
    for axis in range(3):
        row[20 + axis] = -(row[axis] * row[3] + row[4 + axis] * row[7] + row[8 + axis] * row[11])
    for k in range(23):
        total += row[k]
    return math.isfinite(total)


@inline
def camera_of(c):
    """The first 20 numbers of a camera's row, for registers."""
    return (
        c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], c[11],
        c[12], c[13], c[14], c[15], c[16], c[17], c[18], c[19],
    )


@inline
def ellipse_of(camera, mx, my, mz, rotation, sx, sy, sz, eps2d):
    """Project 8 Gaussians: camera frame, Jacobian, and the covariance P P^T, P = J W R S.

    Returns z, 1/z, the slopes x/z and y/z, the Jacobian's diagonal (jx, jy), the slopes it was
    evaluated at, J W row by row, P row by row, and the covariance (a, b; b, c) in px^2.
    """
    w00, w01, w02, t0, w10, w11, w12, t1, w20, w21, w22, t2, fx, fy = camera[:14]
    low_x, high_x, low_y, high_y = camera[16:20]
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotation[:9]
    x = fma(mx, w00, fma(my, w01, fma(mz, w02, t0)))
    y = fma(mx, w10, fma(my, w11, fma(mz, w12, t1)))
    z = fma(mx, w20, fma(my, w21, fma(mz, w22, t2)))
    inverse = 1.0 / select(z > 1e-12, z, 1.0)  # finite in lanes that are culled
    slope_x, slope_y = x * inverse, y * inverse
    jx, jy = inverse * fx, inverse * fy
    at_x = minimum(maximum(slope_x, low_x), high_x)
    at_y = minimum(maximum(slope_y, low_y), high_y)
    ex, ey = -at_x * jx, -at_y * jy
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
    return (
        z, inverse, slope_x, slope_y, jx, jy, at_x, at_y,
        a0, a1, a2, b0, b1, b2, p00, p01, p02, p10, p11, p12, a, b, c,
    )


@stage
def project(progress, number, scene, sh, poses, near, eps2d, shape, parts):
    """Project every Gaussian into every image. One task is one chunk of one image.

    Writes the record, the range of tiles (x0, y0, x1, y1) and the first slot within the chunk of
    every Gaussian that can touch a pixel; an empty range for all others; per chunk the sorting
    keys of the visible Gaussians, their number and range, and the number of (Gaussian, tile)
    entries, in all and for each tile. Reports values that are not finite.
    """
    means, quats, scales, opacities, colors = scene
    images, C, N, chunks, chunk_size, width, height, tiles_x, tiles = shape
    records, records32, boxes, firsts, keys, _, cameras, chunk_table, _, tile_counts = parts
    scratch, basis = np.empty(12 * 8, np.float64), np.empty(16, np.float64)
    depth_bits = records32.view(np.uint32)
    row = np.empty(24, np.float64)
    while True:
        task = claim(progress, number)
        if task >= images * chunks:
            break
        image, chunk = task // chunks, task % chunks
        if not write_camera(poses[0], poses[1], image, width, height, row):
            progress[BAD] = 2
        if chunk == 0:
            for k in range(24):
                cameras[24 * image + k] = row[k]
        camera = camera_of(row)
        fx, fy, cx, cy = camera[12:16]
        low, high = 0xFFFFFFFF, 0
        found, slots = 0, 0
        for tile in range(task * tiles, (task + 1) * tiles):
            tile_counts[tile] = 0
        for g0 in range(chunk * chunk_size, min(N, (chunk + 1) * chunk_size), 8):
            count = min(8, N - g0)
            s = image // C * N + g0
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
                progress[BAD] = 1
            rotation = rotation_of(qw, qx, qy, qz)
            ellipse = ellipse_of(camera, mx, my, mz, rotation, sx, sy, sz, eps2d)
            z, slope_x, slope_y = ellipse[0], ellipse[2], ellipse[3]
            a, b, c = ellipse[20], ellipse[21], ellipse[22]
            determinant = fnma(b, b, a * c)
            seen = (z >= near) & (opacity >= 1 / 255) & (determinant > 0.0)
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
            seen = seen & (x0 < x1) & (y0 < y1)
            bits = lanes(seen)
            l11 = root(c / determinant) * _KAPPA
            store(scratch, 0, (
                u, v, l11, -b / c * l11, _KAPPA / root(c), log2_opacity, z, opacity, x0, y0, x1, y1,
            ))
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
                    shade(means, colors, sh, row, s + k, records32, 16 * g + 11, progress, basis)
                bx0, by0 = int(scratch[64 + k]) // TILE, int(scratch[72 + k]) // TILE
                bx1 = (int(scratch[80 + k]) + TILE - 1) // TILE
                by1 = (int(scratch[88 + k]) + TILE - 1) // TILE
                boxes[4 * g], boxes[4 * g + 1] = bx0, by0
                boxes[4 * g + 2], boxes[4 * g + 3] = bx1, by1
                firsts[g] = slots
                slots += (bx1 - bx0) * (by1 - by0)
                for ty in range(by0, by1):
                    for tx in range(bx0, bx1):
                        tile_counts[task * tiles + ty * tiles_x + tx] += 1
                bits_of_z = np.int64(depth_bits[16 * g + 14])
                low, high = min(low, bits_of_z), max(high, bits_of_z)
                keys[image * N + chunk * chunk_size + found] = (bits_of_z << 32) | (g0 + k)
                found += 1
        chunk_table[8 * task + FOUND], chunk_table[8 * task + ENTRIES] = found, slots
        chunk_table[8 * task + LOW], chunk_table[8 * task + HIGH] = low, high
        finish(progress, number, 1)


@stage
def project_backward(
    progress, number, scenes, gaussians, sh, eps2d, shape, parts, lists, sums, v_gaussians
):
    """Carry the entries' gradients back to the Gaussians. One task is one chunk of one scene.

    Every Gaussian sums its own entries, tile by tile and camera by camera, in a fixed order.
    """
    means, quats, scales, opacities, colors = gaussians
    v_means, v_quats, v_scales, v_opacities, v_colors = v_gaussians
    _, C, N, chunks, chunk_size, _, _, _, _ = shape
    _, records32, boxes, firsts, _, _, cameras, chunk_table, _, _ = parts
    _, slots, touched = lists
    acc = np.empty(16, np.float32)
    grads, out = np.zeros(10 * 8, np.float64), np.zeros(7 * 8, np.float64)
    basis, slopes = np.empty(16, np.float64), np.empty(48, np.float64)
    zero = load(grads, 0)
    while True:
        task = claim(progress, number)
        if task >= scenes * chunks:
            break
        scene, chunk = task // chunks, task % chunks
        last = min(N, (chunk + 1) * chunk_size)
        width = 3 * max(sh, 1)
        for i in range(width * (scene * N + chunk * chunk_size), width * (scene * N + last)):
            v_colors[i] = 0.0
        for g0 in range(chunk * chunk_size, last, 8):
            count = min(8, N - g0)
            first = scene * N + g0
            mx, my, mz = load_3(means, first, count)
            qw, qx, qy, qz = load_4(quats, first, count)
            sx, sy, sz = load_3(scales, first, count)
            rotation = rotation_of(qw, qx, qy, qz)
            r00, r01, r02, r10, r11, r12, r20, r21, r22, nw, nx, ny, nz, norm_inverse = rotation
            vm00, vm01, vm02, vm10, vm11 = zero, zero, zero, zero, zero
            vm12, vm20, vm21, vm22 = zero, zero, zero, zero
            v_x, v_y, v_z = zero, zero, zero
            out[:] = 0.0
            for view in range(C):
                image = scene * C + view
                base = chunk_table[8 * (image * chunks + chunk) + BASE]
                row = array_at(cameras.ctypes.data + 192 * image, 24, np.float64)
                any_seen = False
                grads[:] = 0.0
                for k in range(count):
                    r = image * N + g0 + k
                    if g0 + k + 8 < last:  # fetch what the Gaussian 8 further on will need
                        ahead = r + 8
                        columns = boxes[4 * ahead + 2] - boxes[4 * ahead]
                        if columns != 0:
                            rows = boxes[4 * ahead + 3] - boxes[4 * ahead + 1]
                            for slot in range(firsts[ahead], firsts[ahead] + rows * columns):
                                prefetch(sums, 16 * slots[base + slot])
                    columns = boxes[4 * r + 2] - boxes[4 * r]
                    if columns == 0:
                        continue
                    rows = boxes[4 * r + 3] - boxes[4 * r + 1]
                    total = splat(_F0)
                    hit = False
                    for slot in range(firsts[r], firsts[r] + rows * columns):
                        entry = slots[base + slot]
                        if touched[entry] != 0:
                            total = total + load(sums, 16 * entry)
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
                            means, colors, sh, row, first + k, records32, 16 * r + 11,
                            acc, basis, slopes, v_colors, out, k,
                        )
                if not any_seen:
                    continue
                camera = camera_of(row)
                w00, w01, w02, _, w10, w11, w12, _, w20, w21, w22, _, fx, fy = camera[:14]
                low_x, high_x, low_y, high_y = camera[16:20]
                (
                    _, inverse, slope_x, slope_y, jx, jy, at_x, at_y,
                    a0, a1, a2, b0, b1, b2, p00, p01, p02, p10, p11, p12, a, b, c,
                ) = ellipse_of(camera, mx, my, mz, rotation, sx, sy, sz, eps2d)
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
                q00, q10 = fma(v_a, p00, v_b * p10), fma(v_b, p00, v_c * p10)
                q01, q11 = fma(v_a, p01, v_b * p11), fma(v_b, p01, v_c * p11)
                q02, q12 = fma(v_a, p02, v_b * p12), fma(v_b, p02, v_c * p12)
                vm00, vm10 = fma(a0, q00, fma(b0, q10, vm00)), fma(a1, q00, fma(b1, q10, vm10))
                vm01, vm11 = fma(a0, q01, fma(b0, q11, vm01)), fma(a1, q01, fma(b1, q11, vm11))
                vm02, vm12 = fma(a0, q02, fma(b0, q12, vm02)), fma(a1, q02, fma(b1, q12, vm12))
                vm20 = fma(a2, q00, fma(b2, q10, vm20))
                vm21 = fma(a2, q01, fma(b2, q11, vm21))
                vm22 = fma(a2, q02, fma(b2, q12, vm22))
                q00, q01, q02 = q00 * sx, q01 * sy, q02 * sz
                q10, q11, q12 = q10 * sx, q11 * sy, q12 * sz
                va0 = fma(q00, r00, fma(q01, r01, q02 * r02))
                va1 = fma(q00, r10, fma(q01, r11, q02 * r12))
                va2 = fma(q00, r20, fma(q01, r21, q02 * r22))
                vb0 = fma(q10, r00, fma(q11, r01, q12 * r02))
                vb1 = fma(q10, r10, fma(q11, r11, q12 * r12))
                vb2 = fma(q10, r20, fma(q11, r21, q12 * r22))
                v_ex = fma(va0, w20, fma(va1, w21, va2 * w22))
                v_ey = fma(vb0, w20, fma(vb1, w21, vb2 * w22))
                v_jx = fma(va0, w00, fma(va1, w01, va2 * w02)) - at_x * v_ex
                v_jy = fma(vb0, w10, fma(vb1, w11, vb2 * w12)) - at_y * v_ey
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
            store(out, 8, (
                v_x + load(out, 8), v_y + load(out, 16), v_z + load(out, 24),
                fma(vm00, r00, fma(vm10, r10, vm20 * r20)),
                fma(vm01, r01, fma(vm11, r11, vm21 * r21)),
                fma(vm02, r02, fma(vm12, r12, vm22 * r22)),
            ))
            # M = R S, then the rotation's quaternion, then its normalisation
            vm00, vm01, vm02 = vm00 * sx, vm01 * sy, vm02 * sz
            vm10, vm11, vm12 = vm10 * sx, vm11 * sy, vm12 * sz
            vm20, vm21, vm22 = vm20 * sx, vm21 * sy, vm22 * sz
            vw = nx * (vm21 - vm12) + ny * (vm02 - vm20) + nz * (vm10 - vm01)
            vx = ny * (vm01 + vm10) + nz * (vm02 + vm20) + nw * (vm21 - vm12)
            vy = nx * (vm01 + vm10) + nz * (vm12 + vm21) + nw * (vm02 - vm20)
            vz = nx * (vm02 + vm20) + ny * (vm12 + vm21) + nw * (vm10 - vm01)
            vx = fnma(nx * 2.0, vm11 + vm22, vx)
            vy = fnma(ny * 2.0, vm00 + vm22, vy)
            vz = fnma(nz * 2.0, vm00 + vm11, vz)
            radial = fma(vw, nw, fma(vx, nx, fma(vy, ny, vz * nz)))
            double = norm_inverse * 2.0
            store(grads, 0, (
                (vw - radial * nw) * double, (vx - radial * nx) * double,
                (vy - radial * ny) * double, (vz - radial * nz) * double,
            ))
            for k in range(count):
                v_opacities[first + k] = out[k]
                for axis in range(3):
                    v_means[3 * (first + k) + axis] = out[8 + 8 * axis + k]
                    v_scales[3 * (first + k) + axis] = out[32 + 8 * axis + k]
                for axis in range(4):
                    v_quats[4 * (first + k) + axis] = grads[8 * axis + k]
        finish(progress, number, 1)
