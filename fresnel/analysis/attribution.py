"""How much of the original's darkness came from what: a full factorial over four factors.

Every held-out object is decoded and rendered in the 2^4 cells of {camera path} x {decoder} x
{position} x {exposure}, each factor as in the original or mended, and the gate's measurements say
how much of its input's light and area a view still holds.  Shapley values split the way from the
original's cell to the mended one among the factors, whatever order one would mend them in.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fresnel import gate
from fresnel.analysis.stats import Estimate, interval
from fresnel.bootstrap import CORRECTED, ORIGINAL
from fresnel.bootstrap import records as render_records
from fresnel.data.dataset import MultiViewDataset, ObjectViews
from fresnel.data.layout import object_name
from fresnel.host.machine import project_root
from fresnel.models.decoder import Decoder
from fresnel.models.patch_decoder import FARTHEST, NEAREST
from fresnel.scene.cameras import Cameras
from fresnel.scene.colour import linear_to_srgb, luminance, srgb_to_linear
from fresnel.scene.gaussians import Gaussians
from fresnel.study.arms import load_decoder

FACTORS = {
    "path": ("camera path", "cameras orbit the object"),
    "decoder": ("decoder's training", "decoder trained on many views"),
    "position": ("free positions", "Gaussians may leave ray and depth"),
    "exposure": ("exposure", "views scaled to the input's luminance"),
}
"""Bits of a cell's name, in this order, and what is done where the bit is 1 (mended)."""
NAMES = {factor: name for factor, (name, _) in FACTORS.items()}
AS_IT_WAS = "0010"
"""The original's own cell: its Gaussians could leave ray and depth by up to a quarter unit."""
PATH_ALONE = "1010"
OUTCOMES = ("light", "coverage")
_MAX_GAIN = 16.0
"""Exposure is raised by no more: beyond, 8-bit views would be made of noise."""


class LockedDecoder(Decoder):
    """The same decoder, whose Gaussians stay where the input's pixels and their depth put them.

    Patch kind: on the patch grid at z = -2 - 2 depth, without the learnt offset.  Pixel kind: on
    the pixel's ray at the depth of what is seen there; the layers behind come forward to it.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.config)
        self.load_state_dict(decoder.state_dict())
        self.render_size = decoder.render_size
        self.to(decoder.device).eval()

    def decode(
        self, rgba: Tensor, cameras: Cameras, depth: Tensor | None = None
    ) -> tuple[Gaussians, dict[str, Tensor]]:
        gaussians, aux = super().decode(rgba, cameras, depth)
        if self.config.kind == "patch":
            used = aux.get("depth_known", aux["depth_predicted"])
            along = torch.linspace(-1.0, 1.0, used.shape[-1], device=used.device)
            y, x = torch.meshgrid(along, along, indexing="ij")  # OpenCV: y grows downwards
            z = NEAREST + (FARTHEST - NEAREST) * used
            points = torch.stack([x.expand_as(z), y.expand_as(z), z], dim=-1).flatten(1, 2)
            means = points.repeat_interleave(self.config.gaussians_per_patch, dim=1)
        else:
            side = rgba.shape[-1]
            eye = torch.eye(4).to(rgba).expand(len(rgba), 4, 4)
            rays = Cameras(eye, cameras.Ks, side, side).rays()[1].flatten(1, 2)
            seen = gaussians.means[:, : side * side, 2:]
            means = (rays / rays[..., 2:] * seen).repeat(1, self.config.gaussians_per_pixel, 1)
        return replace(gaussians, means=means), aux


@dataclass(frozen=True)
class _InMemory:
    """As much of a dataset as the gate needs."""

    records: list[ObjectViews]
    background: tuple[float, float, float] = (0.0, 0.0, 0.0)
    content_hash: str = ""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ObjectViews:
        return self.records[index]


def decoder_pairs(
    frontal_weights: str, multiview_weights: str, device: str
) -> dict[str, dict[str, Decoder]]:
    """What `factorial` exchanges, for every seed that both kinds were trained with.

    Args:
        frontal_weights, multiview_weights: files that notebook 03 exported, below the project where
            not absolute; "{seed}" stands for whatever numbers there are; "": the one that ships.

    Returns:
        Seed -> {"frontal", "multi-view"}; a kind without "{seed}" serves every seed, and without
        any the only key is "".

    Raises:
        ValueError: if a file is missing, or the two have no seed in common.
    """
    frontal, many = (_by_seed(text) for text in (frontal_weights, multiview_weights))
    named = [set(files) for files in (frontal, many) if "" not in files]
    seeds = sorted(set.intersection(*named), key=int) if named else [""]
    if not seeds:
        raise ValueError(f"no seed in common: {frontal_weights!r} and {multiview_weights!r}")
    return {
        seed: {
            "frontal": load_decoder("patch", device, frontal.get(seed, frontal.get("", ""))),
            "multi-view": load_decoder("pixel", device, many.get(seed, many.get("", ""))),
        }
        for seed in seeds
    }


def _by_seed(text: str) -> dict[str, str]:
    """Seed -> file; the key "" where the text names no seed."""
    if "{seed}" not in text:
        return {"": text}
    path = project_root() / text
    before, after = path.name.split("{seed}")
    files = {
        match[1]: str(file)
        for file in path.parent.glob(f"{before}*{after}")
        if (match := re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), file.name))
    }
    if not files:
        raise ValueError(f"no weights at {text}: train them (notebooks/params/study.yaml)")
    return files


def factorial(
    truth: MultiViewDataset,
    decoders: Mapping[str, Decoder],
    *,
    image_size: int = 64,
    views: int = 8,
    device: str = "cpu",
) -> dict[str, Any]:
    """Light and coverage of every object in every cell.

    A view's share of its input's light (area) is counted up to 1, so that no view makes up for
    another: a camera that grazes the Gaussians would otherwise pay for seven empty ones.

    Args:
        truth: held-out objects; their inputs are decoded, their views are the ceiling.
        decoders: "frontal", the original's kind, and "multi-view".
        image_size: of the views, in pixels.

    Returns:
        "objects": names; "cells": name of the cell -> {"light", "coverage": one value an object,
        "verdict", "codes": what the gate says}; "truth": the same of the true views.
    """
    from tqdm.auto import tqdm

    inputs, cells = truth.inputs(), {}
    options = list(itertools.product("01", repeat=3))
    for path, which, position in tqdm(options, desc="attribution", unit="cells", delay=2):
        decoder = decoders["frontal" if which == "0" else "multi-view"]
        config = replace(
            ORIGINAL if path == "0" else CORRECTED,
            decoder_kind=decoder.config.kind,
            image_size=image_size,
            views_per_image=views,
            seed=0,
        )
        used = (decoder if position == "1" else LockedDecoder(decoder)).to(device)
        made = list(render_records(inputs, used, config, device, 8))
        cells[f"{path}{which}{position}0"] = _measured(made)
        cells[f"{path}{which}{position}1"] = _measured([exposed(record) for record in made])
    return {
        "objects": list(truth.names),
        "cells": cells,
        "truth": _measured([truth[i] for i in range(len(truth))]),
    }


def exposed(record: ObjectViews) -> ObjectViews:
    """The record with every view's covered pixels scaled, in linear light, to the luminance of the
    input's covered pixels (alpha-weighted means; at most 16-fold; what clips stays clipped)."""

    def unmixed(rgb: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Straight colours, alpha in [0, 1], and the mean luminance under alpha."""
        weight = alpha.float() / 255
        colour = (rgb.float() / 255 / weight.clamp_min(1 / 255)[..., None]).clamp(0, 1)
        total = (luminance(colour) * weight).sum((-1, -2))
        return colour, weight, total / weight.sum((-1, -2)).clamp_min(1e-6)

    wanted = unmixed(record.input_rgb, record.input_alpha)[2]
    colour, weight, found = unmixed(record.rgb, record.alpha)
    gain = (wanted / found.clamp_min(1e-6)).clamp(0, _MAX_GAIN)[:, None, None, None]
    bright = linear_to_srgb(srgb_to_linear(colour) * gain) * weight[..., None]
    return replace(record, rgb=(bright * 255).round().clamp(0, 255).to(torch.uint8))


def _measured(records: list[ObjectViews]) -> dict[str, Any]:
    """Of a cell: a value an object (mean over its views), and what the gate says."""
    verdict = gate.validate(_InMemory(records), first=len(records), progress=False)
    views = pd.DataFrame(verdict.measurements).set_index("object")
    views = views[["coverage_ratio", "luminance_ratio"]].astype(float)
    views = views.replace([math.inf, -math.inf], math.nan).fillna(0.0)
    shares = pd.DataFrame(
        {
            "light": views.coverage_ratio * views.luminance_ratio,
            "coverage": views.coverage_ratio,
        }
    ).clip(upper=1.0)
    means = shares.groupby(level=0).mean().loc[[record.name for record in records]]
    codes = [reason.code for reason in verdict.reasons]
    said = {"verdict": "PASS" if verdict.passed else "FAIL", "codes": codes}
    return {**means.to_dict("list"), **said}


def shapley(values: Mapping[str, Any], factors: int = len(FACTORS)) -> np.ndarray:
    """Shapley values (factors, ...) of a game: cell name of bits -> value (number or array).

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)); they add up to
    v(all) - v(none) exactly (Shapley 1953).
    """
    found = []
    for i in range(factors):
        total: Any = 0.0
        for bits in itertools.product("01", repeat=factors - 1):
            without = "".join([*bits[:i], "0", *bits[i:]])
            having = "".join([*bits[:i], "1", *bits[i:]])
            size = bits.count("1")
            weight = math.factorial(size) * math.factorial(factors - size - 1)
            gain = np.asarray(values[having], float) - np.asarray(values[without], float)
            total = total + weight / math.factorial(factors) * gain
        found.append(total)
    return np.stack(found)


def attribute(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `factorial` measured, split among the factors; intervals hold objects and decoders.

    Args:
        measured: an entry a pair of decoders (seed), all of the same objects; of none, all is
            unknown.

    Returns:
        For "light" and "coverage": "original" (`AS_IT_WAS`), "none" mended (and positions locked),
        all "mended", and "truth", each an `Estimate`; "factors": factor -> {"gain" (Shapley value),
        "share" of the whole way, "alone" (mended first, nothing else), "last" (everything else
        mended before)}.  "cells": name -> {"light", "coverage", "passed": 1 or 0 a seed, "codes" of
        the gate}.  "objects", "seeds": how many.

    Raises:
        ValueError: if the seeds are of different objects.
    """
    if not measured:
        unknown = dict.fromkeys(("gain", "share", "alone", "last"), Estimate())
        empty: dict[str, Any] = dict.fromkeys(("original", "none", "mended", "truth"), Estimate())
        empty["factors"] = dict.fromkeys(FACTORS, unknown)
        return {"objects": 0, "seeds": 0, "cells": {}, **dict.fromkeys(OUTCOMES, empty)}
    if any(run["objects"] != measured[0]["objects"] for run in measured):
        raise ValueError("measured: seeds of different objects")
    objects = [object_name(name) for name in measured[0]["objects"]]
    unique = list(dict.fromkeys(objects))
    member = np.array([[name == one for name in objects] for one in unique], float)
    member /= member.sum(axis=1, keepdims=True)  # poses of one object count once
    none, everything = "0" * len(FACTORS), "1" * len(FACTORS)
    cells: dict[str, dict[str, Any]] = {}
    for name in measured[0]["cells"]:
        seeds = [run["cells"][name] for run in measured]
        codes = list(dict.fromkeys(code for cell in seeds for code in cell["codes"]))
        cells[name] = {"passed": [float(c["verdict"] == "PASS") for c in seeds], "codes": codes}
    result: dict[str, Any] = {"objects": len(unique), "seeds": len(measured), "cells": cells}
    for outcome in OUTCOMES:
        values = {
            name: np.stack([member @ np.array(run["cells"][name][outcome]) for run in measured])
            for name in cells
        }
        whole = values[everything] - values[none]
        part = {"original": AS_IT_WAS, "none": none, "mended": everything}
        result[outcome] = {word: _summary(values[name]) for word, name in part.items()}
        truth = np.stack([member @ np.array(run["truth"][outcome]) for run in measured])
        result[outcome] |= {"truth": _summary(truth), "factors": {}}
        for i, (factor, gain) in enumerate(zip(FACTORS, shapley(values), strict=True)):
            alone = none[:i] + "1" + none[i + 1 :]
            last = everything[:i] + "0" + everything[i + 1 :]
            result[outcome]["factors"][factor] = {
                "gain": _summary(gain),
                "share": _summary(gain, whole),
                "alone": _summary(values[alone] - values[none]),
                "last": _summary(values[everything] - values[last]),
            }
        for name, cell in cells.items():
            cell[outcome] = _summary(values[name])
    return result


def _summary(values: np.ndarray, over: np.ndarray | None = None) -> Estimate:
    """Of (seeds, objects): the mean, or the ratio of means, whose interval is that of its
    linearisation (values - ratio over) / mean(over)."""
    below = np.ones_like(values) if over is None else over
    if not below.mean():
        return Estimate()  # no gain has no shares
    mean = float(values.mean() / below.mean())
    low, high = interval((values - mean * below) / below.mean())
    each = values.mean(axis=1) / below.mean(axis=1)
    return Estimate(mean, tuple(map(float, each)), mean + low, mean + high)


def shares_table(split: Mapping[str, Any], outcome: str) -> pd.DataFrame:
    """A row a factor: its share of what was gained (%), the gain, and alone and last."""
    rows = []
    for factor, (name, mended) in FACTORS.items():
        entry = split[outcome]["factors"][factor]
        row = {f"{outcome}: mended": f"{name}: {mended}", "share": percent(entry["share"])}
        row |= {"gained": entry["gain"].text(), "mended alone": entry["alone"].text()}
        rows.append(row | {"mended last": entry["last"].text()})
    return pd.DataFrame(rows)


def percent(share: Estimate) -> str:
    """A share in per cent."""
    mean, low, high = (100 * v for v in (share.mean, share.low, share.high))
    return Estimate(mean, tuple(100 * s for s in share.seeds), low, high).text(0) + " %"


def cells_table(split: Mapping[str, Any]) -> pd.DataFrame:
    """The 16 cells, "x" where a factor is mended, and what the gate says to each."""
    rows = []
    for name, cell in split["cells"].items():
        passed = int(sum(cell["passed"]))
        said = "PASS" if passed == split["seeds"] else "FAIL: " + "".join(cell["codes"][:1])
        if 0 < passed < split["seeds"]:
            said += f" ({split['seeds'] - passed} of {split['seeds']} seeds)"
        marks = {f: "x" if bit == "1" else "" for f, bit in zip(FACTORS, name, strict=True)}
        rows.append({**marks, **{o: cell[o].text() for o in OUTCOMES}, "the gate says": said})
    return pd.DataFrame(rows)
