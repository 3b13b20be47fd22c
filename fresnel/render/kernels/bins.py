"""Lists of the CPU rasteriser: which Gaussians each tile blends, in which order."""

# Numba compiles this file, mypy cannot follow it: every value is typed by the compiler.
# mypy: ignore-errors
# fmt: off
import numpy as np

from fresnel.render.kernels.project import BASE, ENTRIES, FOUND, HIGH, LOW, SORTED, SWAPPED
from fresnel.render.kernels.simd import prefetch
from fresnel.render.kernels.tasks import TOTAL, claim, finish, stage

AHEAD = 16  # entries between the one at work and the one being fetched from memory


@stage
def sort(progress, number, shape, parts):
    """Sort each image's visible Gaussians by depth and lay out its lists. One task is one image.

    A radix sort on the bits of the float32 depth (positive, so they order as the floats do) above
    the lowest; stable, so equal depths keep the order of the Gaussians, as in gsplat. The sorted
    keys end up in `keys`, or in `others` where the image's first chunk says SWAPPED. `starts[image
    * tiles + tile]` becomes the first entry of a tile's list, and the last one their total.
    """
    images, _, N, chunks, chunk_size, _, _, _, tiles = shape
    _, _, _, _, keys, others, _, chunk_table, starts, tile_counts = parts
    histogram = np.empty(3 * 4096, np.int32)
    while True:
        image = claim(progress, number)
        if image >= images:
            break
        total = 0
        for chunk in range(image * chunks):
            total += chunk_table[8 * chunk + ENTRIES]
        slot, n, low, high = total, 0, chunk_table[8 * image * chunks + LOW], 0
        for tile in range(image * tiles, (image + 1) * tiles):
            starts[tile] = 0
        for chunk in range(image * chunks, (image + 1) * chunks):
            for tile in range(tiles):
                starts[image * tiles + tile] += tile_counts[chunk * tiles + tile]
            row = 8 * chunk
            chunk_table[row + BASE] = slot
            slot += chunk_table[row + ENTRIES]
            n += chunk_table[row + FOUND]
            low = min(low, chunk_table[row + LOW])
            high = max(high, chunk_table[row + HIGH])
        for tile in range(image * tiles, (image + 1) * tiles):
            size = starts[tile]
            starts[tile] = total
            total += size
        if image == images - 1:
            starts[images * tiles] = total
            progress[TOTAL] = total
        bits = 1
        while high - low >= 1 << bits:
            bits += 1
        # Wide digits need few passes, narrow ones little time to sum up what they counted.
        passes = (bits + 7) // 8 if n < 4096 else (bits + 11) // 12
        width = (bits + passes - 1) // passes
        digit = (1 << width) - 1
        for i in range(passes << width):
            histogram[i] = 0
        for chunk in range(chunks):
            at = image * N + chunk * chunk_size
            for i in range(at, at + chunk_table[8 * (image * chunks + chunk) + FOUND]):
                depth = (keys[i] >> 32) - low
                for k in range(passes):
                    histogram[(k << width) + ((depth >> (k * width)) & digit)] += 1
        source, target = keys, others
        for k in range(passes):
            total = 0
            for i in range(k << width, (k + 1) << width):
                size = histogram[i]
                histogram[i] = total
                total += size
            # The first pass finds the keys where their chunks left them, others side by side.
            for part in range(chunks if k == 0 else 1):
                at = image * N + part * chunk_size
                size = chunk_table[8 * (image * chunks + part) + FOUND] if k == 0 else n
                for i in range(at, at + size):
                    key = source[i]
                    bucket = (k << width) + ((((key >> 32) - low) >> (k * width)) & digit)
                    target[image * N + histogram[bucket]] = key
                    histogram[bucket] += 1
            source, target = target, source
        chunk_table[8 * image * chunks + SORTED] = n
        chunk_table[8 * image * chunks + SWAPPED] = passes & 1
        finish(progress, number, 1)


@stage
def fill(progress, number, bands, shape, parts, lists):
    """List the sorted Gaussians for every tile, front to back. One task is a band of tile rows.

    `slots`, from a chunk's BASE plus a Gaussian's `firsts` on, names that Gaussian's own entries.
    """
    images, _, N, chunks, chunk_size, _, _, tiles_x, tiles = shape
    _, _, boxes, firsts, keys, others, _, chunk_table, starts, _ = parts
    entry_ids, slots, _ = lists
    at = np.empty(tiles, np.int64)
    rows = tiles // tiles_x
    while True:
        task = claim(progress, number)
        if task >= images * bands:
            break
        image, band = task // bands, task % bands
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        for tile in range(tiles):
            at[tile] = starts[image * tiles + tile]
        n = chunk_table[8 * image * chunks + SORTED]
        ids = others if chunk_table[8 * image * chunks + SWAPPED] else keys
        for i in range(image * N, image * N + n):
            ahead = image * N + (ids[min(i + AHEAD, image * N + n - 1)] & 0xFFFFFFFF)
            prefetch(boxes, 4 * ahead)
            prefetch(firsts, ahead)
            g = ids[i] & 0xFFFFFFFF
            r = image * N + g
            x0, y0 = np.int64(boxes[4 * r]), np.int64(boxes[4 * r + 1])
            x1, y1 = np.int64(boxes[4 * r + 2]), np.int64(boxes[4 * r + 3])
            first, last = max(y0, top), min(y1, bottom)
            base = chunk_table[8 * (image * chunks + g // chunk_size) + BASE]
            slot = base + firsts[r] + (first - y0) * (x1 - x0)
            for tile_row in range(first * tiles_x, last * tiles_x, tiles_x):
                for tile in range(tile_row + x0, tile_row + x1):
                    entry = at[tile]
                    at[tile] = entry + 1
                    entry_ids[entry] = r
                    slots[slot] = entry
                    slot += 1
        finish(progress, number, 1)
