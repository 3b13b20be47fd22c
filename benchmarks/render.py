"""How fast the renderers are, how near to what the machine can do, and whether they agree.

    python benchmarks/render.py [--rounds 15]        # the CPU rasteriser: render.json, render.md
    python benchmarks/render.py --device cuda        # gsplat, against the others: render_gpu.*

Renders an object-like scene (Gaussians on a bumpy shell, wide enough to cover it). Every figure is
the median of rounds in which all cases take turns, so that a busy moment does not fall on one of
them; at its turn a case runs a few times and the last run counts, as in a loop.

Two renderers may disagree where an opacity sits on the 1/255 threshold, by that step; so an image
agrees when all but one pixel in a thousand are within 1e-3 and the rest within 5/255, and gradients
within 1e-2 (relative, L2). Where many Gaussians overlap, some of a pixel's depths are equal to the
last bit of float32, and their order is a matter of rounding. How much that is worth is measured:
"gsplat / itself + 1 ulp" renders the same scene with every mean moved to the next float32. A pair
that misses the bounds but stays within three times that noise is marked "as itself".
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from fresnel.render import Views, cpu, reference, render
from fresnel.render.kernels.simd import fma, load, store
from fresnel.report.provenance import machine
from fresnel.scene.cameras import Cameras, orbit
from fresnel.scene.gaussians import Gaussians

NAMES = ("means", "quats", "scales", "opacities", "colors")
SIZES = [(n, size) for n in (1_000, 10_000, 100_000) for size in (128, 256, 512)]
TARGETS = {(1_000, 128): (0.25, 0.7), (10_000, 256): (2, 5), (100_000, 256): (10, 22)}
TARGETS[100_000, 512] = (18, 42)  # ms forward, ms with backward, on two threads
# Useful floating-point operations for one (pixel, Gaussian) pair, an FMA counted as two.
FLOPS_FORWARD, FLOPS_BACKWARD = 32, 78
TURNS = {1_000: 10, 10_000: 4, 100_000: 2}  # runs of a case at its turn
DENSE_LIMIT = 3e8  # pixels x Gaussians that the reference gets
NUDGED = "itself + 1 ulp"
PAIRS = (("cpu", "gsplat"), ("cpu", "reference"), ("gsplat", "reference"), ("gsplat", NUDGED))


def scene(num: int, seed: int = 0) -> Gaussians:
    """Gaussians on a bumpy shell of radius 0.45 whose sizes keep it covered for any number."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    direction = torch.nn.functional.normalize(normal(num, 3), dim=-1)
    means = 0.45 * direction * (1 + 0.15 * torch.sin(6 * direction[..., :1]))
    spacing = (4 * np.pi * 0.45**2 / num) ** 0.5
    scales = 0.7 * spacing * torch.exp(0.4 * normal(num, 3)) * torch.tensor([1.0, 1.0, 0.4])
    opacities = 0.1 + 0.9 * torch.rand(num, generator=generator)
    colors = torch.rand(num, 3, generator=generator)
    return Gaussians(means, normal(num, 4), scales, opacities, colors)


def view(size: int) -> Cameras:
    return orbit(
        torch.tensor([30.0]), 15.0, 2.2,
        pivot=torch.zeros(3), focal_px=1.2 * size, width=size, height=size,
    )  # fmt: skip


def leaves(gaussians: Gaussians) -> tuple[Gaussians, list[torch.Tensor]]:
    tensors = [getattr(gaussians, name).detach().clone().requires_grad_() for name in NAMES]
    return Gaussians(*tensors), tensors


def forward(gaussians: Gaussians, cameras: Cameras) -> None:
    with torch.no_grad():
        render(gaussians, cameras)


def both(gaussians: Gaussians, cameras: Cameras) -> None:
    gaussians, tensors = leaves(gaussians)
    rgb = render(gaussians, cameras).rgb
    torch.autograd.grad(rgb, tensors, torch.ones_like(rgb))


def elapsed_ms(function: Callable[..., Any], *args: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
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


def touched_pairs(gaussians: Gaussians, cameras: Cameras) -> int:
    """(pixel, Gaussian) pairs that contribute, counted row by row of the dense reference."""
    means, quats, scales, opacities = (getattr(gaussians, name).double() for name in NAMES[:4])
    viewmat, K, size = cameras.viewmats[0].double(), cameras.Ks[0].double(), cameras.width
    order = torch.argsort(means @ viewmat[2, :3], stable=True)
    centers, covariances, _ = reference.project(
        means[order], quats[order], scales[order], viewmat, K, size, size, 0.3
    )
    reach = 3.33 * covariances[:, 1, 1].sqrt()
    pairs = 0
    for y in range(size):
        near = (centers[:, 1] - y - 0.5).abs() <= reach
        down = centers[near] - torch.tensor([0.0, y])
        alpha = reference.alphas(down, covariances[near], opacities[order][near], size, 1)
        before = torch.cumprod(1 - alpha, 0) / (1 - alpha)
        pairs += int(((alpha > 0) & (before > 1e-4)).sum())
    return pairs


def measure(rounds: int, threads: list[int]) -> dict[str, Any]:
    cases = {(num, size): (scene(num), view(size)) for num, size in SIZES}
    times: dict[Any, list[float]] = {}
    for _ in range(rounds):
        for (num, size), case in cases.items():
            for count in threads:
                cpu._threads = lambda projections, pixels, count=count: count
                for function in (forward, both):
                    last = [elapsed_ms(function, *case) for _ in range(TURNS[num])][-1]
                    times.setdefault((num, size, count, function.__name__), []).append(last)
    peaks = {count: peak_gflops(count) for count in threads}
    rows = []
    for num, size in SIZES:
        pairs = touched_pairs(*cases[num, size])
        for who in threads:
            ms = [float(np.median(times[num, size, who, name])) for name in ("forward", "both")]
            row = {"gaussians": num, "pixels": size, "who": who, "pairs": pairs}
            row |= {"forward_ms": ms[0], "both_ms": ms[1]}
            row["forward_ns_per_pair"] = ms[0] * 1e6 / pairs
            row["peak_share_forward"] = FLOPS_FORWARD * pairs / ms[0] / 1e6 / peaks[who]
            flops = (FLOPS_FORWARD + FLOPS_BACKWARD) * pairs
            row["peak_share_both"] = flops / ms[1] / 1e6 / peaks[who]
            rows.append(row)
    return {
        "machine": "{model}, {count} cores".format(**machine()["cpu"]),
        "rounds": rounds,
        "peak_gflops": peaks,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    peaks = {int(count): value for count, value in result["peak_gflops"].items()}
    busy = any(value < 0.85 * count * peaks.get(1, 0) for count, value in peaks.items())
    lines = ["**The cores were busy with other work: run this again.**", ""] if busy else []
    lines += [
        f"{result['machine']}; FMA peak measured: "
        + ", ".join(f"{v:.0f} GFLOP/s on {k} threads" for k, v in peaks.items())
        + f"; medians of {result['rounds']} interleaved rounds. Targets are for 2 threads.",
        "",
        "| Gaussians | px | threads | forward ms | target | forward + backward ms | target | pairs "
        "| ns/pair | of peak, fwd | of peak, fwd+bwd |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        target = TARGETS.get((row["gaussians"], row["pixels"])) if row["who"] == 2 else None
        cells = [
            f"{row['gaussians']:,}", row["pixels"], row["who"],
            f"{row['forward_ms']:.2f}", target[0] if target else "",
            f"{row['both_ms']:.2f}", target[1] if target else "",
            f"{row['pairs'] / 1e6:.2f} M", f"{row['forward_ns_per_pair']:.2f}",
            f"{row['peak_share_forward']:.0%}", f"{row['peak_share_both']:.0%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def images_and_gradients(
    gaussians: Gaussians, cameras: Cameras, backend: str, device: str
) -> tuple[Views, list[torch.Tensor]]:
    """Views, and the gradients of a fixed weighted sum of them, brought to the CPU in float64."""
    gaussians, tensors = leaves(gaussians.to(device))
    views = render(gaussians, cameras.to(device), backend=backend)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(image.shape, generator=generator) for image in (views.rgb, views.alpha)]
    images = (views.rgb, views.alpha)
    loss = sum((i * w.to(i)).sum() for i, w in zip(images, weights, strict=True))
    grads = torch.autograd.grad(loss, tensors)
    images = (i.detach().cpu().double() for i in (views.rgb, views.alpha, views.depth))
    return Views(*images), [grad.cpu().double() for grad in grads]


def compare(a: tuple[Views, list], b: tuple[Views, list]) -> dict[str, Any]:
    difference = (a[0].rgb - b[0].rgb).abs().amax(-1)
    worst, over = float(difference.max()), float((difference > 1e-3).double().mean())
    gradient = max(
        float(torch.linalg.norm(x - y) / torch.linalg.norm(y).clamp_min(1e-30))
        for x, y in zip(a[1], b[1], strict=True)
    )
    agrees = over <= 1e-3 and worst <= 5 / 255 and gradient <= 1e-2
    found = {"image_max": worst, "pixels_over_1e-3": over, "gradient_max": gradient}
    return found | {"agrees": agrees}


def on_gpu() -> tuple[dict[str, Any], str]:
    rows, lines = [], []
    for num, size in SIZES:
        gaussians, cameras = scene(num), view(size)
        device, moved = gaussians.to("cuda"), cameras.to("cuda")
        nudged = torch.nextafter(gaussians.means, torch.full_like(gaussians.means, torch.inf))
        results = {
            "cpu": images_and_gradients(gaussians, cameras, "cpu", "cpu"),
            "gsplat": images_and_gradients(gaussians, cameras, "gsplat", "cuda"),
            NUDGED: images_and_gradients(
                replace(gaussians, means=nudged), cameras, "gsplat", "cuda"
            ),
        }
        if num * size**2 <= DENSE_LIMIT:
            results["reference"] = images_and_gradients(gaussians, cameras, "reference", "cuda")
        row: dict[str, Any] = {"gaussians": num, "pixels": size, "who": "gsplat"}
        for function in (forward, both):
            found = [elapsed_ms(function, device, moved) for _ in range(11)][1:]
            row[f"{function.__name__}_ms"] = float(np.median(found))
        noise = compare(results["gsplat"], results[NUDGED])
        for a, b in PAIRS:
            if b in results:
                row[f"{a}_{b}"] = found = compare(results[a], results[b])
                keys = ("pixels_over_1e-3", "gradient_max")
                alike = all(found[key] <= 3 * noise[key] for key in keys)
                word = "yes" if found["agrees"] else "as itself" if alike else "NO"
                lines.append(
                    f"| {num:,} | {size} | {a} / {b} | {found['image_max']:.1e} | "
                    f"{found['pixels_over_1e-3']:.3%} | {found['gradient_max']:.1e} | {word} |"
                )
        rows.append(row)
    name = torch.cuda.get_device_name()
    head = [
        f"{name}, torch {torch.__version__}, gsplat 1.5.3",
        "",
        "| Gaussians | px | pair | image max | pixels over 1e-3 | gradients, rel. L2 | agree |",
        "|--:|--:|:--|--:|--:|--:|:--|",
    ]
    return {"machine": name, "rows": rows}, "\n".join([*head, *lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    # Torch's idle OpenMP threads spin for a while after every operation, on the cores we time.
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cuda":
        name, (result, text) = "render_gpu", on_gpu()
    else:
        name, result = "render", measure(arguments.rounds, arguments.threads)
        text = table(result)
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
