"""View-dependent colour of the CPU rasteriser: spherical harmonics to degree 3, and gradients.

The basis is 3DGS's (and gsplat's): real, with the Condon-Shortley signs of Sloan, "Efficient
Spherical Harmonic Evaluation" (JCGT 2013).
"""

# Numba compiles this file, mypy cannot follow it: every value is typed by the compiler.
# mypy: ignore-errors
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
def put(slopes, k, dx, dy, dz):
    slopes[3 * k], slopes[3 * k + 1], slopes[3 * k + 2] = dx, dy, dz


@inline
def sh_slopes(x, y, z, sh, slopes):
    """Derivatives of `sh_basis` with respect to x, y and z (taken as independent), in threes."""
    put(slopes, 0, 0.0, 0.0, 0.0)
    if sh > 1:
        put(slopes, 1, 0.0, -0.4886025119029199, 0.0)
        put(slopes, 2, 0.0, 0.0, 0.4886025119029199)
        put(slopes, 3, -0.4886025119029199, 0.0, 0.0)
    if sh > 4:
        put(slopes, 4, 1.0925484305920792 * y, 1.0925484305920792 * x, 0.0)
        put(slopes, 5, 0.0, -1.0925484305920792 * z, -1.0925484305920792 * y)
        put(slopes, 6, 0.0, 0.0, 0.31539156525252005 * 6 * z)
        put(slopes, 7, -1.0925484305920792 * z, 0.0, -1.0925484305920792 * x)
        put(slopes, 8, 1.0925484305920792 * x, -1.0925484305920792 * y, 0.0)
    if sh > 9:
        across = -0.5900435899266435 * 3 * (x * x - y * y)
        up = -0.4570457994644658 * (5 * z * z - 1)
        a, b, c = 0.5900435899266435 * 6, 2.890611442640554, -0.4570457994644658 * 10
        put(slopes, 9, -a * x * y, across, 0.0)
        put(slopes, 10, b * y * z, b * x * z, b * x * y)
        put(slopes, 11, 0.0, up, c * y * z)
        put(slopes, 12, 0.0, 0.0, 0.3731763325901154 * (15 * z * z - 3))
        put(slopes, 13, up, 0.0, c * x * z)
        put(slopes, 14, b * x * z, -b * y * z, 1.445305721320277 * (x * x - y * y))
        put(slopes, 15, across, a * x * y, 0.0)


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
    sh_slopes(x, y, z, sh, slopes)
    vx, vy, vz = 0.0, 0.0, 0.0
    for i in range(sh):
        along = 0.0
        for channel in range(3):
            if records32[at + channel] > 0.0:
                slope = acc[6 + channel]
                v_colors[3 * (sh * s + i) + channel] += basis[i] * slope
                along += colors[3 * (sh * s + i) + channel] * slope
        vx += along * slopes[3 * i]
        vy += along * slopes[3 * i + 1]
        vz += along * slopes[3 * i + 2]
    radial = vx * x + vy * y + vz * z
    out[8 + k] += (vx - radial * x) * inverse
    out[16 + k] += (vy - radial * y) * inverse
    out[24 + k] += (vz - radial * z) * inverse
