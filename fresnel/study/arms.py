"""The arms of an experiment: what is trained, and what it is compared with.

One place builds every network's task and every `Predictor`, so that two arms differ in what their
parameters say and in nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fresnel.bootstrap import NEAR, ORIGINAL, original_input_viewmat, place
from fresnel.data.dataset import InputImages, ObjectViews, ViewTensors
from fresnel.evaluation import metrics as evaluate
from fresnel.models import cvs, decoder
from fresnel.models.cvs import CVS, CVSConfig
from fresnel.models.decoder import DecoderConfig
from fresnel.render import Views
from fresnel.scene.cameras import Cameras, intrinsics, orbit, relative_azimuth_deg
from fresnel.show import scenes, widgets
from fresnel.show.scenes import Scene, scene
from fresnel.training.cvs_task import CVSTask
from fresnel.training.decoder_task import DecoderTask

RENDER_MODELS: dict[str, dict[str, bool]] = {
    "cvs-refine": {"render_condition": True},
    "cvs-twin": {"render_condition": True, "render_twin": True},
    "cvs-warp": {"render_condition": True, "render_twin": True, "render_warp": True},
}
"""What each sees of the target view, as its configuration."""
CVS_MODELS = ("cvs", *RENDER_MODELS)
_LEVELS = {name: getattr(CVSConfig, name) for name in ("p_mean", "p_std")}  # ECT's, as by default
OBJECTIVES: dict[str, dict[str, Any]] = {
    "consistency": {"objective": "consistency", **_LEVELS},
    "diffusion": {"objective": "diffusion", "ect_stages": 1, "sigma_max_fraction": 0.1, **_LEVELS},
    "sharp": {"objective": "sharp"},
    "adversarial": {"objective": "sharp", "adversarial_weight": 0.3},
}
"""What a CVS is trained by, as changes to its configuration."""
RESIDUAL = 0.2
"""Spread of what a decoder's render lacks, `sigma_data` of models that add to it."""
_DECODER_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "decoder": {
        "tiny": {"image_size": 32, "base_channels": 16},
        "small": {"image_size": 64, "base_channels": 24},
        "base": {},
    },
    "decoder-frontal": {
        "tiny": {"kind": "patch", "patch_grid": 12, "image_size": 48},
        "small": {"kind": "patch", "image_size": 148},
        "base": {"kind": "patch", "image_size": 148, "gaussians_per_patch": 8},
    },
}


def make_task(
    model: str,
    size: str,
    data: ViewTensors,
    *,
    seed: int,
    loss_mask: str = "alpha_aware",
    parameterisation: str = "consistency",
    objective: str = "",
    augment: bool = True,
    ground_truth: bool = False,
    pairs: Tensor | None = None,
    renderer: evaluate.Predictor | None = None,
    initial_weights: str | Path = "",
    domain: str = "objects",
    **common: Any,
) -> Any:
    """The task `train.fit` runs: a network, seeded, and its data on the device.

    Args:
        model: "cvs", "cvs-refine" (sees `renderer`'s render of the target view, and adds to it
            rather than drawing the view anew), "cvs-twin" (the same with a second render, of the
            mirrored input), "cvs-warp" (and the input's own pixels, warped to both), "decoder"
            (multi-view supervision) or "decoder-frontal" (the original's patch decoder, supervised
            by the input view alone).
        size: the CVS's preset, or the decoder's base channels.
        augment: mirror half of the pairs and scale each colour channel of a pair by up to
            exp(0.3) either way, and of "objects" order the channels of half of them anew, so that
            few objects do not become the only colours there are.
        parameterisation: of the CVS: "consistency"; "original" (one step, no boundary condition);
            "regression", the consistency network trained for its one step alone: every sample at
            sigma_max, compared with the clean view.
        objective: of the CVS: "" (its size's own), or one of `OBJECTIVES`: "consistency" (ECT),
            "diffusion" (denoising at all levels), "sharp" (denoising, and single steps that look
            right), "adversarial" (the same with a critic).
        ground_truth: any view may serve as the input, not only the record's own.
        pairs: the CVS trains on these (record, view) pairs alone, (P, 2).
        renderer: of the `RENDER_MODELS`.
        initial_weights: "" (random), "shipped" (of CVS models "cvs" and "cvs-warp" ship), or a file
            that 03 exported.
        domain: whose network "shipped" is: "objects" or "faces".
        common: `batch_size`, `device`, and `validation`: objects for the training's own figures,
            its "best" checkpoint and its pictures; neither trained on nor those that judge it in
            the end (None: the training's).
    """
    torch.manual_seed(seed)
    common["any_input"] = ground_truth
    if model in _DECODER_SIZES:
        config, start = DecoderConfig(**_DECODER_SIZES[model][size]), None
        if initial_weights:
            named = "" if initial_weights == "shipped" else initial_weights
            start = load_decoder(config.kind, "cpu", named, domain)
            if start.config != config:
                theirs = {k: v for k, v in asdict(start.config).items() if v != asdict(config)[k]}
                raise ValueError(f"initial_weights: built with {theirs}; got size {size!r}")
        return DecoderTask(data, config, model=start, **common)
    if model not in CVS_MODELS:
        raise ValueError(f"model: got {model!r}, want one of {(*CVS_MODELS, *_DECODER_SIZES)}")
    changes: dict[str, Any] = {"parameterisation": parameterisation}
    if parameterisation == "regression":
        changes = {"sigma_max_fraction": 1.0, "ect_stages": 1}
    if parameterisation != "consistency":
        objective = objective or "consistency"  # these have a loss of their own
    if objective and objective not in OBJECTIVES:
        raise ValueError(f"objective: got {objective!r}, want one of {('', *OBJECTIVES)}")
    changes |= OBJECTIVES.get(objective, {})
    changes |= RENDER_MODELS.get(model, {})
    if initial_weights:
        changes["perceptual_from"] = 0.0  # they denoise already
    if size in ("compact", "sharp") and model in RENDER_MODELS:
        changes |= {"render_mask": True, "sigma_data": RESIDUAL}
    network = CVS(
        CVSConfig.preset(size, image_size=data.rgb.shape[2], loss_weight=loss_mask, **changes)
    )
    if initial_weights:
        ships = initial_weights == "shipped"
        network.start_from(
            cvs.load_shipped(model=model, domain=domain) if ships else CVS.load(initial_weights)
        )
    common |= {"mirror": augment, "colour_jitter": 0.3 if augment else 0.0}
    common["recolour"] = augment and domain == "objects"
    return CVSTask(network, data, pairs=pairs, renderer=renderer, **common)


def original_camera_map(
    inputs: InputImages, cameras: Cameras
) -> tuple[Cameras, Cameras, torch.Tensor]:
    """Ask a model trained on the original's data for the same views in the original's terms.

    There the input camera stands at the world's origin and a view "at azimuth a" is one from
    radius 2 around that origin. Azimuth and elevation about the object are kept.

    Returns:
        Input cameras (M,), target cameras (M, V) and pivots (M, 3) for `cvs.predictor`.
    """
    origin, size = torch.zeros(3, device=cameras.device), cameras.width
    targets = orbit(
        relative_azimuth_deg(cameras, inputs.cameras, origin), cameras.elevation_deg(origin),
        ORIGINAL.radius, pivot=origin, focal_px=ORIGINAL.focal * size, width=size, height=size,
    )  # fmt: skip
    m, width = len(inputs), inputs.cameras.width
    viewmats = original_input_viewmat().to(cameras.device).expand(m, 4, 4)
    Ks = intrinsics(ORIGINAL.focal * width, width, width).to(cameras.device).expand(m, 3, 3)
    return Cameras(viewmats, Ks, width, width), targets, origin.expand(m, 3)


def load_decoder(
    kind: Literal["pixel", "patch"], device: str, weights: str | Path = "", domain: str = "objects"
) -> decoder.Decoder:
    """The decoder of an arm: a checkpoint of notebook 03, or ("") the domain's that ships."""
    if weights:
        return decoder.Decoder.load(weights, device)
    if domain == "faces":
        return decoder.load_shipped("patch_faces" if kind == "patch" else "faces", device)
    return decoder.load_shipped(kind, device)


def renderer(
    model: str, device: str, weights: str | Path = "", domain: str = "objects"
) -> evaluate.Predictor | None:
    """What the `RENDER_MODELS` see beside their input, the decoder's own views; None for others."""
    if model not in RENDER_MODELS:
        return None
    return decoder.predictor(load_decoder("pixel", device, weights, domain))


def predictor(
    model: str,
    network: Any,
    *,
    steps: int = 1,
    original: bool = False,
    seed: int = 0,
    renderer: evaluate.Predictor | None = None,
) -> evaluate.Predictor:
    """Novel views by a trained network.

    Args:
        model: as for `make_task`.
        steps: network calls per view, for a CVS.
        original: the network was trained in the original's geometry: ask in its terms.
        renderer: what a CVS with `render_condition` sees.
    """
    if model in CVS_MODELS:
        camera_map = original_camera_map if original else None
        return cvs.predictor(network, steps, seed, camera_map, renderer=renderer)

    @torch.no_grad()
    def predict(inputs: InputImages, cameras: Cameras) -> Views:  # for the same azimuths
        gaussians, _ = place(inputs, network, ORIGINAL)
        _, targets, _ = original_camera_map(inputs, cameras)
        return decoder.render_small(gaussians, targets, render_size=network.render_size, near=NEAR)

    return predict if model == "decoder-frontal" else decoder.predictor(network)


def rivals(
    views: ViewTensors,
    *,
    model: str,
    original: bool,
    device: str,
    weights: str | Path = "",
    initial_weights: str | Path = "",
    domain: str = "objects",
) -> dict[str, evaluate.Predictor]:
    """What a model is compared with: trivial baselines, and for a CVS the decoder's own render;
    where it started from shipped weights, also what ships for `views` (`sampling`).

    Args:
        weights: of that decoder; "": the shipped one.
        initial_weights, domain: as for `make_task`.
    """
    others = dict(evaluate.baselines(views))
    if model in CVS_MODELS:
        own = load_decoder("patch" if original else "pixel", device, weights, domain)
        others["decoder render"] = predictor("decoder-frontal" if original else "decoder", own)
        if initial_weights == "shipped" and not original:
            twin = cvs.load_shipped(device, "cvs-warp", domain)
            sees = renderer("cvs-warp", device, domain=domain)
            if twin.decoder in ("", getattr(sees, "decoder", "")):  # it learned from these renders
                others["shipped twin"] = cvs.predictor(twin, renderer=sees)
    return others


def more_steps(
    model: str, network: Any, text: str, **options: Any
) -> dict[str, evaluate.Predictor]:
    """Predictors of the same CVS with other numbers of network calls, from "2,4"; {} from "", and
    of a network without the boundary condition, which knows one call alone."""
    if text and not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"compare_steps: got {text!r}, want numbers such as '2,4'")
    if not text or model not in CVS_MODELS or network.config.parameterisation == "original":
        return {}
    counts = [int(part) for part in text.split(",")]
    return {f"cvs, {n} steps": predictor(model, network, steps=n, **options) for n in counts}


@torch.no_grad()
def held_out_scene(
    model: str,
    network: Any,
    truth: ViewTensors,
    records: Sequence[ObjectViews],
    *,
    original: bool,
    device: str,
    weights: str | Path = "",
    domain: str = "objects",
) -> Scene | None:
    """Held-out objects as the model's decoder makes them: its own where the model is one, the one
    it is compared with where it is a CVS; in the original's world for the original. Above each
    stands its true surface, where `records`, of the same objects, have depth."""
    if model in CVS_MODELS:
        network = load_decoder("patch" if original else "pixel", device, weights, domain)
    columns = list[list[Scene]]()
    most = 16_000 // (2 * len(records))  # what a page can hold
    for k, record in enumerate(records):
        inputs, cameras, pivots = truth[[k]].inputs, truth[[k]].cameras, truth[[k]].pivots
        if not original and model != "decoder-frontal":
            made, source = network.world(inputs)[0], inputs.cameras
        else:
            source, cameras, pivots = original_camera_map(inputs, cameras)
            made = place(inputs, network, ORIGINAL)[0][0]
        own = scene(made, cameras[0], source[0], pivots[0], most=most)
        true = widgets.record_scene(record, most=most)
        if shown := [each for each in (true, own) if each is not None and each.gaussians.num]:
            columns.append(shown)
    return scenes.abreast(columns) if columns else None
