"""What the notebooks share: where images come from, what a smoke test must show, what runs cost.

Each function is one step of the experiment's protocol, so that four notebooks and the command
line cannot drift apart on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from fresnel.bootstrap import CORRECTED, ORIGINAL, BootstrapConfig, bootstrap
from fresnel.data import dataset as ds
from fresnel.data.dataset import InputImages, MultiViewDataset, ViewTensors
from fresnel.data.images import as_photographs, holds_images
from fresnel.gate import verdict as gate
from fresnel.host.provenance import project_root
from fresnel.report.cache import NOT_TRAINING, code_hash
from fresnel.report.record import Recorder
from fresnel.study import splits as studies

INPUT_SIZE = 128
"""Pixels: rendered inputs are at least this large, which is what the shipped decoders see."""


class Refused(RuntimeError):
    """A run that stopped because its protocol said so; the report says why, without a trace."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of the trace
        return [f"Refused: {self}"]


def parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters cell's values, from a notebook's `globals()` right after it."""
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and isinstance(value, (bool, int, float, str))
    }


def data_dir() -> Path:
    """Where datasets go: runs/data in the project, wherever the notebook was started from."""
    return project_root() / "runs" / "data"


def train_dir(name: str, data: MultiViewDataset, config: Mapping[str, Any]) -> Path:
    """Where the checkpoints of one model on one dataset with one configuration go.

    What has no part in the training does not count: a run that was stopped has a report of its own,
    and the next one must find its checkpoints.  Those of other code it must not find.
    """
    apart = {"output_dir", "export_to", "price_per_hour_usd", "resume", "compare_steps"}
    config = {key: value for key, value in config.items() if key not in apart}
    key = fingerprint({**config, "code": code_hash(NOT_TRAINING)})
    stem = f"{name}-{data.content_hash.removeprefix('sha256:')[:8]}-{key}"
    return project_root() / "runs" / "train" / stem


def pick_device(device: str = "auto") -> str:
    """Resolve "auto" to "cuda" where torch sees a GPU, else "cpu".

    Raises:
        ValueError: if CUDA is asked for and there is none, or the name is unknown.
    """
    if device not in {"auto", "cpu", "cuda"}:
        raise ValueError(f"device: got {device!r}, want 'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' was asked for, but torch sees no GPU; use 'auto' or 'cpu'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def fingerprint(config: Any) -> str:
    """Eight hex digits that name a configuration (a dataclass or a JSON-able mapping)."""
    data = config if isinstance(config, Mapping) else asdict(config)
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def ground_truth(
    source: str,
    split: str,
    *,
    image_size: int,
    images: int = 0,
    views: int = 8,
    azimuths: Literal["even", "random"] = "even",
    objects: int = 0,
    seed: int = 0,
    samples: int = 4,
    exclude_embedded: bool = False,
    cache: Path | None = None,
) -> MultiViewDataset:
    """Multi-view ground truth of 3D objects: rendered once, found again by its configuration.

    Args:
        source: "embedded" (the 24 objects that ship), 3D objects (whatever `meshes.find_assets`
            reads: a folder, .zip, .sh3f, manifest or mesh), or multi-view data in any format that
            `dataset.open` reads (its views are taken as they are).  Of a source that states
            several splits those of `split` are taken.
        split: "train" or "held_out" for the embedded objects; "train", "val" or "test" of others
            ("held_out" means "test" there).
        images: records, at least one per object: objects are seen from as many input poses as it
            takes (0: one each).
        objects: use only the first so many objects (0: all); of multi-view data too.
        exclude_embedded: leave out the objects that ship with the library, so that a decoder
            trained on the rest has never seen what the main job bootstraps from.
    """
    from fresnel.objects import meshes

    if source == "embedded":
        assets = meshes.embedded_assets(cast(Literal["train", "held_out"], split))
    elif ds.holds_objects(source):
        assets = _assets(source, split)
    else:
        data = ds.open(source)
        several = len(set(data.meta.get("object_splits", {}).values())) > 1
        data = studies.part(data, split) if several else data
        return studies.first_objects(data, objects) if objects else data
    assets = _without_embedded(assets, exclude_embedded)[: objects or None]
    inputs_per_object = max(1, math.ceil(images / len(assets)))
    config = {
        "source": Path(source).name,
        "split": split,
        "objects": [asset.name for asset in assets],
        "image_size": image_size,
        "inputs_per_object": inputs_per_object,
        "views": views,
        "azimuths": azimuths,
        "seed": seed,
        "samples": samples,
    }
    path = (
        cache or data_dir()
    ) / f"truth-{Path(source).stem}-{split}-{image_size}px-{fingerprint(config)}"
    if (path / "manifest.json").exists():
        return ds.open(path)
    return meshes.render_set(
        assets,
        path,
        views=views,
        image_size=image_size,
        inputs_per_object=inputs_per_object,
        seed=seed,
        samples=samples,
        azimuths=azimuths,
    )


def _assets(source: str | Path, split: str) -> list[Any]:
    """The 3D objects of a source, of one split if it states several."""
    from fresnel.objects import meshes

    found = meshes.find_assets(source)
    if not found:
        raise ds.DatasetError(f"{source}: neither multi-view data nor 3D objects")
    if len({asset.split for asset in found}) < 2:
        return found
    wanted = "test" if split == "held_out" else split
    chosen = [asset for asset in found if asset.split == wanted]
    if not chosen:
        raise ds.DatasetError(f"{source}: holds no object of split {wanted!r}")
    return chosen


def _without_embedded(assets: list[Any], really: bool) -> list[Any]:
    if not really:
        return assets
    from fresnel.objects import meshes

    known = {asset.origin for asset in meshes.embedded_assets()}
    return [asset for asset in assets if asset.origin not in known]


def input_images(
    source: str,
    *,
    images: int,
    image_size: int,
    seed: int = 0,
    elevation_deg: float = 15.0,
    objects: str = "all",
    exclude_embedded: bool = False,
    cache: Path | None = None,
) -> tuple[InputImages, str]:
    """Single images for the bootstrap, and a sentence on where they come from.

    Args:
        source: "embedded" or 3D objects (input views are rendered from the training objects, their
            cameras known), a dataset in our layout (the inputs of its training records), multi-view
            data in another format (the pictures that act as its inputs), or a folder of image
            files.  The last two are photographs: their cameras are assumed, as
            `dataset.load_images` does, because the bootstrap knows one scale and one pivot.
        images: at most so many; rendered objects are seen from as many input poses as it takes.
        image_size: pixels, of photographs as they are read; renders are at least `INPUT_SIZE`.
        elevation_deg: assumed elevation of photographs.
        objects: which objects' images, for sources that know objects: see `studies.part`.
        exclude_embedded: leave out the objects of a .zip that ship with the library.
    """
    rendered = source == "embedded" or ds.holds_objects(source)
    photographs = rendered and holds_images(source)
    if rendered and not photographs:
        from fresnel.objects import meshes

        assets = (
            meshes.embedded_assets("train")
            if source == "embedded"
            else _without_embedded(_assets(source, "train"), exclude_embedded)
        )
        chosen = studies.choose([asset.name for asset in assets], objects)
        few = min(images, len(assets)) if objects == "all" else 0
        truth = ground_truth(
            source,
            "train",
            image_size=max(image_size, INPUT_SIZE),
            images=images if few else images * -(-len(assets) // len(chosen)),
            views=1,
            objects=few,
            seed=seed,
            exclude_embedded=exclude_embedded,
            cache=cache,
        )
        truth = studies.part(truth, objects)
        few = min(images, len(chosen))
        # Every object once before any twice: a prefix of the inputs is a varied sample.
        order = sorted(range(len(truth)), key=lambda i: (int(truth.names[i].rsplit("__", 1)[1]), i))
        return (
            truth.inputs()[order[:images]],
            f"{images} rendered input views of {few} training objects "
            f"({'embedded, CC0' if source == 'embedded' else Path(source).name})",
        )
    if not rendered and ds.open(source).layout == "fresnel":
        data = studies.part(ground_truth(source, "train", image_size=image_size), objects)
        inputs = data.subset(slice(images)).inputs() if len(data) > images else data.inputs()
        return inputs, f"{len(inputs)} input views of {Path(source).name}, objects: {objects}"
    if objects != "all":
        raise ValueError(f"objects: got {objects!r}, but {source} is a folder of photographs")
    if not photographs:
        data = ds.open(source)
        taken = data.subset(slice(images)).inputs() if len(data) > images else data.inputs()
        inputs = as_photographs(taken, max(image_size, INPUT_SIZE), elevation_deg)
        return inputs, f"{len(inputs)} pictures of {Path(source).name}, cameras assumed"
    inputs = ds.load_images(source, max(image_size, INPUT_SIZE), elevation_deg=elevation_deg)
    if len(inputs) > images:
        inputs = inputs[:images]
    return inputs, f"{len(inputs)} images from {Path(source).name}, elevation assumed"


def bootstrap_config(
    preset: str, views_per_image: int, image_size: int, seed: int
) -> BootstrapConfig | None:
    """The named geometry at this size; None for "truth" and "none", which need no decoder."""
    if preset in {"truth", "none"}:
        return None
    presets = {"original": ORIGINAL, "corrected": CORRECTED}
    if preset not in presets:
        raise ValueError(f"preset: got {preset!r}, want 'original', 'corrected', 'truth', 'none'")
    return replace(
        presets[preset], views_per_image=views_per_image, image_size=image_size, seed=seed
    )


def dataset_folder(config: BootstrapConfig, source: str, images: int, **more: Any) -> Path:
    """Default folder of a bootstrap: named by what it is, so that a second run finds it.

    `more`: what else makes it what it is (its objects, the decoder's weights).
    """
    stem = Path(source).stem
    more = {name: value for name, value in more.items() if value not in ("", "all")}
    key = fingerprint({**asdict(config), "source": source, "images": images, **more})
    return data_dir() / f"{config.name}-{stem}-{images}x{config.image_size}px-{key}"


def demo_dataset(model: str = "cvs", *, image_size: int = 32) -> MultiViewDataset:
    """The smallest corrected bootstrap (for "decoder": ground truth), made and gated if need be.

    What notebooks 02 and 03 train on when they are opened and run with their defaults.
    """
    from fresnel.models.decoder import load_shipped

    if model.startswith("decoder"):
        data = ground_truth("embedded", "train", image_size=image_size)
    else:
        config = replace(CORRECTED, image_size=image_size)
        path = dataset_folder(config, "embedded", 16)
        if not (path / "manifest.json").exists():
            inputs, _ = input_images("embedded", images=16, image_size=image_size)
            bootstrap(inputs, load_shipped("pixel"), config, path)
        data = ds.open(path)
    if gate.read_receipt(data) is None:
        gate.issue_receipt(data, gate.validate(data))
    return data


def require(
    run: Recorder, data: MultiViewDataset, kinds: Sequence[str], *, allow_failed: bool
) -> gate.Receipt:
    """The gate's receipt, if every kind of receipt allows training; else ends the run as REFUSED.

    Raises:
        Refused: says which check is missing or failed and what to run.
    """
    try:
        first = gate.require_receipt(data, kinds[0], allow_failed)
        # the files were hashed for the first one
        same = types.SimpleNamespace(path=data.path, content_hash=data.content_hash)
        for kind in kinds[1:]:
            gate.require_receipt(same, kind, allow_failed)
    except gate.GateRefusal as refusal:
        run.finish("REFUSED", str(refusal), [str(refusal)])
        raise Refused(str(refusal)) from None
    return first


def light_of_targets(data: ViewTensors) -> dict[str, float]:
    """Light and area of a set's views over those of its inputs: sums over all pixels.

    Returns:
        ``target_luminance`` and ``target_coverage``; 1 where views are as bright and as large.
    """
    from fresnel.evaluation.metrics import luminance

    inputs, views = data.inputs, data.rgb.shape[1]
    light = [luminance(rgb.float() / 255).sum().item() for rgb in data.rgb]
    light_in = luminance(inputs.rgb.float() / 255).sum().item()
    cover = data.alpha.float().sum().item()
    cover_in = inputs.alpha.float().sum().item()
    pixels = inputs.alpha[0].numel() / data.alpha[0, 0].numel()
    return {
        "target_luminance": sum(light) / views / max(light_in, 1e-9) * pixels,
        "target_coverage": cover / views / max(cover_in, 1e-9) * pixels,
    }


@dataclass(frozen=True)
class SmokeThresholds:
    """What a smoke test's outputs must show before a full run is worth its price.

    Ratios are of sums over all pixels, outputs against targets, in linear light.  The bands are
    those this project accepts on held-out objects, so a smoke test asks for no more than the full
    run does.  ``target_coverage`` and ``target_luminance`` compare the targets with the inputs:
    a model can match black targets perfectly and be worthless.
    """

    luminance: tuple[float, float] = (0.8, 1.25)
    coverage: tuple[float, float] = (0.75, 1.33)
    loss_fall: float = 1.5
    target_coverage: float = 0.4
    target_luminance: float = 0.4


def smoke_verdict(
    measured: Mapping[str, float], thresholds: SmokeThresholds = SmokeThresholds()
) -> tuple[bool, list[str]]:
    """Go or no-go, and the reasons, from what the smoke test measured.

    Args:
        measured: ``loss_fall`` (first over last loss), ``luminance_ratio`` and ``coverage_ratio``
            (outputs over targets), ``target_luminance`` and ``target_coverage`` (targets over
            inputs). NaN counts as a failure.
    """
    reasons = []
    value = measured["target_coverage"]
    if not value >= thresholds.target_coverage:
        reasons.append(
            f"the targets are empty: they cover {value:.2f} of what the inputs cover "
            f"(want at least {thresholds.target_coverage:g})"
        )
    value = measured["target_luminance"]
    if not value >= thresholds.target_luminance:
        reasons.append(
            f"the targets hold {value:.2f} of the inputs' light "
            f"(want at least {thresholds.target_luminance:g})"
        )
    value = measured["loss_fall"]
    if not value >= thresholds.loss_fall:
        reasons.append(f"the loss fell only {value:.2f}-fold (want {thresholds.loss_fall:g})")
    for name in ("luminance", "coverage"):
        value = measured[f"{name}_ratio"]
        low, high = getattr(thresholds, name)
        if not low <= value <= high:
            reasons.append(
                f"the outputs' {name} is {value:.2f} of the targets' (want {low:g} to {high:g})"
            )
    return not reasons, reasons


def usefulness(trained: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Loss histories and held-out luminance by azimuth bin of training runs, for one figure."""
    series = {}
    for role, run in trained.items():
        metrics = run["metrics"]
        bins = [entry for entry in metrics["summaries"]["cvs"] if entry["bin"] != "all"]
        steps, loss = zip(*metrics["loss_history"], strict=True)
        series[role] = {
            "steps": steps,
            "loss": loss,
            "bins": [entry["bin"] for entry in bins],
            "luminance_ratio": [entry["luminance_ratio"] for entry in bins],
        }
    return series


def crop_rows(sheet: Any, rows: int, *, row_px: int = 134) -> np.ndarray:
    """The upper rows of a contact sheet that was saved as a picture, as an RGB array."""
    array = np.asarray(sheet.convert("RGB"))
    return array[: 24 + rows * row_px]


def restore_nan(value: Any) -> Any:
    """What JSON could not say (null) back to NaN, through dicts and lists."""
    if isinstance(value, dict):
        return {key: restore_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restore_nan(item) for item in value]
    return float("nan") if value is None else value
