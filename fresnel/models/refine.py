"""The decoder's render of the target view as a condition of a CVS: geometry from the splats.

Five channels in [-1, 1]: premultiplied RGBA, and alpha times the depth behind the pivot's, which
the object's unit size keeps in range.  In training they are made once, beforehand, in 8 bits.

A twin has five more: what the decoder makes of the mirrored input, mirrored back.  Both are of the
same object; where they differ, the decoder guessed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fresnel.data.images import InputImages
from fresnel.data.records import ViewTensors
from fresnel.models import Predictor
from fresnel.render import Views
from fresnel.scene.cameras import Cameras

CHANNELS = 5


def condition(views: Views, cameras: Cameras, pivots: Tensor) -> Tensor:
    """Renders (M, V, H, W, ...) over black from cameras (M, V) -> (M, V, 5, H, W) in [-1, 1].

    Args:
        pivots: (M, 3).
    """
    distance = torch.linalg.norm(cameras.centers - pivots[:, None], dim=-1)
    behind = (views.depth - distance[..., None, None, None]) * views.alpha
    channels = torch.cat([views.rgb * 2 - 1, views.alpha * 2 - 1, behind], dim=-1)
    return channels.clamp(-1, 1).movedim(-1, -3)


def mirrored(renderer: Predictor) -> Predictor:
    """What it makes of the mirrored inputs in mirrored cameras, mirrored back; pivots at x = 0."""

    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        flipped = replace(
            inputs, rgb=inputs.rgb.flip(2), alpha=inputs.alpha.flip(2), depth=None,
            cameras=inputs.cameras.mirrored(),
        )  # fmt: skip
        views = renderer(flipped, cameras.mirrored())
        return Views(views.rgb.flip(3), views.alpha.flip(3), views.depth.flip(3))

    return predict


def seen(
    renderer: Predictor, inputs: InputImages, cameras: Cameras, pivots: Tensor, *, twin: bool
) -> Tensor:
    """What a network is shown of cameras (M, V): (M, V, C, H, W), C = 5, or 10 with the twin."""
    renderers = [renderer, mirrored(renderer)] if twin else [renderer]
    views = [one(inputs, cameras) for one in renderers]
    return torch.cat([condition(found, cameras, pivots) for found in views], dim=2)


@torch.no_grad()
def prepared(
    renderer: Predictor,
    views: ViewTensors,
    *,
    any_input: bool = False,
    twin: bool = False,
    batch: int = 8,
) -> Tensor:
    """What `seen` gives for every pair, uint8 (M, S, V, C, H, W); decode with `restored`.

    Args:
        renderer: the decoder, as `decoder.predictor` gives it.
        any_input: for every view as the input too: S = 1 + V, source 1 + k is view k; else S = 1,
            the record's own input.
        batch: records that are decoded and rendered at once.
    """
    from tqdm.auto import tqdm

    pairs = (1 + views.rgb.shape[1] if any_input else 1, views.rgb.shape[1])
    channels, size = CHANNELS * (1 + twin), views.rgb.shape[2:4]
    shape = (len(views), *pairs, channels, *size)
    stored = torch.empty(shape, dtype=torch.uint8, device=views.rgb.device)
    starts = range(0, len(views), batch)
    for start in tqdm(starts, desc="render the condition", delay=2, disable=None):
        part = views[start : start + batch]
        sources = [part.inputs]
        if any_input:
            sources += [
                InputImages(part.names, part.rgb[:, k], part.alpha[:, k], part.cameras[:, k])
                for k in range(part.rgb.shape[1])
            ]
        made = [seen(renderer, source, part.cameras, part.pivots, twin=twin) for source in sources]
        stored[start : start + batch] = ((torch.stack(made, dim=1) + 1) * 127.5).round()
    return stored


def restored(stored: Tensor) -> Tensor:
    """8 bits back to [-1, 1]; nothing there is exactly -1 in colour and alpha."""
    return stored.float() / 127.5 - 1
