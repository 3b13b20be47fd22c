"""What a CVS knows of a view before it draws it: the input, rays, and pictures of the target view.

These are the decoder's renders (of the input and of its mirror image) and the input's own pixels,
warped to where their depth puts them: what a splat blurs, a copy keeps (SynSin, arXiv 1912.08804;
PRISM, arXiv 2606.25430).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fresnel.data.images import InputImages
from fresnel.data.records import ViewTensors
from fresnel.models import Predictor
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, gravity_frame

CONDITION_CHANNELS = 4 + 6 + 6
RENDER_CHANNELS = 5  # of each picture of the target view: RGBA; depth, or visibility
HIDDEN_BEHIND = 0.05
"""How far a point lies behind the input's surface, in object lengths, where it counts by 1 / e."""


def rgba(rgb: Tensor, alpha: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) over black and (..., H, W) -> float (..., 4, H, W) in [-1, 1].

    A colour over black is the premultiplied colour.
    """
    return restored(torch.cat([rgb, alpha[..., None]], dim=-1).movedim(-1, -3))


def restored(stored: Tensor) -> Tensor:
    """8 bits back to [-1, 1]; nothing there is exactly -1 in colour and alpha."""
    return stored.float() / 127.5 - 1.0


def condition_tensors(image: Tensor, source: Cameras, cameras: Cameras, pivots: Tensor) -> Tensor:
    """What the network knows: input image, its rays, the target's rays. (M V, 16, H, W).

    Of premultiplied RGBA images (M, 4, H, W) in [-1, 1] with their cameras (M,); target cameras (M,
    V) of the same size; and pivots (M, 3), the origin of the canonical frame, in the world.
    """
    (h, w), sizes = image.shape[-2:], [(c.width, c.height) for c in (source, cameras)]
    if sizes != [(w, h)] * 2:
        raise ValueError(f"cameras: got {sizes} pixels, want the input image's {w} x {h}")
    with torch.autocast(image.device.type, enabled=False):  # geometry needs float32
        frame = gravity_frame(source, pivots)
        known = torch.cat([image, source.pluecker(frame).movedim(-1, -3)], dim=1)
        rays = cameras.pluecker(frame[:, None]).movedim(-1, -3)
    known = known[:, None].expand(-1, rays.shape[1], -1, -1, -1)
    return torch.cat([known, rays], dim=2).flatten(0, 1)


def seen(
    renderer: Predictor,
    inputs: InputImages,
    cameras: Cameras,
    pivots: Tensor,
    *,
    twin: bool,
    warp: bool = False,
) -> Tensor:
    """What a network is shown of renders from cameras (M, V): (M, V, P 5, H, W).

    P pictures in [-1, 1]: the render, with `warp` the input warped to it, of a twin the same in
    reverse. Of a render premultiplied RGBA, and alpha times the depth behind the pivot's (M, 3),
    which the object's unit size keeps in range; of a warp what `warped` says, 0..1 as -1..1. The
    mirror is the plane x = 0, where pivots have to be.
    """
    distance = torch.linalg.norm(cameras.centers - pivots[:, None], dim=-1)[..., None, None, None]

    def drawn(inputs: InputImages, cameras: Cameras) -> list[Tensor]:
        asked = cameras
        if warp:  # its own view as well, for what is hidden from it
            own = inputs.cameras.resized(cameras.width, cameras.height)[:, None]
            asked = cameras.joined(own)
        made = renderer(inputs, asked)
        count = cameras.batch_shape[1]
        views = Views(made.rgb[:, :count], made.alpha[:, :count], made.depth[:, :count])
        behind = (views.depth - distance) * views.alpha
        found = [torch.cat([views.rgb * 2 - 1, views.alpha * 2 - 1, behind], dim=-1)]
        if warp:
            surface = torch.cat([made.alpha, made.alpha * made.depth], dim=-1)[:, -1]
            found.append(warped(inputs, surface, own, views, cameras) * 2 - 1)
        return found

    shown = drawn(inputs, cameras)
    if twin:
        rgb, alpha, there = inputs.rgb.flip(2), inputs.alpha.flip(2), inputs.cameras.mirrored()
        mirrored = replace(inputs, rgb=rgb, alpha=alpha, depth=None, cameras=there)
        shown += [x.flip(3) for x in reversed(drawn(mirrored, cameras.mirrored()))]
    return torch.cat(shown, dim=-1).clamp(-1, 1).movedim(-1, -3)


def warped(
    inputs: InputImages, surface: Tensor, own: Cameras, views: Views, cameras: Cameras
) -> Tensor:
    """The input's pixels where a view's depth puts them, in [0, 1], (M, V, H, W, 5).

    Each pixel of views (M, V) is looked up in the input (backward warping): premultiplied RGBA,
    nothing where the view shows nothing; and how sure it is that the input shows that very point:
    1 where depths agree, exp(-1) `HIDDEN_BEHIND` before or behind the input's surface.

    Args:
        surface: alpha, and alpha times z-depth, as drawn for the input's cameras `own` (M, 1):
            (M, H, W, 2).
    """
    v, h = cameras.batch_shape[1], cameras.height
    places, z = cameras.reprojected(views.depth[..., 0], own)
    picture = torch.cat([inputs.rgb, inputs.alpha[..., None]], dim=-1) / 255
    known = torch.cat([picture.to(surface), surface], dim=-1).movedim(-1, 1)
    found = F.grid_sample(known, places.flatten(1, 2), align_corners=False)
    found = found.movedim(1, -1).unflatten(1, (v, h))
    covered, depth = found[..., 4:5], found[..., 5:]
    off = (z[..., None] - depth / covered.clamp_min(1e-3)) / HIDDEN_BEHIND
    visible = (-off.square()).exp() * covered * views.alpha
    return torch.cat([found[..., :4], visible], dim=-1) * (views.alpha > 0.02)


@torch.no_grad()
def prepared(
    renderer: Predictor,
    views: ViewTensors,
    *,
    twin: bool = False,
    warp: bool = False,
    any_input: bool = False,
    batch: int = 8,
    device: torch.device | str | None = None,
) -> Tensor:
    """What `seen` gives for every pair, uint8 (M, S, V, C, H, W) where the views are; decode with
    `restored`.

    S = 1, the record's own input, or with `any_input` 1 + V: source 1 + k is view k. `batch`
    records are decoded and rendered at once, on `device` (None: the views').
    """
    from tqdm.auto import tqdm

    count, (height, width) = views.rgb.shape[1], views.rgb.shape[2:4]
    channels = RENDER_CHANNELS * (1 + twin + 2 * warp)
    shape = (len(views), 1 + any_input * count, count, channels, height, width)
    stored = torch.empty(shape, dtype=torch.uint8, device=views.rgb.device)
    for start in tqdm(range(0, len(views), batch), "render the condition", delay=2, disable=None):
        part = views[start : start + batch].to(device or stored.device)
        sources = [part.inputs]
        for k in range(any_input * count):
            pictures = (part.rgb[:, k], part.alpha[:, k], part.cameras[:, k])
            sources.append(InputImages(part.names, *pictures))
        made = [
            seen(renderer, source, part.cameras, part.pivots, twin=twin, warp=warp)
            for source in sources
        ]
        # to 8 bits first: a copy to the host would carry floats, and convert them there
        eight = ((torch.stack(made, dim=1) + 1) * 127.5).round().to(stored.dtype)
        stored[start : start + batch] = eight
    return stored
