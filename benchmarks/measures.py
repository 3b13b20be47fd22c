"""What the distances say of known distortions, and what one unit of them is.

    python benchmarks/measures.py                      # 4 minutes on two cores

Distorts true views of the embedded held-out objects and measures every distance that is on this
machine, over black, over grey and over white.  Writes measures.md beside itself.
"""

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from fresnel.evaluation import metrics, perceptual
from fresnel.objects import sources

Distortion = Callable[[Tensor], Tensor]
BACKGROUNDS = {"black": 0.0, "grey": 0.5, "white": 1.0}


def over(rgba: Tensor, background: float) -> Tensor:
    """Premultiplied pictures (N, H, W, 4) over a grey: (N, H, W, 3)."""
    return (rgba[..., :3] + background * (1 - rgba[..., 3:])).clamp(0, 1)


def shift(pixels: int) -> Distortion:
    return lambda x: torch.roll(x, pixels, 2)


def blur(sigma: float) -> Distortion:
    return lambda x: torch.from_numpy(gaussian_filter(x.numpy(), (0, sigma, sigma, 0)))


def noise(sigma: float) -> Distortion:
    def distort(x: Tensor) -> Tensor:
        out = x.clone()
        drawn = torch.randn(x[..., :3].shape, generator=torch.Generator().manual_seed(0))
        out[..., :3] = (out[..., :3] + sigma * drawn * x[..., 3:]).clamp(0, 1)
        return torch.minimum(out, out[..., 3:].maximum(x[..., 3:]))

    return distort


def light(factor: float) -> Distortion:
    return lambda x: x * x.new_tensor([factor, factor, factor, 1.0])


def without_detail(x: Tensor) -> Tensor:
    """Every object in its mean colour, its outline exact."""
    colour = x[..., :3].sum((1, 2), keepdim=True) / x[..., 3:].sum((1, 2), keepdim=True)
    return torch.cat([colour * x[..., 3:], x[..., 3:]], dim=-1)


def jpeg(pictures: Tensor, quality: int) -> Tensor:
    """Pictures (N, H, W, 3) as that quality keeps them."""
    out = []
    for picture in (pictures * 255).round().to(torch.uint8).numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
        out.append(torch.from_numpy(np.array(Image.open(buffer))).float() / 255)
    return torch.stack(out)


DISTORTIONS: dict[str, Distortion] = {
    **{f"shifted by {n} px": shift(n) for n in (1, 2, 4)},
    **{f"blurred, sigma {s} px": blur(s) for s in (0.5, 1, 2, 4)},
    **{f"noise, sigma {s}": noise(s) for s in (0.02, 0.05, 0.1)},
    **{f"light x {f}": light(f) for f in (0.9, 0.7, 0.1)},
    "one colour, exact outline": without_detail,
    "another object": lambda x: torch.roll(x, len(x) // 8, 0),
    "the mean picture": lambda x: x.mean(0, keepdim=True).expand_as(x),
    "nothing": torch.zeros_like,
}


@torch.no_grad()
def table(rgba: Tensor, between: perceptual.Perceptual) -> list[str]:
    """A row a distortion: PSNR over white, then mean and spread over views by background."""
    lines = [
        f"| distortion | PSNR, dB | {' | '.join(f'over {name}' for name in BACKGROUNDS)} |",
        "|---|--:|--:|--:|--:|",
    ]

    def row(name: str, made: Callable[[float], Tensor]) -> str:
        cells = [f"{metrics.psnr(made(1.0), over(rgba, 1.0)).mean():.1f}"]
        for background in BACKGROUNDS.values():
            found = between(made(background), over(rgba, background))
            cells.append(f"{found.mean():.2f} ± {found.std():.2f}")
        return f"| {name} | {' | '.join(cells)} |"

    for name, distort in DISTORTIONS.items():
        distorted = distort(rgba)
        lines.append(row(name, lambda grey, made=distorted: over(made, grey)))
    for quality in (75, 30, 10):
        lines.append(
            row(f"JPEG, quality {quality}", lambda grey, q=quality: jpeg(over(rgba, grey), q))
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    data = sources.ground_truth("embedded", "held_out", image_size=args.size)
    views = data.tensors(size=args.size, device="cpu")
    rgba = torch.cat([views.rgb, views.alpha[..., None]], dim=-1)[:, ::4].flatten(0, 1) / 255.0
    lines = [
        f"# Distances of known distortions, {args.size} px",
        "",
        f"Made by `python benchmarks/measures.py`. {len(rgba)} true views of {len(views)} embedded",
        "held-out objects; mean ± standard deviation over views. A unit is a shift by one pixel",
        "at 128 px over white.",
    ]
    found, missing = perceptual.find()
    for name, between in found.items():
        began = time.perf_counter()
        lines += ["", f"## {name}", "", *table(rgba, between)]
        took = (time.perf_counter() - began) / (len(DISTORTIONS) + 3) / len(BACKGROUNDS)
        threads = torch.get_num_threads()
        lines += ["", f"{took / len(rgba) * 1e3:.0f} ms a view on {threads} threads."]
    lines += [f"\n{name} was not measured: it needs {what}." for name, what in missing.items()]
    args.out.write_text("\n".join(lines) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
