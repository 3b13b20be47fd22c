"""The CPU rasteriser's kernels (Numba)."""
