"""Do the views of one input agree with each other, and do two samples of the same view?

Each view's surface is looked up in the views of the two nearest cameras through a depth, where both
see it: warped views compared as in MEt3R (arXiv 2501.06336), with known cameras and surfaces in
place of its network's.  What is blurred or black agrees with itself: read it beside sharpness.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, max_pool2d

from fresnel.data.images import InputImages
from fresnel.evaluation.perceptual import Perceptual
from fresnel.models import Predictor
from fresnel.render import Views
from fresnel.scene.cameras import Cameras

_NEIGHBOURS, _MARGIN_PX, _LEAST = 2, 3.0, 0.002
"""Views that a view is compared with; how far apart two depths of one surface may lie, in widths of
a pixel there; and the share of the frame that has to be in common."""
STEPS = 255
"""Differences of colours are in steps of 8 bits."""
BRIGHT = 32
"""Steps of 8 bits that are white in a picture of how far samples spread."""


def white(views: Views) -> Tensor:
    """Pictures (..., H, W, 3) in [0, 1] over white, where every object has an outline."""
    return (views.rgb + 1 - views.alpha).clamp(0, 1)


@dataclass(frozen=True)
class Common:
    """What views (M, V) have in common with N others each, and where it stands in these.

    Args:
        others: which views these are, (M, V, N).
        places: where they show what a view's pixel shows, in [-1, 1], (M, V, N, H, W, 2).
        both: where both see the same surface, bool (M, V, N, H, W).
    """

    others: Tensor
    places: Tensor
    both: Tensor

    @classmethod
    def of(cls, cameras: Cameras, depth: Tensor, alpha: Tensor) -> "Common":
        """Through z-depth (M, V, H, W), 0 where unknown, of cameras (M, V).

        A pixel counts if it is covered (alpha (M, V, H, W) above 0.9), and if the other view shows
        a surface where it lands, away from outlines and steps, at the depth of the point: neither
        nearer (it is hidden) nor farther (it is not there).

        Raises:
            ValueError: for fewer than two views, and for shapes that differ.
        """
        (m, v), (h, w) = cameras.batch_shape, (cameras.height, cameras.width)
        if v < 2 or depth.shape != (m, v, h, w) or alpha.shape != depth.shape:
            got = f"depth {tuple(depth.shape)} and alpha {tuple(alpha.shape)} for cameras {(m, v)}"
            raise ValueError(f"views: got {got}, want {(m, v, h, w)} of both, at least two views")
        n = min(_NEIGHBOURS, v - 1)
        alike = cameras.forward @ cameras.forward.mT - 3 * torch.eye(v, device=cameras.device)
        others, row = alike.topk(n, dim=-1).indices, torch.arange(m, device=depth.device)
        there = cameras[row[:, None, None], others]
        places, z_there = cameras[:, :, None].reprojected(depth[:, :, None], there)
        margin = _MARGIN_PX / cameras.Ks[..., 0, 0, None, None] * depth  # in world units
        covered = (depth > 0) & (alpha > 0.9)
        far, near = max_pool2d(depth, 3, 1, 1), -max_pool2d(-depth, 3, 1, 1)
        inside = -max_pool2d(-covered.to(depth), 3, 1, 1) * (far - near < margin)
        found = cls(others, places, covered[:, :, None])
        z, whole = found.carried(torch.stack([depth, inside], dim=-1)).unbind(-1)
        both = covered[:, :, None] & (whole > 0.999) & ((z_there - z).abs() < margin[:, :, None])
        return replace(found, both=both)

    def carried(self, pictures: Tensor) -> Tensor:
        """The other views of (M, V, H, W, C) as each view's camera sees them, bilinear, and nothing
        beyond their frames, (M, V, N, H, W, C)."""
        row = torch.arange(len(pictures), device=pictures.device)[:, None, None]
        there = pictures[row, self.others].flatten(0, 2).movedim(-1, 1)
        made = grid_sample(there, self.places.flatten(0, 2), align_corners=False)
        return made.movedim(1, -1).unflatten(0, self.others.shape)

    def disagreement(self, pictures: Tensor) -> Tensor:
        """Mean absolute difference of colours (M, V, H, W, C) in [0, 1] to the other views', in
        steps of 8 bits, over what is in common, (M, V); NaN where that is too little."""
        off = (self.carried(pictures) - pictures[:, :, None]).abs().mean(dim=-1)
        shared = self.both.flatten(2).to(off).mean(dim=-1)
        off = STEPS * (off * self.both).flatten(2).mean(dim=-1) / shared
        return off.where(shared >= _LEAST, torch.nan)

    def perceptual(self, pictures: Tensor, distance: Perceptual) -> Tensor:
        """The same by a perceptual distance, (M, V): of whole pictures, which are the view's own
        outside of what is in common, as if that were a fifth of the frame (an object is)."""
        own = pictures[:, :, None].expand(-1, -1, self.others.shape[2], -1, -1, -1)
        made = self.carried(pictures).where(self.both[..., None], own)
        far = distance(made.flatten(0, 2), own.flatten(0, 2)).unflatten(0, self.others.shape)
        shared = self.both.flatten(3).to(far).mean(dim=-1).mean(dim=-1)
        return (0.2 * far.mean(dim=-1) / shared).where(shared >= _LEAST, torch.nan)


def disagreement(views: Views, cameras: Cameras, depth: Tensor | None = None) -> Tensor:
    """How far views (M, V) lie from their neighbours, in steps of 8 bits over white, (M, V).

    Args:
        depth: z-depth (M, V, H, W) of the surface that they should show, 0 where nothing is (None:
            the views' own, which a render has).
    """
    own = views.depth[..., 0] if depth is None else depth
    alpha = views.alpha[..., 0] if depth is None else (depth > 0).to(views.alpha)
    return Common.of(cameras, own, alpha).disagreement(white(views))


def spread(samples: Sequence[Views]) -> Tensor:
    """Standard deviation of K samples of the same views at each pixel, root mean square over
    colours over white, in steps of 8 bits, (M, V, H, W)."""
    return STEPS * torch.stack([white(one) for one in samples]).var(dim=0).mean(dim=-1).sqrt()


def spreading(samples: Sequence[Predictor]) -> Predictor:
    """Where samples of the same views differ: predicts pictures of their `spread`, from black (they
    agree) to white (by `BRIGHT` steps, or more), where any of them shows something."""

    @torch.no_grad()
    def predict(inputs: InputImages, cameras: Cameras) -> Views:
        made = [one(inputs, cameras) for one in samples]
        seen = torch.stack([one.alpha for one in made]).amax(dim=0)
        light = spread(made)[..., None] / BRIGHT
        return Views(light.expand(*light.shape[:-1], 3), seen, torch.zeros_like(seen))

    return predict
