"""How much of the original's darkness came from what: a full factorial over four factors.

Every held-out object is decoded and rendered in the 2^4 cells of {camera path} x {decoder} x
{position} x {exposure}, each factor as in the original or mended, and the gate's measurements say
how much of its input's light and area a view still holds.  Shapley values split the way from the
original's cell to the mended one among the factors, whatever order one would mend them in.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.special import comb
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
_CELLS = ["".join(bits) for bits in itertools.product("01", repeat=len(FACTORS))]
_MAX_GAIN = 16.0
"""Exposure is raised by no more: beyond, 8-bit views would be made of noise."""


def locked(decoder: Decoder) -> Decoder:
    """The same decoder (weights shared), whose Gaussians stay where the input's pixels and their
    depth put them.

    Patch kind: on the patch grid at z = -2 - 2 depth, without the learnt offset.  Pixel kind: on
    the pixel's ray at the depth of what is seen there; the layers behind come forward to it.
    """

    def decode(
        rgba: Tensor, cameras: Cameras, depth: Tensor | None = None
    ) -> tuple[Gaussians, dict[str, Tensor]]:
        gaussians, aux = decoder.decode(rgba, cameras, depth)
        if decoder.config.kind == "patch":
            used = aux.get("depth_known", aux["depth_predicted"])
            along = torch.linspace(-1.0, 1.0, used.shape[-1], device=used.device)
            y, x = torch.meshgrid(along, along, indexing="ij")  # OpenCV: y grows downwards
            z = NEAREST + (FARTHEST - NEAREST) * used
            points = torch.stack([x.expand_as(z), y.expand_as(z), z], dim=-1).flatten(1, 2)
            means = points.repeat_interleave(decoder.config.gaussians_per_patch, dim=1)
        else:
            side = rgba.shape[-1]
            eye = torch.eye(4).to(rgba).expand(len(rgba), 4, 4)
            rays = Cameras(eye, cameras.Ks, side, side).rays()[1].flatten(1, 2)
            seen = gaussians.means[:, : side * side, 2:]
            means = (rays / rays[..., 2:] * seen).repeat(1, decoder.config.gaussians_per_pixel, 1)
        return replace(gaussians, means=means), aux

    twin = copy.copy(decoder)
    twin.decode = decode  # type: ignore[method-assign]
    return twin


class _Records(list[ObjectViews]):
    """As much of a dataset as the gate needs."""

    background = (0.0, 0.0, 0.0)
    content_hash = ""


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
    kinds: dict[str, tuple[Literal["patch", "pixel"], str]] = {
        "frontal": ("patch", frontal_weights),
        "multi-view": ("pixel", multiview_weights),
    }
    files = {name: _by_seed(text) for name, (_, text) in kinds.items()}
    named = [set(found) for found in files.values() if "" not in found]
    seeds = sorted(set.intersection(*named), key=int) if named else [""]
    if not seeds:
        raise ValueError(f"no seed in common: {frontal_weights!r} and {multiview_weights!r}")
    return {
        seed: {
            name: load_decoder(kind, device, files[name].get(seed, files[name].get("", "")))
            for name, (kind, _) in kinds.items()
        }
        for seed in seeds
    }


def _by_seed(text: str) -> dict[str, str]:
    """Seed -> file; the key "" where the text names no seed."""
    if "{seed}" not in text:
        return {"": text}
    path = project_root() / text
    before, after = path.name.split("{seed}")
    found = path.parent.glob(path.name.replace("{seed}", "*"))
    seeds = {file.name.removeprefix(before).removesuffix(after): str(file) for file in found}
    files = {seed: file for seed, file in seeds.items() if seed.isdecimal()}
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
        used = (decoder if position == "1" else locked(decoder)).to(device)
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
    verdict = gate.validate(_Records(records), first=len(records), progress=False)
    views = pd.DataFrame(verdict.measurements).set_index("object")
    ratios = views[["coverage_ratio", "luminance_ratio"]].astype(float)
    ratios = ratios.where(np.isfinite(ratios), 0.0)
    shares = pd.DataFrame({"light": ratios.prod(axis=1), "coverage": ratios.coverage_ratio})
    means = shares.clip(upper=1.0).groupby(level=0).mean().loc[[r.name for r in records]]
    codes = [reason.code for reason in verdict.reasons]
    return {
        **means.to_dict("list"),
        "verdict": "PASS" if verdict.passed else "FAIL",
        "codes": codes,
    }


def shapley(cube: np.ndarray, factors: int = len(FACTORS)) -> np.ndarray:
    """Shapley values (factors, ...) of a game's values (2, 2, ..., ...), an axis a factor.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)); they add up to
    v(all) - v(none) exactly (Shapley 1953).
    """
    size = np.indices((2,) * (factors - 1)).sum(axis=0)
    weight = 1 / (factors * comb(factors - 1, size))
    gains = [np.diff(cube, axis=i).squeeze(i) for i in range(factors)]
    return np.stack([np.tensordot(weight, gain, factors - 1) for gain in gains])


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
    if any(run["objects"] != measured[0]["objects"] for run in measured):
        raise ValueError("measured: seeds of different objects")
    objects = [object_name(name) for run in measured[:1] for name in run["objects"]]
    result: dict[str, Any] = {"objects": len(set(objects)), "seeds": len(measured), "cells": {}}
    for name in _CELLS if measured else []:
        seeds = [run["cells"][name] for run in measured]
        codes = list(dict.fromkeys(code for cell in seeds for code in cell["codes"]))
        passed = [float(cell["verdict"] == "PASS") for cell in seeds]
        result["cells"][name] = {"passed": passed, "codes": codes}
    for outcome in OUTCOMES:
        # poses of one object count once; without runs, one value that is not known
        values = [
            [
                pd.Series(cell[outcome], objects).groupby(level=0).mean()
                for run in measured
                for cell in [run["truth"] if name == "truth" else run["cells"][name]]
            ]
            or [[math.nan]]
            for name in (*_CELLS, "truth")
        ]
        *cells, truth = np.array(values, float)
        cube = np.reshape(cells, (2,) * len(FACTORS) + truth.shape)
        by_name = dict(zip(_CELLS, cells, strict=True))
        none, mended = cells[0], cells[-1]
        factors = {}
        for i, (factor, gain) in enumerate(zip(FACTORS, shapley(cube), strict=True)):
            bits = np.eye(len(FACTORS), dtype=int)[i]
            factors[factor] = {
                "gain": _summary(gain),
                "share": _summary(gain, mended - none),
                "alone": _summary(cube[tuple(bits)] - none),
                "last": _summary(mended - cube[tuple(1 - bits)]),
            }
        parts = {"original": by_name[AS_IT_WAS], "none": none, "mended": mended, "truth": truth}
        result[outcome] = {word: _summary(part) for word, part in parts.items()}
        result[outcome]["factors"] = factors
        for name, cell in result["cells"].items():
            cell[outcome] = _summary(by_name[name])
    return result


def _summary(values: np.ndarray, over: np.ndarray | None = None) -> Estimate:
    """Of (seeds, objects): the mean, or the ratio of means, whose interval is that of its
    linearisation (values - ratio over) / mean(over)."""
    below = np.ones_like(values) if over is None else over
    if not below.mean() or np.isnan(values).any():
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
        ways = {"gained": "gain", "mended alone": "alone", "mended last": "last"}
        rows.append(row | {word: entry[way].text() for word, way in ways.items()})
    return pd.DataFrame(rows)


def percent(share: Estimate) -> str:
    """A share in per cent."""
    mean, low, high = (100 * v for v in (share.mean, share.low, share.high))
    return Estimate(mean, tuple(100 * s for s in share.seeds), low, high).text(0) + " %"


def cells_table(split: Mapping[str, Any]) -> pd.DataFrame:
    """The 16 cells, "x" where a factor is mended, and what the gate says to each."""
    rows = []
    for name, cell in split["cells"].items():
        failed = cell["passed"].count(0.0)
        said = "FAIL: " + "".join(cell["codes"][:1]) if failed else "PASS"
        if 0 < failed < split["seeds"]:
            said += f" ({failed} of {split['seeds']} seeds)"
        marks = {f: "x" if bit == "1" else "" for f, bit in zip(FACTORS, name, strict=True)}
        rows.append({**marks, **{o: cell[o].text() for o in OUTCOMES}, "the gate says": said})
    return pd.DataFrame(rows)
