"""What the notebooks share: where images come from, what a smoke test must show, what runs cost.

Each function is one step of the experiment's protocol, so that four notebooks and the command
line cannot drift apart on it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fresnel.bootstrap import CORRECTED, ORIGINAL, BootstrapConfig, bootstrap
from fresnel.data import dataset as ds
from fresnel.data.dataset import MultiViewDataset, ViewTensors
from fresnel.gate import verdict as gate
from fresnel.host.files import fingerprint
from fresnel.host.machine import project_root
from fresnel.objects.sources import data_dir, ground_truth, input_images
from fresnel.report.cache import NOT_TRAINING, code_hash
from fresnel.report.record import Recorder
from fresnel.scene.colour import luminance


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
