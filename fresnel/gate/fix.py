"""Mends of whole records: what `gate.fix` applies, planned from a verdict's first reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fresnel.faults import pictures as faults_pictures
from fresnel.gate import mend
from fresnel.gate.geometry import nearest_point, rig_of
from fresnel.scene.cameras import Cameras
from fresnel.scene.colour import linear_to_srgb, srgb_to_linear


@dataclass(frozen=True)
class Step:
    """One mend of a record.

    Args:
        words: what it does, for the copy's meta.
        apply: (ObjectViews, background) -> ObjectViews.
    """

    words: str
    apply: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Mended:
    """A dataset seen through mends, record by record, as they are read."""

    source: Any
    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> Mended:
        return replace(self, steps=(*self.steps, step))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        views = self.source[index]
        for step in self.steps:
            views = step.apply(views, self.background)
        return views

    @property
    def background(self) -> tuple[float, float, float]:
        red, green, blue = (float(value) for value in self.source.background)
        return red, green, blue

    @property
    def content_hash(self) -> str:
        return str(self.source.content_hash)

    @property
    def meta(self) -> dict[str, Any]:
        return dict(getattr(self.source, "meta", None) or {})

    @property
    def layout(self) -> str:
        return str(getattr(self.source, "layout", "fresnel"))

    @property
    def names(self) -> Any:
        return getattr(self.source, "names", None)


def plan(verdict: Any) -> Step | None:
    """How to mend the first reason of a failed verdict, or None where a copy can't help."""
    if verdict.passed:
        return None
    reason = verdict.reasons[0]
    values = reason.values
    if reason.mend is not None and reason.code not in ("billboard", "exposure_drift"):
        amounts = [values[key] for key in ("mend_0", "mend_1") if key in values]
        change = mend.named(reason.mend, amounts)
        return Step(change.words, lambda views, _: corrected(views, change))
    if reason.code in ("views_dark", "views_bright") and values["luminance_ratio"] > 0:
        gain = 1 / values["luminance_ratio"]
        return Step(
            f"linear light of the views multiplied by {gain:.2f}",
            lambda views, background: _brighter(views, gain, background),
        )
    if reason.code == "channels_swapped":
        return Step(
            "red and blue of the views exchanged",
            lambda views, _: replace(views, rgb=views.rgb.flip(-1)),
        )
    if reason.code == "up_axis":
        return Step("the world turned so that +Y is up", lambda views, _: _upright(views))
    if reason.code == "pivot_offset" and verdict.figures.get("pivot_relative", 1.0) < 0.2:
        return Step(
            "the pivot set to the point that the cameras look at",
            lambda views, _: _pivot_at_axes(views),
        )
    return None


def _brighter(views: Any, gain: float, background: Any) -> Any:
    linear = srgb_to_linear(faults_pictures.straight(views, background) / 255) * gain
    encoded = 255 * linear_to_srgb(linear)
    return replace(views, rgb=faults_pictures.join(encoded, views.alpha, background))


def _upright(views: Any) -> Any:
    """The world turned by the quarter turns that bring the cameras' mean up nearest to +Y."""
    up = -views.cameras.viewmats[:, 1, :3].mean(dim=0)
    axis = int(up.abs().argmax())
    sign = float(up[axis].sign())
    turn = torch.zeros(4, 4)
    turn[3, 3] = 1.0
    if axis == 1:
        turn[:3, :3] = torch.diag(torch.tensor([1.0, sign, sign]))
    else:
        other = 2 - axis
        turn[1, axis] = sign
        turn[axis, 1] = -sign
        turn[other, other] = 1.0
    return replace(
        views,
        cameras=views.cameras.transformed(turn),
        input_camera=views.input_camera.transformed(turn),
        pivot=turn[:3, :3] @ views.pivot,
    )


def _pivot_at_axes(views: Any) -> Any:
    origins = views.cameras.centers.double().numpy()
    point = nearest_point(origins, views.cameras.forward.double().numpy())
    if point is None:
        return views
    return replace(views, pivot=torch.from_numpy(np.asarray(point)).float())


def corrected(views: Any, change: mend.Mend) -> Any:
    """An `ObjectViews` with a mend applied: cameras rewritten, pictures flipped where needed.

    Raises:
        ValueError: for mends of the pictures' content (a flat cut-out can't be mended).
    """
    if change.code == "billboard":
        raise ValueError("mend: a flat cut-out has no side views to restore; make the data anew")
    rgb, alpha = views.rgb.numpy(), views.alpha.numpy()
    rig = rig_of(views, rgb, alpha, with_input=True, most=len(rgb))
    after = change.apply(rig)
    by = np.array([views.cameras.width / rig.width, views.cameras.height / rig.masks.shape[1], 1])
    Ks, viewmats = after.Ks * by[:, None], after.viewmats
    count = len(rgb)
    flipped = Ks[:, 0, 0] < 0
    Ks[flipped] = np.diag([-1.0, 1, 1]) @ Ks[flipped]
    Ks[flipped, 0, 2] += views.cameras.width
    out = replace(views, cameras=_cameras(views.cameras, viewmats[:count], Ks[:count]))
    if change.name == "depth_scale" and views.depth is not None:
        own = None if views.input_depth is None else views.input_depth * change.amounts[0]
        return replace(views, depth=views.depth * change.amounts[0], input_depth=own)
    if flipped[:count].any():
        rows = torch.from_numpy(flipped[:count])
        turn = lambda x: None if x is None else torch.where(_like(rows, x), x.flip(2), x)  # noqa: E731
        out = replace(out, rgb=turn(views.rgb), alpha=turn(views.alpha), depth=turn(views.depth))
    scale = views.input_camera.width / views.cameras.width
    input_K = Ks[count] * np.array([scale, scale, 1])[:, None]
    camera = _cameras(views.input_camera, viewmats[count], input_K)
    out = replace(out, input_camera=camera)
    if flipped[count]:
        for name in ("input_rgb", "input_alpha", "input_depth", "identity_rgb", "identity_alpha"):
            value = getattr(out, name)
            if value is not None:
                out = replace(out, **{name: value.flip(1)})
    return out


def _like(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def _cameras(like: Cameras, viewmats: np.ndarray, Ks: np.ndarray) -> Cameras:
    return replace(
        like,
        viewmats=torch.from_numpy(viewmats).to(like.viewmats),
        Ks=torch.from_numpy(Ks).to(like.Ks),
    )
