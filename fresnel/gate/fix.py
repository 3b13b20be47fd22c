"""What can be mended in a copy of refused data: conventions and labels, never lost information."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fresnel.data import dataset as datasets
from fresnel.data.records import ObjectViews
from fresnel.gate.measure import measure
from fresnel.gate.thresholds import GateConfig
from fresnel.gate.verdict import Verdict, validate
from fresnel.poses import explain, transforms
from fresnel.poses.geometry import nearest_point, rigs_of

BRIGHTEST_GAIN = 8.0
"""What is darker than an eighth keeps less than 42% of sRGB's levels: 107 of 256."""
MOST_CLIPPED = 0.05
"""Share of pixels at the end of the scale beyond which brightness can't be taken back, in a tenth
of the views."""
_TOPS = ("top", "set_top")
_NO_WORSE = {"mismatch": 0.01, "swapped": 0.0, "negated": 0.0, "exposure": 0.0}


@dataclass(frozen=True)
class Step:
    """One mend: what it does in words, for the copy's meta, its doing, and what it makes better:
    "mismatch", "swapped", "negated" or "exposure"; "" where it never hurts."""

    words: str
    apply: Callable[[ObjectViews], ObjectViews]
    better: str = ""


def _wrong(views: ObjectViews, what: str) -> float:
    rows, summary, _ = measure(views)
    if what == "exposure":
        light = [row["luminance_ratio"] for row in rows if row["luminance_ratio"] > 0]
        return abs(float(np.log(np.median(light)))) if light else np.nan
    return float(summary.get(what, np.nan))


@dataclass
class Mended:
    """A dataset seen through mends, record by record, as they are read.  A record that a mend makes
    worse stays as it is: of a set half mended one half is right."""

    source: Any
    steps: list[Step] = field(default_factory=list)
    kept: dict[tuple[int, int], bool] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ObjectViews:
        views: ObjectViews = self.source[index]
        for k, step in enumerate(self.steps):
            after = step.apply(views)
            if (index, k) not in self.kept and step.better:
                worse = _wrong(after, step.better) - _wrong(views, step.better)
                self.kept[index, k] = worse > _NO_WORSE[step.better]
            views = views if self.kept.get((index, k)) else after
        return views

    def __getattr__(self, name: str) -> Any:
        if name not in ("content_hash", "meta", "layout", "names"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def said(self) -> list[str]:
        """What was done, and in how many of the records, where not in all."""
        every, parts = len(self), []
        for k, step in enumerate(self.steps):
            left = sum(self.kept.get((index, k), False) for index in range(every))
            parts.append(step.words + (f", in {every - left} of {every} records" if left else ""))
        return parts


def fix(
    dataset: Any,
    path: str | Path,
    *,
    verdict: Verdict | None = None,
    config: GateConfig | None = None,
    rounds: int = 3,
    progress: bool = True,
) -> tuple[Any, Verdict]:
    """Write a corrected copy of a dataset to `path` and gate that.

    Conventions of poses, mirrored or reordered pictures, focal length, principal point, the stated
    pivot, moderate exposure, negatives and exchanged channels can be mended; each round mends the
    first reason of the verdict before it, in the records that it makes no worse.  The copy's meta
    lists what was done.

    Args:
        verdict: of this dataset, if there is one already.
        rounds: mends to try, at most.

    Returns:
        The copy (a `MultiViewDataset`) and its verdict, which may still be a failure.

    Raises:
        ValueError: if the data passes, or what is wrong can't be mended without making it anew.
    """
    verdict = verdict or validate(dataset, config, progress=progress)
    if verdict.passed:
        raise ValueError("dataset: passes the gate; there is nothing to fix")
    mended = Mended(dataset)
    while not verdict.passed and len(mended.steps) < rounds and (step := plan(verdict)):
        mended.steps.append(step)
        verdict = validate(mended, config, progress=progress)
    if not mended.steps:
        reason = verdict.reasons[0]
        raise ValueError(f"dataset: {reason.code} can't be mended in a copy; {reason.hint}")
    for k in range(len(mended)):
        mended[k]  # decides where the mends help
    meta = {**getattr(dataset, "meta", {}), "mended": mended.said()}
    records = (mended[k] for k in range(len(mended)))
    written = datasets.write(path, records, meta=meta, total=len(mended))
    return written, validate(written, config, progress=progress)


def plan(verdict: Verdict) -> Step | None:
    """How to mend the first reason of a verdict, or None where a copy can't help."""
    reason, values = verdict.reasons[0], verdict.reasons[0].values
    if reason.mend is not None and reason.code not in ("billboard", "exposure_drift"):
        amounts = [values[key] for key in ("mend_0", "mend_1") if key in values]
        mend = explain.named(reason.mend, amounts)
        return Step(mend.words, lambda views: corrected(views, mend), "mismatch")
    if reason.code in ("views_dark", "views_bright"):
        gain = 1 / max(values["luminance_ratio"], 1e-9)
        ends = [row[key] for row in verdict.measurements for key in ("clipped", "crushed")
                if (key == "clipped") == (gain < 1) and row[key] >= 0]  # fmt: skip
        black = any(values.get(key, 255.0) < values.get(f"min_{key}", 0.0) for key in _TOPS)
        lost = np.quantile([0.0, *ends], 0.9) > MOST_CLIPPED
        if gain > BRIGHTEST_GAIN or lost or black or 0.83 < gain < 1.2:
            return None  # a mend may not pass what has lost its information
        words = f"linear light of the views multiplied by {gain:.2f}"
        return Step(words, lambda views: transforms.exposed(views, gain), "exposure")
    if reason.code == "channels_swapped":
        words = "red and blue of the views exchanged"
        return Step(words, lambda views: replace(views, rgb=views.rgb.flip(-1)), "swapped")
    if reason.code == "views_negative":
        words = "colours of the views taken from white"
        turned = lambda views: transforms.recoloured(views, lambda own: 255 - own)  # noqa: E731
        return Step(words, turned, "negated")
    if reason.code == "pivot_offset" and verdict.figures.get("pivot_relative", 1.0) < 0.2:
        return Step("the pivot set to the point that the cameras look at", _pivot_at_axes)
    return None


def _pivot_at_axes(views: ObjectViews) -> ObjectViews:
    origins = views.cameras.centers.double().numpy()
    point = nearest_point(origins, views.cameras.forward.double().numpy())
    return views if point is None else replace(views, pivot=torch.from_numpy(point).float())


def corrected(views: ObjectViews, mend: explain.Mend) -> ObjectViews:
    """A record over black with a mend applied: cameras rewritten, pictures flipped where needed.

    Raises:
        ValueError: for mends of the pictures' content (a flat cut-out can't be mended).
    """
    if mend.code == "billboard":
        raise ValueError("mend: a flat cut-out has no side views to restore; make the data anew")
    if mend.name == "depth_scale":
        return transforms.scaled_depth(views, mend.amounts[0])
    cameras, own, count = views.cameras, views.input_camera, len(views.rgb)
    pictures = views.rgb.numpy(), views.alpha.numpy()
    after = mend.apply(rigs_of(views, *pictures, with_input=True, most=count)[0])
    height, width = after.masks.shape[1:]
    flipped, poses = after.Ks[:, 0, 0] < 0, after.viewmats
    Ks = np.where(flipped[:, None, None], transforms.mirrored(after.Ks, width), after.Ks)
    sizes = [(cameras.width, cameras.height)] * count + [(own.width, own.height)]
    Ks *= np.array([(w / width, h / height, 1) for w, h in sizes])[:, :, None]
    out = replace(
        views,
        cameras=transforms.cameras_of(cameras, viewmats=poses[:count], Ks=Ks[:count]),
        input_camera=transforms.cameras_of(own, viewmats=poses[count], Ks=Ks[count]),
    )
    rows = torch.from_numpy(flipped[:count])
    return transforms.flipped(out, rows, also_input=bool(flipped[count]))
