"""Poses against opaque photographs: how often matched features judge rooms rightly.

    python benchmarks/gate_rooms.py [--seeds 3] [--out rooms.json]

Rooms are ray-cast: six walls and a box in the middle, textured with blotches, smooth noise, a
repeating brick photograph, or the photographs that scikit-image ships, seen by six cameras that
look inward or walk sideways, with short and long lenses and small and large steps.  Prints, by
texture and step, how many rooms are judged, how many healthy ones are refused (false alarms), and
how many of each fault are.  Last comes a real pair: Middlebury's motorcycle (scikit-image), with
its published calibration and with wrong ones.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fresnel import faults
from fresnel.data.dataset import ObjectViews
from fresnel.gate import epipolar
from fresnel.gate.findings import GateConfig
from fresnel.scene.cameras import Cameras, orbit

TEXTURES = ("blotches", "smooth", "bricks", "photographs")
FOCALS, STEPS_DEG = (0.6, 0.9, 1.8), (3.0, 8.0, 15.0, 25.0)
FAULTS = {
    "inverted_extrinsics": 1.0,
    "transposed_rotations": 1.0,
    "opengl_axes": 1.0,
    "opengl_camera_to_world": 1.0,
    "reversed_azimuth": 1.0,
    "rolled_poses": 1.0,
    "shuffled_poses": 1.0,
    "jittered_poses": 0.5,
    "wrong_focal": 0.5,
    "wrong_focal ": 1.0,
    "wrong_principal_point": 0.5,
    "mirrored_views": 1.0,
}


@functools.cache
def _pictures() -> list[np.ndarray]:
    from skimage import data
    from skimage.transform import resize

    chosen = (data.astronaut, data.chelsea, data.coffee, data.rocket, data.retina, data.camera)
    square = []
    for load in chosen:
        picture = load()
        picture = np.stack([picture] * 3, -1) if picture.ndim == 2 else picture[..., :3]
        square.append(resize(picture, (512, 512), anti_aliasing=True).astype(np.float32))
    return square


def _paint(name: str, wall: np.ndarray, uv: np.ndarray, seed: int) -> np.ndarray:
    """Colours (..., 3) in [0, 1] at surface coordinates uv in [0, 1] of walls numbered 0 to 11."""
    out = np.zeros((*wall.shape, 3), np.float32)
    rng = np.random.default_rng(seed)
    for k in range(12):
        here = wall == k
        if name == "bricks":
            from skimage import data

            texture = np.repeat(np.tile(data.brick()[::2, ::2], (2, 2))[..., None], 3, -1) / 255.0
        elif name == "photographs":
            texture = np.rot90(_pictures()[(k + seed) % 6], k // 6)
        else:
            cells = 24 if name == "blotches" else 5
            coarse = torch.from_numpy(rng.random((1, 3, cells, cells))).float()
            mode = "nearest" if name == "blotches" else "bicubic"
            fine = torch.nn.functional.interpolate(coarse, (512, 512), mode=mode)
            texture = fine[0].permute(1, 2, 0).clamp(0, 1).numpy()
        side = len(texture) - 1
        at = (np.clip(uv[here], 0, 1) * side).astype(int)
        out[here] = texture[at[:, 1], at[:, 0]]
    return out


def room(
    texture: str, focal: float, step_deg: float, seed: int, *, size: int = 160, views: int = 6
) -> ObjectViews:
    """Six opaque views of a room, 4 units wide, with a box in it."""
    rng = np.random.default_rng([seed, round(10 * focal), round(step_deg)])
    optics: dict[str, Any] = {"focal_px": focal * size, "width": size, "height": size}
    azimuth = rng.uniform(0, 360) + step_deg * torch.arange(views)
    elevation = torch.from_numpy(10 + rng.uniform(-4, 4, views)).float()
    inward = orbit(azimuth, elevation, 1.5, pivot=(0.0, 0.0, 0.0), **optics)
    cameras = inward if seed % 2 == 0 else _walk(inward, step_deg)
    origins, directions = cameras.resized(2 * size, 2 * size).rays()
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    far = torch.maximum((-2 - origins) * inverse, (2 - origins) * inverse)
    box = torch.tensor([0.4, 0.5, 0.3])
    ends = (-box - origins) * inverse, (box - origins) * inverse
    near, leave = torch.minimum(*ends).max(-1), torch.maximum(*ends).min(-1).values
    hit = (near.values < leave) & (near.values > 0)
    t, axis = far.min(-1)
    t, axis = torch.where(hit, near.values, t), torch.where(hit, near.indices, axis)
    point = (origins + t[..., None] * directions).numpy()
    axis, hit = axis.numpy(), hit.numpy()
    half = np.where(hit[..., None], box.numpy(), 2.0)
    side = np.take_along_axis(point, axis[..., None], -1)[..., 0] > 0
    others = np.stack([(axis + 1) % 3, (axis + 2) % 3], -1)
    scaled = (point / half + 1) / 2
    uv = np.take_along_axis(scaled, others, -1)
    fine = _paint(texture, axis + 3 * side + 6 * hit, uv, seed)
    colour = fine.reshape(views, size, 2, size, 2, 3).mean(axis=(2, 4))
    noisy = 255 * colour + rng.normal(0, 2, colour.shape)
    rgb = torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))
    alpha = torch.full(rgb.shape[:3], 255, dtype=torch.uint8)
    name = f"{texture} f{focal:g} {step_deg:g} deg {seed}"
    return ObjectViews(name, rgb[0], alpha[0], cameras[0], rgb, alpha, cameras, torch.zeros(3))


def _walk(cameras: Cameras, step_deg: float) -> Cameras:
    """The first camera moved sideways, a little forward, and turned by a few degrees."""
    first = cameras.viewmats[0].double()
    mats = []
    for k in range(len(cameras)):
        angle = torch.tensor(0.4 * step_deg * k).deg2rad()
        move = torch.eye(4, dtype=torch.float64)
        move[0, 0] = move[2, 2] = angle.cos()
        move[0, 2], move[2, 0] = angle.sin(), -angle.sin()
        move[:3, 3] = torch.tensor([-0.02 * step_deg * k, 0.0, -0.005 * step_deg * k])
        mats.append(move @ first)
    return replace(cameras, viewmats=torch.stack(mats).float())


def judge(views: ObjectViews) -> dict[str, float]:
    """`epipolar.misfit` of the room as it is and with each fault; pictures are matched once."""
    out = {"": epipolar.misfit(views)}
    for name, strength in FAULTS.items():
        broken = next(faults.corrupt([views], name.strip(), strength, seed=1))
        out[name] = epipolar.misfit(broken)
    return out


def motorcycle() -> dict[str, float]:
    """The real pair, as published and wrong; skimage.data.stereo_motorcycle has the numbers."""
    from skimage import data

    left, right, _ = data.stereo_motorcycle()
    focal, baseline, cx, offset, cy = 994.978, 193.001, 311.193, 31.086, 254.877
    Ks = [np.array([[focal, 0, x], [0, focal, cy], [0, 0, 1]]) for x in (cx, cx + offset)]
    there = np.eye(4)
    there[0, 3] = -baseline
    a, b = epipolar._features(left), epipolar._features(right)
    assert a is not None and b is not None
    fitted = epipolar.explained(*epipolar._matches(a, b))
    assert fitted is not None
    x, y, best = fitted
    turned = there.copy()
    turned[:3, :3] = [[0.9962, 0, 0.0872], [0, 1, 0], [-0.0872, 0, 0.9962]]  # 5 degrees
    rolled = there.copy()
    rolled[:3, :3] = [[0.9962, -0.0872, 0], [0.0872, 0.9962, 0], [0, 0, 1]]
    forward = np.eye(4)
    forward[2, 3] = -baseline
    poses = {"as published": there, "turned by 5 degrees": turned, "rolled by 5 degrees": rolled}
    poses |= {"moved forward instead": forward}
    result = {"matches": float(len(x))}
    for name, pose in poses.items():
        error = epipolar.pair_error(np.eye(4), Ks[0], pose, Ks[1], x, y, lost=left.shape[1])
        result[name] = error / max(best, epipolar._FLOOR * left.shape[1])
    return result


def rooms(seeds: int) -> Iterator[tuple[str, float, float, int]]:
    yield from itertools.product(TEXTURES, FOCALS, STEPS_DEG, range(seeds))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from tqdm import tqdm

    features = functools.cache(lambda data, shape: epipolar_features(_array(data, shape)))
    epipolar_features = epipolar._features
    epipolar._features = lambda rgb: features(rgb.tobytes(), rgb.shape)  # type: ignore[assignment]
    rows = []
    for texture, focal, step, seed in tqdm(list(rooms(arguments.seeds))):
        found = judge(room(texture, focal, step, seed))
        rows.append({"texture": texture, "focal": focal, "step_deg": step, "seed": seed, **found})
    limit = GateConfig().max_epipolar
    for key in ("texture", "step_deg", "focal"):
        print(f"\n| {key} | rooms | judged | false alarms | " + " | ".join(FAULTS) + " |")
        print("|---|" + "---:|" * (3 + len(FAULTS)))
        for value in dict.fromkeys(row[key] for row in rows):
            own = [row for row in rows if row[key] == value]
            judged = [row for row in own if np.isfinite(row[""])]
            cells = [len(own), len(judged), sum(row[""] > limit for row in judged)]
            for name in FAULTS:
                asked = [row[name] for row in own if np.isfinite(row[name])]
                cells.append(f"{sum(v > limit for v in asked)}/{len(asked)}")
            print(f"| {value} | " + " | ".join(map(str, cells)) + " |")
    real = motorcycle()
    print("\nmotorcycle:", json.dumps(real))
    if arguments.out:
        text = json.dumps({"rooms": rows, "motorcycle": real}, indent=1)
        arguments.out.write_text(text.replace("NaN", "null") + "\n")


def _array(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(shape)


if __name__ == "__main__":
    main()
