"""How fast the CPU rasteriser is, and how near to what this machine can do at all.

    python benchmarks/render.py [--rounds 15] [--out benchmarks]

Renders an object-like scene (Gaussians on a bumpy shell, wide enough to cover it) and writes
render.json, render.md (the table) and render.png (time against N). Every figure is the median of
rounds in which all cases take turns, so that a busy moment does not fall on one of them. At its
turn a case runs a few times and the last run counts, as in a loop; what cold caches cost the first
is told apart, for the smallest case.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from fresnel.render import Views, cpu, reference, render
from fresnel.render.kernels.simd import fma, load, store
from fresnel.scene.cameras import Cameras, orbit
from fresnel.scene.gaussians import Gaussians

SIZES = [(n, size) for n in (1_000, 10_000, 100_000) for size in (128, 256, 512)]
TARGETS = {(1_000, 128): (0.25, 0.7), (10_000, 256): (2, 5), (100_000, 256): (10, 22)}
TARGETS[100_000, 512] = (18, 42)
# Useful floating-point operations for one (pixel, Gaussian) pair, an FMA counted as two.
FLOPS_FORWARD, FLOPS_BACKWARD = 32, 78
TURNS = {1_000: 10, 10_000: 4, 100_000: 2}  # runs of a case at its turn
REFERENCE_LIMIT = 5e7  # pixels x Gaussians that the dense renderer gets


def scene(num: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Gaussians:
    """Gaussians on a bumpy shell of radius 0.45 whose sizes keep it covered for any number."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, generator=generator)

    direction = torch.nn.functional.normalize(normal(num, 3), dim=-1)
    means = 0.45 * direction * (1 + 0.15 * torch.sin(6 * direction[..., :1]))
    spacing = (4 * np.pi * 0.45**2 / num) ** 0.5
    scales = 0.7 * spacing * torch.exp(0.4 * normal(num, 3)) * torch.tensor([1.0, 1.0, 0.4])
    opacities = 0.1 + 0.9 * torch.rand(*batch, num, generator=generator)
    colors = torch.rand(*batch, num, 3, generator=generator)
    return Gaussians(means, normal(num, 4), scales, opacities, colors)


def view(size: int, azimuths: torch.Tensor | None = None) -> Cameras:
    azimuths = torch.tensor([30.0]) if azimuths is None else azimuths
    options = {"pivot": torch.zeros(3), "focal_px": 1.2 * size, "width": size, "height": size}
    return orbit(azimuths, 15.0, 2.2, **options)  # type: ignore[arg-type]


def leaves(gaussians: Gaussians) -> tuple[Gaussians, list[torch.Tensor]]:
    names = ("means", "quats", "scales", "opacities", "colors")
    tensors = [getattr(gaussians, name).detach().clone().requires_grad_() for name in names]
    return Gaussians(*tensors), tensors


def forward_ms(gaussians: Gaussians, cameras: Cameras, **options: Any) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        render(gaussians, cameras, **options)
    return (time.perf_counter() - start) * 1e3


def both_ms(gaussians: Gaussians, cameras: Cameras, slope: torch.Tensor, **options: Any) -> float:
    gaussians, tensors = leaves(gaussians)
    start = time.perf_counter()
    views = render(gaussians, cameras, **options)
    torch.autograd.grad(views.rgb, tensors, slope.to(views.rgb))
    return (time.perf_counter() - start) * 1e3


@numba.njit(nogil=True)
def _fma_loop(memory, rounds):  # type: ignore[no-untyped-def]
    x, y = load(memory, 0), load(memory, 16)
    a, b, c, d, e, f, g, h, i, j = x, x, x, x, x, x, x, x, x, x
    for _ in range(rounds):
        a, b, c, d, e = fma(a, y, x), fma(b, y, x), fma(c, y, x), fma(d, y, x), fma(e, y, x)
        f, g, h, i, j = fma(f, y, x), fma(g, y, x), fma(h, y, x), fma(i, y, x), fma(j, y, x)
    store(memory, 0, a + b + c + d + e + f + g + h + i + j)


def peak_gflops(threads: int) -> float:
    """Single-precision FMA throughput of `threads` threads, measured."""
    from concurrent.futures import ThreadPoolExecutor

    rounds = 2_000_000
    memories = [np.full(32, 0.5, np.float32) for _ in range(threads)]
    _fma_loop(memories[0], 1)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(lambda memory: _fma_loop(memory, rounds), memories))
            best = max(best, threads * rounds * 320 / (time.perf_counter() - start) / 1e9)
    return best


@numba.njit
def _count_pairs(centers, conics, reach, opacities, size):  # type: ignore[no-untyped-def]
    left = np.ones((size, size))
    pairs = 0
    for n in range(len(centers)):
        u, v = centers[n]
        a, b, c = conics[n]
        for y in range(max(0, int(v - reach[n])), min(size, int(v + reach[n]) + 2)):
            for x in range(max(0, int(u - reach[n])), min(size, int(u + reach[n]) + 2)):
                dx, dy = x + 0.5 - u, y + 0.5 - v
                sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
                alpha = min(0.999, opacities[n] * np.exp(-sigma))
                if alpha >= 1 / 255 and left[y, x] > 0:
                    pairs += 1
                    after = left[y, x] * (1 - alpha)
                    left[y, x] = after if after > 1e-4 else 0.0
    return pairs


def touched_pairs(gaussians: Gaussians, cameras: Cameras) -> int:
    """(pixel, Gaussian) pairs that contribute, counted one by one."""
    means, quats, scales, opacities = (
        getattr(gaussians, name).double() for name in ("means", "quats", "scales", "opacities")
    )
    viewmat, K, size = cameras.viewmats[0].double(), cameras.Ks[0].double(), cameras.width
    order = torch.argsort(means @ viewmat[2, :3], stable=True)
    centers, covariances, _ = reference.project(
        means[order], quats[order], scales[order], viewmat, K, size, size, 0.3
    )
    inverse = torch.linalg.inv(covariances)
    conics = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)
    reach = 3.33 * covariances.diagonal(dim1=-2, dim2=-1).amax(-1).sqrt()
    return int(
        _count_pairs(centers.numpy(), conics.numpy(), reach.numpy(), opacities[order].numpy(), size)
    )


def executed_lanes(views: Views) -> int:
    """Lanes that the forward pass's inner loop ran for the blocks that were reached."""
    return 16 * int(np.bitwise_count(cpu.touched(views.rgb)).sum())


class Outside:
    """Within it, time spent in kernels is counted, so that the rest can be told from it."""

    def __enter__(self) -> Outside:
        self.run, self.inside_ms = cpu.run, 0.0

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            progress = self.run(*args)
            self.inside_ms += (time.perf_counter() - start) * 1e3
            return progress

        cpu.run = timed
        return self

    def __exit__(self, *_: object) -> None:
        cpu.run = self.run


def turn(
    case: tuple[Any, ...], count: int, times: dict[tuple[Any, ...], list[float]], key: Any
) -> None:
    """Run a case as often as its turn has runs; note the last, and what the remarks want."""
    gaussians, cameras, slope = case[:3]
    options = {"threads": count, "backend": "cpu"}
    for name, function in (("forward", forward_ms), ("both", both_ms)):
        arguments = (gaussians, cameras, *([slope] if name == "both" else []))
        for k in range(TURNS[gaussians.num]):
            with Outside() as outside:
                elapsed = function(*arguments, **options)  # type: ignore[operator]
            if k == 0 and name == "forward":
                times.setdefault((*key, "forward_cold"), []).append(elapsed)
        times.setdefault((*key, name), []).append(elapsed)
        times.setdefault((*key, name + "_outside"), []).append(elapsed - outside.inside_ms)
        reuse, cpu._pool.limit = cpu._pool.limit, 0
        for _ in range(2):
            elapsed = function(*arguments, **options)  # type: ignore[operator]
        cpu._pool.limit = reuse
        times.setdefault((*key, name + "_fresh"), []).append(elapsed)


def measure(rounds: int, threads: list[int]) -> dict[str, Any]:
    cases = {}
    for num, size in SIZES:
        gaussians, cameras = scene(num), view(size)
        slope = torch.randn(1, size, size, 3, generator=torch.Generator().manual_seed(1))
        lanes = executed_lanes(render(leaves(gaussians)[0], cameras))
        cases[num, size] = (gaussians, cameras, slope, touched_pairs(gaussians, cameras), lanes)
    times: dict[tuple[int, int, Any, str], list[float]] = {}
    for _ in range(rounds):
        for (num, size), case in cases.items():
            for count in threads:
                turn(case, count, times, (num, size, count))
    for (num, size), (gaussians, cameras, slope, _, _) in cases.items():
        if num * size**2 <= REFERENCE_LIMIT:
            forward = [forward_ms(gaussians, cameras, backend="reference") for _ in range(3)]
            both = [both_ms(gaussians, cameras, slope, backend="reference") for _ in range(3)]
            times[num, size, "reference", "forward"] = forward
            times[num, size, "reference", "both"] = both
    peaks = {count: peak_gflops(count) for count in threads}
    rows = []
    for num, size in SIZES:
        pairs, lanes = cases[num, size][3:]
        for who in [*threads, "reference"]:
            if (num, size, who, "forward") not in times:
                continue
            forward, both = (
                float(np.median(times[num, size, who, what])) for what in ("forward", "both")
            )
            row = {"gaussians": num, "pixels": size, "who": who, "pairs": pairs}
            row |= {"forward_ms": forward, "both_ms": both, "live_lanes": pairs / lanes}
            row |= {"forward_ns_per_pair": forward * 1e6 / pairs}
            if who != "reference":
                flops = (FLOPS_FORWARD + FLOPS_BACKWARD) * pairs
                row |= {"peak_share_forward": FLOPS_FORWARD * pairs / forward / 1e6 / peaks[who]}
                row |= {"peak_share_both": flops / both / 1e6 / peaks[who]}
                for what in ("cold", "outside", "fresh"):
                    for name in ("forward", "both"):
                        if measured := times.get((num, size, who, f"{name}_{what}")):
                            row[f"{name}_{what}_ms"] = float(np.median(measured))
            rows.append(row)
    return {"machine": processor(), "rounds": rounds, "peak_gflops": peaks, "rows": rows}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {numba.config.NUMBA_DEFAULT_NUM_THREADS} cores"  # type: ignore[attr-defined]


def table(result: dict[str, Any]) -> str:
    peaks = {int(count): value for count, value in result["peak_gflops"].items()}
    busy = any(value < 0.85 * count * peaks.get(1, 0) for count, value in peaks.items())
    lines = ["**The cores were busy with other work: run this again.**", ""] if busy else []
    lines += [
        f"{result['machine']}; FMA peak measured: "
        + ", ".join(f"{v:.0f} GFLOP/s on {k} threads" for k, v in result["peak_gflops"].items())
        + f"; medians of {result['rounds']} interleaved rounds. Targets are for 2 threads.",
        "",
        "| Gaussians | px | who | forward ms | target | forward + backward ms | target | pairs | "
        "ns/pair | live lanes | of peak, fwd | of peak, fwd+bwd |",
        "|--:|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        ours = row["who"] != "reference"
        who = f"cpu, {row['who']} threads" if ours else "reference"
        target = TARGETS.get((row["gaussians"], row["pixels"])) if row["who"] == 2 else None
        share = [f"{row[k]:.0%}" if ours else "" for k in ("peak_share_forward", "peak_share_both")]
        cells = [
            f"{row['gaussians']:,}", row["pixels"], who,
            f"{row['forward_ms']:.2f}", target[0] if target else "",
            f"{row['both_ms']:.2f}", target[1] if target else "",
            f"{row['pairs'] / 1e6:.2f} M", f"{row['forward_ns_per_pair']:.2f}",
            f"{row['live_lanes']:.0%}" if ours else "", *share,
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", *remarks(result)]) + "\n"


def remarks(result: dict[str, Any]) -> list[str]:
    """Beside the table: the time outside kernels, cold caches, and what reusing memory gives."""
    ours = {(r["gaussians"], r["pixels"]): r for r in result["rows"] if r["who"] == 2}
    if not ours:
        return []

    def pair(row: dict[str, Any], what: str) -> str:
        return f"{row[f'forward{what}_ms']:.2f} / {row[f'both{what}_ms']:.2f} ms"

    small = ours[1_000, 128]
    fresh = (f"{n:,} at {size} px {pair(ours[n, size], '_fresh')}" for n, size in TARGETS)
    return [
        "Two threads, forward / forward + backward. Of 1,000 at 128 px, outside the kernels "
        f"(argument checks, allocation, autograd): {pair(small, '_outside')}; the first forward "
        f"call after other sizes, with cold caches, takes {small['forward_cold_ms']:.2f} ms. With "
        f"fresh memory for every pass instead of reused memory: {'; '.join(fresh)}.",
    ]


def picture(result: dict[str, Any], path: Path, gpu: Path) -> None:
    """Time against N at 256 px (the reference where it fits, at 128 px)."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    rows = list(result["rows"])
    if gpu.is_file():
        rows += json.loads(gpu.read_text())["rows"]
    for axis, key, title in zip(
        axes, ("forward_ms", "both_ms"), ("forward", "forward + backward"), strict=True
    ):
        for who in dict.fromkeys(row["who"] for row in rows):
            size = 128 if who == "reference" else 256
            points = [
                (row["gaussians"], row[key])
                for row in rows
                if row["who"] == who and row["pixels"] == size and key in row
            ]
            if points:
                label = f"cpu, {who} threads" if isinstance(who, int) else str(who)
                axis.loglog(*zip(*points, strict=True), "o-", label=f"{label}, {size} px")
        axis.set(xlabel="Gaussians", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms per view")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    # Torch's idle OpenMP threads spin for a while after every operation, on the cores we time.
    torch.set_num_threads(1)
    result = measure(arguments.rounds, arguments.threads)
    (arguments.out / "render.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "render.md").write_text(table(result))
    picture(result, arguments.out / "render.png", arguments.out / "render_gpu.json")
    print(table(result))


if __name__ == "__main__":
    main()
