"""What a model has to beat: predictors without any parameter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fresnel.data.images import InputImages
from fresnel.data.records import ViewTensors
from fresnel.models import Predictor
from fresnel.render import Views
from fresnel.scene.cameras import Cameras


def baselines(train: ViewTensors) -> dict[str, Predictor]:
    """By name: copy_input, mean_image (of the training views) and black_image."""
    mean = torch.cat([train.rgb, train.alpha[..., None]], dim=-1).flatten(0, 1).float().mean(dim=0)

    def copy_input(inputs: InputImages, cameras: Cameras) -> Views:
        given = torch.cat([inputs.rgb, inputs.alpha[..., None]], dim=-1)
        return _everywhere(given.float(), cameras)

    def mean_image(inputs: InputImages, cameras: Cameras) -> Views:
        return _everywhere(mean.expand(len(inputs), -1, -1, -1), cameras)

    def black_image(inputs: InputImages, cameras: Cameras) -> Views:
        return _everywhere(torch.zeros(len(inputs), 1, 1, 4), cameras)

    return {"copy_input": copy_input, "mean_image": mean_image, "black_image": black_image}


def _everywhere(rgba: Tensor, cameras: Cameras) -> Views:
    """The picture (M, H, W, 4) in [0, 255] of each record as every one of its views."""
    size, views = (cameras.height, cameras.width), cameras.batch_shape[1]
    both = rgba.to(cameras.device).permute(0, 3, 1, 2) / 255
    if tuple(both.shape[-2:]) != size:
        both = interpolate(both, size=size, mode="bilinear", align_corners=False, antialias=True)
    both = both.permute(0, 2, 3, 1)[:, None].expand(-1, views, -1, -1, -1)
    return Views(both[..., :3], both[..., 3:], torch.zeros_like(both[..., 3:]))
