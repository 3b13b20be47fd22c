"""Pairs of a multi-view set, (record, view), as a CVS learns from them: conditions and targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fresnel.data.dataset import ViewTensors
from fresnel.models import refine as rendered
from fresnel.models.cvs import CONDITION_CHANNELS, condition_tensors, rgba


def picked(
    views: ViewTensors,
    record: Tensor,
    view: Tensor,
    source: Tensor | None = None,
    renders: Tensor | None = None,
) -> dict[str, Any]:
    """What is stored of the pairs (record, view): 8-bit images and cameras, input and target.

    Args:
        source: which view is the input; -1: the record's own. None: always that.
        renders: what `rendered.prepared` made of the same views.
    """
    rgb, alpha = views.inputs.rgb[record], views.inputs.alpha[record]
    cameras = views.inputs.cameras[record]
    if source is not None:
        other = source >= 0
        choice = source.clamp_min(0)
        rgb = torch.where(other[:, None, None, None], views.rgb[record, choice], rgb)
        alpha = torch.where(other[:, None, None], views.alpha[record, choice], alpha)
        there = views.cameras[record, choice]
        cameras = replace(
            cameras,
            viewmats=torch.where(other[:, None, None], there.viewmats, cameras.viewmats),
            Ks=torch.where(other[:, None, None], there.Ks, cameras.Ks),
        )
    seen = None
    if renders is not None:
        seen = renders[record, 0 if source is None else source + 1, view]
    return {
        "input": (rgb, alpha, cameras),
        "target": (views.rgb[record, view], views.alpha[record, view], views.cameras[record, view]),
        "pivots": views.pivots[record],
        "render": seen,
        "depth": None if views.depth is None else views.depth[record, view],
    }


def condition_and_target(stored: dict[str, Any]) -> dict[str, Any]:
    """ "cond" (B, C, H, W), "target" (B, 4, H, W) and "depth" of what was `picked`."""
    rgb, alpha, cameras = stored["input"]
    target_rgb, target_alpha, target_cameras = stored["target"]
    targets = target_cameras.reshape(len(rgb), 1)
    cond = condition_tensors(rgba(rgb, alpha), cameras, targets, stored["pivots"])
    if stored["render"] is not None:
        cond = torch.cat([cond, rendered.restored(stored["render"])], dim=1)
    return {"cond": cond, "target": rgba(target_rgb, target_alpha), "depth": stored["depth"]}


def mirror(cond: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The pair as seen in a mirror at the canonical frame's x = 0 plane: left and right swap.

    The mirrored object's render is the mirrored one from the mirrored input: of two renders each
    takes the other's place.  With a single one, its own mirror image has to stand for that.

    A reflection X takes a ray (d, o x d) to (X d, (X o) x (X d)) = (X d, -X (o x d)), and the
    image column u to W - 1 - u; cameras must have a centred principal point and no roll.
    """
    cond = cond.flip(-1)
    # no tensor of signs: to bring one from the host would wait for a GPU's queue
    mirrored = [cond[:, :4]]
    for rays in cond[:, 4:CONDITION_CHANNELS].split(6, dim=1):
        mirrored += [-rays[:, :1], rays[:, 1:4], -rays[:, 4:]]
    if cond.shape[1] > CONDITION_CHANNELS:
        mirrored += reversed(cond[:, CONDITION_CHANNELS:].split(rendered.CHANNELS, dim=1))
    return torch.cat(mirrored, dim=1), target.flip(-1)


def tinted(image: Tensor, gain: Tensor) -> Tensor:
    colour = torch.minimum((image[:, :3] + 1) * gain, image[:, 3:] + 1) - 1
    return torch.cat([colour, image[:, 3:]], dim=1)
