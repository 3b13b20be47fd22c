"""cpu, reference and gsplat on the same scenes, and what our gsplat adapter costs. Needs a GPU.

    python benchmarks/render_gpu.py [--out benchmarks]

Writes render_gpu.json and render_gpu.md. Two renderers may disagree where an opacity sits on the
1/255 threshold, by that step; so an image agrees when all but one pixel in a thousand are within
1e-3 and the rest within 5/255. Gradients agree within 1e-2 (relative, L2).

Where many Gaussians overlap, some of a pixel's depths are equal to the last bit of float32, and
their order, which the colour depends on, is a matter of rounding. How much that is worth is
measured, not argued: "gsplat / itself + 1 ulp" renders the same scene with gsplat twice, every
mean moved to the next float32. A pair that misses the bounds above but stays within three times
that noise is marked "as itself".
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from render import SIZES, leaves, scene, view

from fresnel.render import Views, render
from fresnel.scene.cameras import Cameras
from fresnel.scene.gaussians import Gaussians

DENSE_LIMIT = 3e8  # pixels x Gaussians that the reference gets, float64, on the GPU
NUDGED = "itself + 1 ulp"
PAIRS = (("cpu", "gsplat"), ("cpu", "reference"), ("gsplat", "reference"), ("gsplat", NUDGED))
NAMES = ("means", "quats", "scales", "opacities", "colors")


def run(
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
    gradient = {
        name: float(torch.linalg.norm(x - y) / torch.linalg.norm(y).clamp_min(1e-30))
        for name, x, y in zip(NAMES, a[1], b[1], strict=True)
    }
    over = float((difference > 1e-3).double().mean())
    worst = float(difference.max())
    agrees = over <= 1e-3 and worst <= 5 / 255 and max(gradient.values()) <= 1e-2
    return {
        "image_max": worst,
        "pixels_over_1e-3": over,
        "gradient_max": max(gradient.values()),
        "gradients": gradient,
        "agrees": agrees,
    }


def seconds(function: Callable[[], Any], rounds: int = 10) -> float:
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def overhead(
    scenes: int = 64, views: int = 8, num: int = 16_384, size: int = 256
) -> dict[str, Any]:
    """Views per second through `render` and through gsplat called directly, taking turns."""
    from gsplat import rasterization

    gaussians, tensors = leaves(scene(num, batch=(scenes,)).to("cuda"))
    single = view(size, torch.linspace(0, 315, views)).to("cuda")
    cameras = Cameras(
        single.viewmats.expand(scenes, views, 4, 4).contiguous(),
        single.Ks.expand(scenes, views, 3, 3).contiguous(),
        size,
        size,
    )

    def ours() -> torch.Tensor:
        return render(gaussians, cameras).rgb

    def direct() -> torch.Tensor:
        return rasterization(
            *tensors, cameras.viewmats, cameras.Ks, size, size, packed=False, render_mode="RGB+ED"
        )[0][..., :3]

    def both(function: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function().sum(), tensors)

    def silent(function: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(function)

    result: dict[str, Any] = {"scenes": scenes, "views": views, "gaussians": num, "pixels": size}
    for name, wrap in (("forward", silent), ("forward_backward", both)):
        wrap(ours)(), wrap(direct)()
        times: dict[str, list[float]] = {"ours": [], "direct": []}
        for _ in range(5):
            times["ours"].append(seconds(wrap(ours), 3))
            times["direct"].append(seconds(wrap(direct), 3))
        ours_s, direct_s = (sorted(times[key])[2] for key in ("ours", "direct"))
        result[name] = {
            "views_per_s_ours": scenes * views / ours_s,
            "views_per_s_gsplat": scenes * views / direct_s,
            "overhead": ours_s / direct_s - 1,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    rows, lines = [], []
    for num, size in SIZES:
        gaussians, cameras = scene(num), view(size)
        results = {
            "cpu": run(gaussians, cameras, "cpu", "cpu"),
            "gsplat": run(gaussians, cameras, "gsplat", "cuda"),
        }
        nudged = torch.nextafter(gaussians.means, torch.full_like(gaussians.means, torch.inf))
        results[NUDGED] = run(replace(gaussians, means=nudged), cameras, "gsplat", "cuda")
        if num * size**2 <= DENSE_LIMIT:
            results["reference"] = run(gaussians, cameras, "reference", "cuda")
        row: dict[str, Any] = {"gaussians": num, "pixels": size, "who": "gsplat"}
        device, moved = gaussians.to("cuda"), cameras.to("cuda")
        slope = torch.ones(1, size, size, 3, device="cuda")

        def both(gaussians=device, cameras=moved, slope=slope) -> None:
            g, tensors = leaves(gaussians)
            torch.autograd.grad(render(g, cameras).rgb, tensors, slope)

        row["forward_ms"] = seconds(torch.no_grad()(lambda g=device, c=moved: render(g, c))) * 1e3
        row["both_ms"] = seconds(both) * 1e3
        noise = compare(results["gsplat"], results[NUDGED])
        for a, b in PAIRS:
            if b in results:
                row[f"{a}_{b}"] = found = compare(results[a], results[b])
                keys = ("pixels_over_1e-3", "gradient_max")
                alike = all(found[key] <= 3 * noise[key] for key in keys)
                found["within_noise"] = alike
                word = "yes" if found["agrees"] else "as itself" if alike else "NO"
                lines.append(
                    f"| {num:,} | {size} | {a} / {b} | {found['image_max']:.1e} | "
                    f"{found['pixels_over_1e-3']:.3%} | {found['gradient_max']:.1e} | {word} |"
                )
                print(lines[-1], flush=True)
        rows.append(row)
    cost = overhead()
    name = torch.cuda.get_device_name()
    text = [
        f"{name}, torch {torch.__version__}, gsplat 1.5.3",
        "",
        "| Gaussians | px | pair | image max | pixels over 1e-3 | gradients, rel. L2 | agree |",
        "|--:|--:|:--|--:|--:|--:|:--|",
        *lines,
        "",
        "{scenes} scenes x {views} views x {gaussians:,} Gaussians at {pixels} px:".format(**cost),
        "",
        "| | views/s, ours | views/s, gsplat | overhead |",
        "|:--|--:|--:|--:|",
    ]
    for what in ("forward", "forward_backward"):
        c = cost[what]
        text.append(
            f"| {what} | {c['views_per_s_ours']:,.0f} | {c['views_per_s_gsplat']:,.0f} | "
            f"{c['overhead']:+.1%} |"
        )
    result = {"machine": name, "rows": rows, "overhead": cost}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "render_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "render_gpu.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
