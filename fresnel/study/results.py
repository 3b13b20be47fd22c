"""What a training leaves: figures for results.json, and weights that name the run behind them.

Of a smoke test too: can the network learn this data, and is there anything to learn?  The
thresholds and the verdict stand in notebook 02.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fresnel.data.dataset import ViewTensors
from fresnel.evaluation import denoising
from fresnel.evaluation import metrics as evaluate
from fresnel.models import cvs
from fresnel.models.condition import rgba
from fresnel.report.record import RunRecord
from fresnel.scene.colour import luminance
from fresnel.training.loop import TrainResult
from fresnel.training.task import Task

Rows = Sequence[Mapping[str, Any]]
PLACES = {"export_to", "output_dir", "dataset_dir", "truth_source", "decoder_weights"}
"""Parameters that are of the machine, not the run."""


class OneBatch:
    """A task that sees the same batch at every step: what a network must be able to overfit."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        generator = torch.Generator(next(task.model.parameters()).device).manual_seed(seed)
        self._batch = task.batch(0, generator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def batch(self, step: int, generator: torch.Generator) -> Any:
        return self._batch


def steps_per_epoch(views: ViewTensors, batch_size: int) -> int:
    """Steps that draw as many (record, view) pairs as the set has."""
    return max(1, views.rgb.shape[0] * views.rgb.shape[1] // batch_size)


def loss_fall(history: Rows, first: float | None = None) -> float:
    """First over last loss, each the mean of a tenth of the logged steps.

    Args:
        first: take this as the first loss, such as `untrained_loss` where training went on from
            other weights.
    """
    losses = [row["loss"] for row in history if row.get("loss") is not None]
    tenth = max(1, len(losses) // 10)
    last = sum(losses[-tenth:]) / tenth
    first = sum(losses[:tenth]) / tenth if first is None else first
    return first / last if last else float("inf")


@torch.no_grad()
def untrained_loss(task: Any, seed: int, *, batches: int = 4) -> float:
    """A CVS task's loss for a network that has learned nothing: its last layer is zero."""
    blank, total = copy.copy(task), 0.0
    blank.model = model = copy.deepcopy(task.model)
    for weights in model.unet.head.parameters():
        weights.zero_()
    for step in range(batches):
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed + step)
        batch = blank.batch(step, generator)
        total += float(blank.loss(batch, progress=0.0, generator=generator, ema=model)["loss"])
    return total / batches


@torch.no_grad()
def noise_shares(
    network: Any, views: ViewTensors, seed: int, *, most: int = 8, **given: Any
) -> dict[str, list[float]]:
    """Of the noise at `noise.LEVELS`, the share that a CVS leaves ("left"; two views each of
    at most so many of the records), that a network leaves which ignores its noisy input
    ("ignoring"), and that the best linear denoiser of such views leaves ("linear"); {} for a
    decoder, and for a network without the boundary condition, which promises nothing of it.

    Args:
        given: what `cvs.condition` needs besides: "renderer", "camera_map".
    """
    if getattr(network.config, "parameterisation", "") != "consistency":
        return {}
    count, each = views.rgb.shape[:2]
    part = views[[i * count // min(most, count) for i in range(min(most, count))]]
    sides = sorted({each // 4, each // 2})
    target = rgba(part.rgb[:, sides], part.alpha[:, sides]).flatten(0, 1).to(network.device)
    cond = cvs.condition(network, part.inputs, part.cameras[:, sides], **given)
    generator = torch.Generator(network.device).manual_seed(seed)
    return {
        "left": denoising.noise_left(network, cond, target, generator=generator),
        "ignoring": denoising.ignoring(network),
        "linear": denoising.linear(target),
    }


def light_of_targets(data: ViewTensors) -> dict[str, float]:
    """Light and area of a set's views over those of its inputs: sums over all pixels.

    Returns:
        ``target_luminance`` and ``target_coverage``; 1 where views are as bright and as large.
    """
    inputs, views = data.inputs, data.rgb.shape[1]
    light = sum(luminance(rgb.float() / 255).sum().item() for rgb in data.rgb)
    light_in = luminance(inputs.rgb.float() / 255).sum().item()
    cover, cover_in = (alpha.float().sum().item() for alpha in (data.alpha, inputs.alpha))
    pixels = inputs.alpha[0].numel() / data.alpha[0, 0].numel() / views
    return {
        "target_luminance": light / max(light_in, 1e-9) * pixels,
        "target_coverage": cover / max(cover_in, 1e-9) * pixels,
    }


def loss_terms(history: Rows) -> list[str]:
    """The loss, then its named terms, as the log has them."""
    names = {k for k, v in history[-1].items() if isinstance(v, float)} if history else set()
    return ["loss", *sorted(names - {"loss", "lr", "grad_norm", "samples_per_s", "progress"})]


def validation_curves(validations: Rows) -> dict[str, tuple[list[float], list[float]]]:
    """Ratios on the validation objects over steps: name -> (steps, values)."""
    names = [name for row in validations[:1] for name in row if "ratio" in name]
    steps = [row["step"] for row in validations]
    return {name.replace("_", " "): (steps, [row[name] for row in validations]) for name in names}


def training_metrics(result: TrainResult, held_out: Mapping[str, Any]) -> dict[str, Any]:
    """A training run's key figures: of its held-out views over all azimuths, and its own."""
    ours = ("psnr", "ssim", *evaluate.RATIOS, *evaluate.EXTRA)
    return {
        **{name: held_out[name] for name in ours if name in held_out},
        "loss_fall": loss_fall(result.history),
        "loss_history": [[row["step"], row["loss"]] for row in result.history if "loss" in row],
        "steps": result.steps,
        "gate_overridden": result.gate_overridden,
        **speed_metrics(result),
    }


def speed_metrics(result: TrainResult) -> dict[str, Any]:
    """What a training took."""
    same = ("samples_per_s", "compile_s", "paused_s", "peak_memory_bytes")
    return {name: getattr(result, name) for name in same} | {"train_duration_s": result.duration_s}


def by_object(measured: Mapping[str, Rows]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """What two runs are compared by, pair by pair: PSNR, SSIM and, where it was measured, the
    perceptual distance of every object, in thousandths.

    The mean and the black image are left out, and of further network calls the bins: nothing is
    paired with them, and a study of 60 runs is to stay small.

    Args:
        measured: predictor -> rows of `evaluate.evaluate`.

    Returns:
        "psnr_by_object", "ssim_by_object" and "perceptual_by_object": predictor -> bin -> object ->
        value.
    """
    kept = {n: rows for n, rows in measured.items() if n not in ("mean_image", "black_image")}
    known = all("perceptual" in row for rows in measured.values() for row in rows)
    return {
        f"{metric}_by_object": {
            name: {
                azimuth_bin: {key: round(value, 3) for key, value in objects.items()}
                for azimuth_bin, objects in evaluate.by_object(rows, metric).items()
                if azimuth_bin == "all" or not name.endswith(" steps")
            }
            for name, rows in kept.items()
        }
        for metric in ("psnr", "ssim", *(["perceptual"] if known else []))
    }


def ratios_by_azimuth(rows: Rows) -> dict[str, list[float]]:
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


def export(network: Any, path: str | Path, record: RunRecord) -> Path:
    """Write a trained network in half precision, with the run that made it in its metadata, and the
    perceptual distances to the truth that `views` chooses by, as far as the run measured them."""
    every = {name: rows[-1] for name, rows in record.metrics.get("summaries", {}).items()}
    pair = {"cvs": every.get(record.params.get("model")), "decoder": every.get("decoder render")}
    known = {name: row["perceptual"] for name, row in pair.items() if row and "perceptual" in row}
    network.provenance = {
        "held_out": known,
        "notebook": record.notebook,
        "params": {k: v for k, v in record.params.items() if k not in PLACES},
        "provenance": {k: v for k, v in record.provenance.items() if k != "datasets"},
        "data": [found["content_hash"] for found in record.provenance["datasets"]],
        "started_utc": record.started_utc,
    }
    return network.save(path, half=True)
