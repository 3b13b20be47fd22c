"""What a training leaves: figures for results.json, and weights that name the run behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fresnel.evaluation import metrics as evaluate
from fresnel.report.record import RunRecord
from fresnel.study.smoke import loss_fall
from fresnel.training.loop import TrainResult


def loss_terms(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The loss, then its named terms, as the log has them."""
    names = {k for k, v in history[-1].items() if isinstance(v, float)} if history else set()
    return ["loss", *sorted(names - {"loss", "lr", "grad_norm", "samples_per_s", "progress"})]


def validation_curves(
    validations: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[list[float], list[float]]]:
    """Ratios on the validation objects over steps: name -> (steps, values)."""
    names = [name for row in validations[:1] for name in row if "ratio" in name]
    steps = [row["step"] for row in validations]
    return {name.replace("_", " "): (steps, [row[name] for row in validations]) for name in names}


def training_metrics(result: TrainResult, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """A training run's key figures: of its held-out views over all azimuths, and its own."""
    ours = ("luminance_ratio", "coverage_ratio", "psnr", "ssim")
    return {
        **{name: held_out[name] for name in ours},
        "loss_fall": loss_fall(result.history),
        "loss_history": [[row["step"], row["loss"]] for row in result.history if "loss" in row],
        "steps": result.steps,
        "gate_overridden": result.gate_overridden,
        **speed_metrics(result),
    }


def speed_metrics(result: TrainResult) -> dict[str, Any]:
    """What a training took."""
    return {
        "samples_per_s": result.samples_per_s,
        "train_duration_s": result.duration_s,
        "compile_s": result.compile_s,
        "paused_s": result.paused_s,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def psnr_by_object(
    measured: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """What two runs are compared by, pair by pair: PSNR of every object over black and over white,
    in thousandths of a dB.

    The mean and the black image are left out, and further network calls over white: nothing is
    paired with them, and a study of 60 runs is to stay small.

    Args:
        measured: predictor -> rows of `evaluate.evaluate`.

    Returns:
        "psnr_by_object" and "psnr_white_by_object": predictor -> bin -> object -> dB.
    """
    apart = {"psnr": r"mean_image|black_image", "psnr_white": r"mean_image|black_image|.* steps"}
    return {
        f"{metric}_by_object": {
            name: {
                azimuth_bin: {key: round(value, 3) for key, value in objects.items()}
                for azimuth_bin, objects in evaluate.by_object(rows, metric).items()
            }
            for name, rows in measured.items()
            if not re.fullmatch(left_out, name)
        }
        for metric, left_out in apart.items()
    }


def ratios_by_azimuth(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Sums of light and area over objects, outputs over truth, by azimuth in 45 degree steps."""
    azimuths = [float(a) for a in range(-135, 181, 45)]
    ratios: dict[str, list[float]] = {"azimuth_deg": azimuths}
    for quantity in ("luminance", "coverage"):
        values = ratios[f"{quantity}_ratio"] = []
        for azimuth in azimuths:
            chosen = [r for r in rows if round((r["azimuth_deg"] - azimuth) / 45) % 8 == 0]
            target = sum(r[f"{quantity}_target"] for r in chosen)
            values.append(sum(r[quantity] for r in chosen) / target if target else float("nan"))
    return ratios


_PLACES = {
    "export_to",
    "output_dir",
    "dataset_dir",
    "truth_source",
    "decoder_weights",
}  # of the machine, not the run


def export(network: Any, path: str | Path, record: RunRecord) -> Path:
    """Write a trained network in half precision, with the run that made it in its metadata."""
    network.provenance = {
        "notebook": record.notebook,
        "params": {k: v for k, v in record.params.items() if k not in _PLACES},
        "provenance": {k: v for k, v in record.provenance.items() if k != "datasets"},
        "data": [found["content_hash"] for found in record.provenance["datasets"]],
        "started_utc": record.started_utc,
    }
    return network.save(path, half=True)
