"""View-dependent colour of the CPU rasteriser: spherical harmonics to degree 3, and gradients.

The basis is 3DGS's (and gsplat's): real, with the Condon-Shortley signs of Sloan, "Efficient
Spherical Harmonic Evaluation" (JCGT 2013).
"""

# Numba compiles this file, mypy cannot follow it: every value is typed by the compiler.
# mypy: ignore-errors
from __future__ import annotations

import math

from fresnel.render.kernels.tasks import BAD, inline


@inline
def sh_basis(x, y, z, sh, basis):
    """Real spherical harmonics at a unit direction, `sh` of them, in 3DGS's order."""
    basis[0] = 0.28209479177387814
    if sh > 1:
        basis[1] = -0.4886025119029199 * y
        basis[2] = 0.4886025119029199 * z
        basis[3] = -0.4886025119029199 * x
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
def direction_of(means, camera, s):
    """Unit vector from the camera (its row) to Gaussian s, and one over the distance."""
    dx = means[3 * s] - camera[20]
    dy = means[3 * s + 1] - camera[21]
    dz = means[3 * s + 2] - camera[22]
    inverse = 1.0 / max(math.sqrt(dx * dx + dy * dy + dz * dz), 1e-12)
    return dx * inverse, dy * inverse, dz * inverse, inverse


@inline
def shade(means, colors, sh, camera, s, out, at, progress, basis):
    """Colour of Gaussian s from its spherical harmonics: max(0, 0.5 + sum c Y)."""
    x, y, z, _ = direction_of(means, camera, s)
    sh_basis(x, y, z, sh, basis)
    for channel in range(3):
        value = 0.5
        for k in range(sh):
            value += basis[k] * colors[3 * (sh * s + k) + channel]
        if not math.isfinite(value):
            progress[BAD] = 1
        out[at + channel] = max(value, 0.0)


@inline
def shade_backward(
    means, colors, sh, camera, s, records32, at, acc, basis, slopes, v_colors, out, k
):
    """Gradients of `shade` for coefficients and (through the direction) the mean."""
    x, y, z, inverse = direction_of(means, camera, s)
    sh_basis(x, y, z, sh, basis)
    vx, vy, vz = 0.0, 0.0, 0.0
    for i in range(sh):
        sh_slopes(x, y, z, sh, i, slopes)
        along = 0.0
        for channel in range(3):
            if records32[at + channel] > 0.0:
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
