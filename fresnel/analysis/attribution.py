"""How much of the original's darkness came from what: a full factorial over four factors.

Every held-out object is decoded and rendered in the 2^4 cells of `FACTORS`, each as in the original
or mended; the gate measures how much of its input's light and area a view still holds.  Shapley
values split the way from nothing mended to all among the factors, in whatever order one mends.
"""

import copy
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.special import comb
from torch import Tensor

from fresnel import gate
from fresnel.analysis.stats import Estimate, over_objects
from fresnel.bootstrap import CORRECTED, ORIGINAL
from fresnel.bootstrap import records as render_records
from fresnel.data.dataset import MultiViewDataset, ObjectViews
from fresnel.data.layout import object_name
from fresnel.host.machine import project_root
from fresnel.models.decoder import FARTHEST, NEAREST, Decoder
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
    depth put them.  Patch kind: on the patch grid at z = -2 - 2 depth, without the learnt offset.
    Pixel kind: on the pixel's ray at the depth of what is seen there; the layers behind join it."""

    def decode(
        rgba: Tensor, cameras: Cameras, depth: Tensor | None = None
    ) -> tuple[Gaussians, dict[str, Tensor]]:
        gaussians, aux = decoder.decode(rgba, cameras, depth)
        config, side = decoder.config, rgba.shape[-1]
        if config.kind == "patch":
            z = NEAREST + (FARTHEST - NEAREST) * aux.get("depth_known", aux["depth_predicted"])
            along = torch.linspace(-1.0, 1.0, z.shape[-1], device=z.device)
            x = along.expand_as(z)  # OpenCV: y grows downwards
            points = torch.stack([x, x.mT, z], dim=-1).flatten(1, 2)
            means = points.repeat_interleave(config.gaussians_per_patch, dim=1)
        else:
            eye = torch.eye(4).to(rgba).expand(len(rgba), 4, 4)
            rays = Cameras(eye, cameras.Ks, side, side).rays()[1].flatten(1, 2)
            seen = gaussians.means[:, : side * side, 2:]
            means = (rays / rays[..., 2:] * seen).repeat(1, config.gaussians_per_pixel, 1)
        return replace(gaussians, means=means), aux

    twin = copy.copy(decoder)
    twin.decode = decode  # type: ignore[method-assign]
    return twin


def decoder_pairs(
    frontal_weights: str, multiview_weights: str, device: str, domain: str = "objects"
) -> dict[str, dict[str, Decoder]]:
    """Seed -> {"frontal", "multi-view"}, for every seed that both kinds were trained with.

    Args:
        frontal_weights, multiview_weights: files that notebook 03 exported, below the project where
            not absolute; "{seed}" stands for whatever numbers there are, a file without it serves
            every seed; "": the one that ships, of `domain`.  Without any seed the only key is "".

    Raises ValueError if a file is missing, or the two have no seed in common."""
    kinds: dict[str, tuple[Literal["patch", "pixel"], str]]
    kinds = {"frontal": ("patch", frontal_weights), "multi-view": ("pixel", multiview_weights)}
    files, seeds = dict[str, dict[str, str]](), None
    for name, (_, text) in kinds.items():
        path = project_root() / text
        form = re.compile(re.escape(path.name).replace(r"\{seed\}", r"(\d+)"))
        if not form.groups:
            continue
        found = {file: form.fullmatch(file.name) for file in path.parent.glob("*")}
        files[name] = {fits[1]: str(file) for file, fits in found.items() if fits}
        if not files[name]:
            raise ValueError(f"no weights at {text}: train them (notebooks/params/study.yaml)")
        seeds = set(files[name]) if seeds is None else seeds & set(files[name])
    if seeds == set():
        raise ValueError(f"no seed in common: {frontal_weights!r} and {multiview_weights!r}")
    return {
        seed: {
            name: load_decoder(kind, device, files.get(name, {}).get(seed, text), domain)
            for name, (kind, text) in kinds.items()
        }
        for seed in sorted(seeds or [""], key=lambda seed: int(seed or 0))
    }


def factorial(
    truth: MultiViewDataset,
    decoders: Mapping[str, Decoder],
    *,
    image_size: int = 64,
    views: int = 8,
    device: str = "cpu",
) -> dict[str, Any]:
    """Light and coverage of every object in every cell.

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
        cells[f"{path}{which}{position}0"] = measure(made)
        cells[f"{path}{which}{position}1"] = measure([exposed(record) for record in made])
    records = [truth[i] for i in range(len(truth))]
    return {"objects": list(truth.names), "cells": cells, "truth": measure(records)}


def exposed(record: ObjectViews) -> ObjectViews:
    """The record with every view's covered pixels scaled, in linear light, to the luminance of the
    input's covered pixels (alpha-weighted means; at most 16-fold; what clips stays clipped)."""
    levels = []
    for rgb, alpha in ((record.input_rgb, record.input_alpha), (record.rgb, record.alpha)):
        weight = alpha.float() / 255
        colour = (rgb.float() / 255 / weight.clamp_min(1 / 255)[..., None]).clamp(0, 1)
        light = (luminance(colour) * weight).sum((-1, -2))
        levels.append(light / weight.sum((-1, -2)).clamp_min(1e-6))
    wanted, found = levels
    gain = (wanted / found.clamp_min(1e-6)).clamp(0, _MAX_GAIN)[:, None, None, None]
    bright = linear_to_srgb(srgb_to_linear(colour) * gain) * weight[..., None]
    return replace(record, rgb=(bright * 255).round().clamp(0, 255).to(torch.uint8))


class _Records(list[ObjectViews]):
    """As much of a dataset as the gate needs."""

    background = (0.0, 0.0, 0.0)
    content_hash = ""


def measure(records: list[ObjectViews]) -> dict[str, Any]:
    """Of a cell: a value an object, and what the gate says.  A view's share of its input's light
    (area) is counted up to 1, so that no view makes up for another: a camera that grazes the
    Gaussians would otherwise pay for seven empty ones."""
    verdict = gate.validate(_Records(records), first=len(records), progress=False)
    views = pd.DataFrame(verdict.measurements).set_index("object")
    ratios = views[["coverage_ratio", "luminance_ratio"]].astype(float)
    ratios = ratios.where(np.isfinite(ratios), 0.0)
    shares = pd.DataFrame({"light": ratios.prod(axis=1), "coverage": ratios.coverage_ratio})
    means = shares.clip(upper=1.0).groupby(level=0).mean().loc[[r.name for r in records]]
    said = {"verdict": "PASS" if verdict.passed else "FAIL"}
    return means.to_dict("list") | said | {"codes": [reason.code for reason in verdict.reasons]}


def shapley(cells: np.ndarray) -> np.ndarray:
    """Shapley values (n, ...) of a game's values (2^n, ...), by the bits of the first index.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)); they add up to
    v(all) - v(none) exactly (Shapley 1953)."""
    factors = len(cells).bit_length() - 1
    bits = np.array(list(itertools.product((0, 1), repeat=factors)))
    others = bits.sum(axis=1, keepdims=True) - bits
    return np.tensordot((2 * bits - 1) / (factors * comb(factors - 1, others)), cells, (0, 0))


def attribute(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `factorial` measured, split among the factors; intervals hold objects and decoders.

    Args:
        measured: an entry a pair of decoders (seed), all of the same objects (else ValueError); of
            none, all is unknown.

    Returns:
        For "light" and "coverage": "original" (`AS_IT_WAS`), "none" mended (and positions locked),
        all "mended", and "truth", each an `Estimate`; "factors": factor -> {"gain" (Shapley value),
        "share" of the whole way, "alone" (mended first, nothing else), "last" (everything else
        mended before)}.  "cells": name -> {"light", "coverage", "passed": 1 or 0 a seed, "codes" of
        the gate}.  "objects", "seeds": how many.
    """
    if any(run["objects"] != measured[0]["objects"] for run in measured):
        raise ValueError("measured: seeds of different objects")
    objects = [object_name(name) for run in measured[:1] for name in run["objects"]] or ["-"]
    cells: dict[str, dict[str, Any]] = {}
    for name in _CELLS if measured else []:
        seeds = [run["cells"][name] for run in measured]
        codes = list(dict.fromkeys(code for cell in seeds for code in cell["codes"]))
        cells[name] = {"passed": [float(c["verdict"] == "PASS") for c in seeds], "codes": codes}
    unknown = {name: {word: [math.nan] for word in OUTCOMES} for name in (*_CELLS, "truth")}
    known = [{**run["cells"], "truth": run["truth"]} for run in measured] or [unknown]
    split: dict[str, Any] = {"cells": cells, "seeds": len(measured)}
    split["objects"] = len(set(objects)) if measured else 0
    for outcome in OUTCOMES:
        columns = {(name, i): run[name][outcome] for name in unknown for i, run in enumerate(known)}
        each = pd.DataFrame(columns, objects).groupby(level=0).mean()  # poses of one count once
        ways = each.to_numpy().T.reshape(len(unknown), len(known), -1)
        none, mended = ways[0], ways[-2]
        parts = {"original": ways[_CELLS.index(AS_IT_WAS)], "none": none}
        parts |= {"mended": mended, "truth": ways[-1]}
        split[outcome] = {word: over_objects(part) for word, part in parts.items()}
        split[outcome]["factors"] = {
            factor: {
                "gain": over_objects(gain),
                "share": over_objects(gain, mended - none),
                "alone": over_objects(ways[bit] - none),
                "last": over_objects(mended - ways[len(_CELLS) - 1 - bit]),
            }
            for factor, gain, bit in zip(FACTORS, shapley(ways[:-1]), (8, 4, 2, 1), strict=True)
        }
        for cell, way in zip(cells.values(), ways, strict=False):
            cell[outcome] = over_objects(way)
    return split


def shares_table(split: Mapping[str, Any], outcome: str) -> pd.DataFrame:
    """A row a factor: its share of what was gained (%), the gain, and alone and last."""
    ways = {"gained": "gain", "mended alone": "alone", "mended last": "last"}
    return pd.DataFrame(
        {f"{outcome}: mended": f"{name}: {mended}", "share": percent(entry["share"])}
        | {word: entry[way].text() for word, way in ways.items()}
        for (name, mended), entry in zip(
            FACTORS.values(), split[outcome]["factors"].values(), strict=True
        )
    )


def percent(share: Estimate) -> str:
    """A share in per cent, with its interval."""
    mean, low, high = (100 * v for v in (share.mean, share.low, share.high))
    figure, *reach = Estimate(mean, (), low, high).text(0).partition(" [")
    return f"{figure} %{''.join(reach)}"


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
