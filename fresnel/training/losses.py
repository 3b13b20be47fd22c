"""The losses: of a CVS (consistency, the original's) and of a decoder (many rendered views).

Consistency: Easy Consistency Tuning (ECT), arXiv 2406.14548; what differs is said where it does.
Each is a function that returns its named terms, "loss" being the one to minimise.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fresnel.data.memory import uniform
from fresnel.evaluation.metrics import cell_edges, ssim_map
from fresnel.evaluation.perceptual import Perceptual
from fresnel.models.critic import Critic
from fresnel.models.cvs import CVS, CVSConfig, randn
from fresnel.render import Views
from fresnel.scene.colour import srgb_to_linear
from fresnel.scene.gaussians import Gaussians


def pixel_weights(config: CVSConfig, target: Tensor, depth: Tensor | None = None) -> Tensor:
    """Loss weights (B, 1, H, W) of target views (B, 4, H, W) in [-1, 1].

    "alpha_aware": the object with a margin of an eighth of the image, and the rest, get the
    stated shares of the weight, mean 1 (at most eightfold where there is little object). Without
    the margin a network that is unsure of the outline learns to draw too much of it.
    "depth_laplacian": the original experiment's mask, sigmoid(-100 (|Laplacian(depth)| - 0.01))
    with depth (B, H, W): empty background gets 0.73, the highest weight there is, and edges 0.
    """
    alpha = (target[:, 3:] + 1) / 2
    if config.loss_weight == "none":
        return torch.ones_like(alpha)
    if config.loss_weight == "depth_laplacian":
        if depth is None:
            raise ValueError("depth: got None, want depth maps for loss_weight 'depth_laplacian'")
        padded = F.pad(depth[:, None], (1, 1, 1, 1), mode="replicate")
        across, down = padded[..., 1:-1, :], padded[..., 1:-1]
        around = across[..., :-2] + across[..., 2:] + down[..., :-2, :] + down[..., 2:, :]
        return torch.sigmoid(-100 * ((around - 4 * depth[:, None]).abs() - 0.01))
    share = config.foreground_share
    near = grown(alpha, target.shape[-1] // 8)
    covered = near.mean(dim=(1, 2, 3), keepdim=True)
    foreground = share / covered.clamp_min(share / 8)
    background = (1 - share) / (1 - covered).clamp_min((1 - share) / 8)
    weights = near * foreground + (1 - near) * background
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


def grown(image: Tensor, margin: int) -> Tensor:
    """The largest value within `margin` rows and columns of each pixel: (..., H, W) -> same.

    Windows double by shifts, rows then columns: 7 maxima each way where a max-pool of 65 x 65
    reads 4,225 values a pixel. Same bits.
    """
    window = 2 * margin + 1
    image = F.pad(image, (margin,) * 4, value=-torch.inf)
    for dim in (-1, -2):
        width = 1
        while width < window:
            shift = min(width, window - width)
            rest = image.shape[dim] - shift
            image = torch.maximum(image.narrow(dim, 0, rest), image.narrow(dim, shift, rest))
            width += shift
    return image


def light_error(output: Tensor, target: Tensor) -> Tensor:
    """Share of the target's light that is missing or in excess, region by region, shape (B,).

    An uncertain network predicts the mean, and the mean of sRGB values is darker than that of the
    light they stand for. So linear light, averaged over an eighth of the image each way, is
    compared by itself; the mean over regions is divided by the target's (plus 0.01, for dark ones).
    Images (B, 4, H, W) in [-1, 1], premultiplied.
    """
    found, true = (by_region(srgb_to_linear((x[:, :3] + 1) / 2)) for x in (output, target))
    return (found - true).abs().mean(dim=(1, 2, 3)) / (true.mean(dim=(1, 2, 3)) + 0.01)


def edge_error(output: Tensor, target: Tensor) -> Tensor:
    """Share of the target's edges that is missing or in excess, region by region, shape (B,).

    What an uncertain network draws is smooth, and no distance between pixels or features wants more
    than its best guess. So how much neighbouring pixels differ (root mean square over an eighth of
    the image each way, all four channels) is compared by itself, whatever the edges' places; the
    mean over regions is divided by the target's. At scales of 1, 2 and 4 pixels, and what
    alternates both ways apart from the rest: of one pixel alone a network buys its edges with a
    checkerboard (docs/decisions.md). Images (B, 4, H, W) in [-1, 1], premultiplied.
    """
    errors = []
    for scale in EDGE_SCALES:
        for found, true in zip(_edges(output, scale), _edges(target, scale), strict=True):
            off = (found - true).abs().mean(dim=(1, 2, 3))
            errors.append(off / (true.mean(dim=(1, 2, 3)) + 1e-3))
    return torch.stack(errors).mean(dim=0)


def _edges(image: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """How much neighbours, means over `scale` pixels each way, differ along rows and columns, and
    how much that alternates, by region: root mean squares of values in [0, 1]."""
    image = F.avg_pool2d(image, scale, stride=1)
    across = image[..., scale:] - image[..., :-scale]
    down = (image[..., scale:, :] - image[..., :-scale, :])[..., :-scale]
    both, across = across[..., scale:, :] - across[..., :-scale, :], across[..., :-scale, :]
    pairs = across.square() + down.square(), both.square()
    plain, alternating = (by_region(x.sum(1, keepdim=True)) / 4 for x in pairs)
    return (plain + 1e-6).sqrt(), (alternating + 1e-6).sqrt()


def cell_error(output: Tensor, target: Tensor) -> Tensor:
    """How far what differs between 2 x 2 cells, of all that differs between neighbours, is from the
    target's share beyond a twentieth, shape (B,).

    A network that draws cells of pixels can put its edges on their borders alone: steps, as many
    edges as `edge_error` wants, at places that nothing else minds (docs/decisions.md). In pictures
    the share is a half, by chance a little more or less. Images as `edge_error`'s.
    """
    found, true = (
        (between.sum(1) + 1.0) / (edges.sum(1) + 2.0)  # of nothing a half
        for between, edges in map(cell_edges, (output, target))
    )
    return F.relu((found - true).abs() - 0.05)


def by_region(image: Tensor) -> Tensor:
    """Means over regions of an eighth of the image each way, a rest cut off: (B, C, H, W) -> (B, C,
    h, w)."""
    region = max(1, image.shape[-1] // 8)
    height, width = (size // region * region for size in image.shape[-2:])
    # rows first: pixels of a row lie next to each other
    rows = image[..., :height, :width].unflatten(2, (-1, region)).mean(dim=3)
    return rows.unflatten(3, (-1, region)).mean(dim=4)


def ect_stage(progress: float, config: CVSConfig) -> int:
    """The curriculum's stage at `progress` in [0, 1] of the run: 0 .. ect_stages - 1."""
    if progress < config.denoising_share or config.ect_stages == 1:
        return 0
    later = (progress - config.denoising_share) / max(1 - config.denoising_share, 1e-12)
    return 1 + min(int(later * (config.ect_stages - 1)), config.ect_stages - 2)


def ect_earlier(sigma: Tensor, stage: int, config: CVSConfig) -> Tensor:
    """The lower noise level r of ECT: r / t = 1 - n(t) / q^stage, n(t) = 1 + k sigmoid(-b t).

    r is clamped at sigma_min. In stage 0 every r is sigma_min, which is plain denoising; each
    stage halves (q = 2) the gap, towards the full consistency condition r -> t.
    """
    n = 1 + config.ect_k * torch.sigmoid(-config.ect_b * sigma)
    return (sigma * (1 - n / config.ect_q**stage)).clamp_min(config.sigma_min)


def denoised(model: CVS, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
    """One pass of the network, as a function that a compiled one can replace."""
    return model(x, sigma, cond)


def consistency_terms(
    config: CVSConfig,
    denoised: Tensor,
    reference: Tensor,
    target: Tensor,
    weights: Tensor,
    c_out: Tensor,
    at_max: Tensor,
) -> dict[str, Tensor]:
    """The ECT loss of outputs (B, 4, H, W) against references, and what to watch beside it.

    Pseudo-Huber on the weighted root-mean-square error of each sample, sqrt(e^2 + c^2) - c, over
    c_out(t) (B,). Errors are of the order of c_out, so levels count alike down to where c_out
    falls to c = huber_c (sigma about 0.012); below, the loss is quadratic and falls with c_out.
    `at_max` (B,): which samples are at sigma_max.

    Returns:
        "loss"; "light", `light_error`'s mean; "x0_rms", the error against the clean target over
        all noise levels; "one_step_rms", the same at sigma_max only (0 if no sample was there).
    """
    error = (weights * (denoised - reference).square()).mean(dim=(1, 2, 3))
    huber = (error + config.huber_c**2).sqrt() - config.huber_c
    rms = (denoised.detach() - target).square().mean(dim=(1, 2, 3)).sqrt()
    lost = light_error(denoised, target).mean()
    return {
        "loss": (huber / c_out).mean() + config.light_weight * lost,
        "light": lost.detach(),
        "x0_rms": rms.mean(),
        "one_step_rms": (rms * at_max).sum() / at_max.sum().clamp_min(1),
    }


def noise_levels(target: Tensor, config: CVSConfig, generator: torch.Generator) -> Tensor:
    """One for each view (B, ...): log-normal by the config's p_mean and p_std, (B,)."""
    return (randn(target[:, 0, 0, 0], generator) * config.p_std + config.p_mean).exp()


def consistency_loss(
    model: CVS,
    target: Tensor,
    cond: Tensor,
    weights: Tensor,
    *,
    progress: float,
    generator: torch.Generator,
    network: Callable[..., Tensor] = denoised,
    terms: Callable[..., dict[str, Tensor]] = consistency_terms,
) -> dict[str, Tensor]:
    """ECT loss of D(x_t, t) against a stop-gradient D(x_r, r) with the same noise.

    Differences from ECT, which starts from a diffusion model: its time weight 1 / (t - r) vanishes
    at large t, but training from scratch needs sigma_max, where the one step starts, to count. So
    `sigma_max_fraction` of the samples are there, and with `sigma_max_anchor` their reference is
    the clean view in every stage: the chain of references from there down to the data is too long
    for a short run, and without the anchor the one step drifts off as soon as stage 1 begins.

    `network` and `terms`: `denoised` and `consistency_terms`, perhaps compiled or recorded.
    """
    config, stage = model.config, ect_stage(progress, model.config)
    t = noise_levels(target, config, generator)
    at_max = uniform(generator, target.device, len(target)) < config.sigma_max_fraction
    # c_out vanishes at sigma_min
    t = torch.where(at_max, config.sigma_max, t.clamp(2 * config.sigma_min, config.sigma_max))
    r = ect_earlier(t, stage, config)
    if config.sigma_max_anchor:
        r = torch.where(at_max, config.sigma_min, r)
    noise = randn(target, generator)
    x_t, x_r = (target + level.reshape(-1, 1, 1, 1) * noise for level in (t, r))
    output = network(model, x_t, t, cond)
    reference = x_r  # D(x, sigma_min) = x, so stage 0 needs no second pass
    with torch.no_grad():
        if stage and (x_r.is_cuda or network is not denoised):
            reference = network(model, x_r, r, cond)
        elif stage:  # nor do, where the network is not compiled for a whole batch, all of its rows
            rows = r > config.sigma_min
            reference = x_r.clone()
            if rows.any():
                reference[rows] = model(x_r[rows], r[rows], cond[rows]).to(x_r.dtype)
    return terms(config, output, reference, target, weights, model.scalings(t)[1], at_max)


ONE_STEP_L1, ONE_STEP_SSIM = 6.0, 1.0
ONE_STEP_LIGHT = 1.5  # as `light_weight`: the perceptual distance pulls ten times as hard as either
ONE_STEP_EDGES = 1.5  # chosen on objects that ship (docs/decisions.md)
EDGE_SCALES = (1, 2, 4)  # pixels
AT_MAX = 2 / 3  # of the single steps; the others begin evenly in the logarithm above one_step_from
RAYS = 10  # condition channels before the target's rays, of the picture that is given


def sharp_loss(
    model: CVS,
    target: Tensor,
    cond: Tensor,
    weights: Tensor,
    *,
    progress: float,
    generator: torch.Generator,
    network: Callable[..., Tensor] = denoised,
    terms: Callable[..., dict[str, Tensor]] = consistency_terms,
    one_step: Callable[..., dict[str, Tensor]],
    critic: Critic | None,
) -> dict[str, Tensor]:
    """Denoising on half of the batch, and on the other half one step that has to look right.

    A network that is trained on its one step alone forgets how to denoise (FACM, arXiv 2507.03738),
    and one that learns squared errors is blurred. So half of every batch is plain denoising, noise
    levels by the config's p_mean and p_std, by `consistency_terms`; the other half starts from
    pure noise, or nearly, and is judged by `one_step`, which is `one_step_terms`.

    Returns:
        "loss" and the terms of both.
    """
    config, b = model.config, len(target) // 2
    low, edge = noise_levels(target[:b], config, generator), config.one_step_from
    low = torch.where(low > edge, edge**2 / low, low)  # no level has both tasks: one is blurred
    low = low.clamp_min(2 * config.sigma_min)
    u, start = (uniform(generator, target.device, len(target) - b) for _ in range(2))
    high = edge * (config.sigma_max / edge) ** u
    high = torch.where(start < AT_MAX, config.sigma_max, high)
    backdrop = uniform(generator, target.device, len(target) - b, 4)[..., None, None]
    t = torch.cat([low, high])
    x_t = target + t.reshape(-1, 1, 1, 1) * randn(target, generator)
    output = network(model, x_t, t, cond)
    plain, sharp = output[:b], output[b:]
    c_out, none = model.scalings(low)[1], torch.zeros_like(low)
    denoising = terms(config, plain, target[:b], target[:b], weights[:b], c_out, none)
    looked_at = progress >= config.perceptual_from
    judging = critic if progress >= config.adversarial_from else None
    seen = cond[b:, RAYS:]
    step = one_step(config, sharp, target[b:], weights[b:], backdrop, seen, looked_at, judging)
    kept = {"denoising": denoising["loss"].detach(), "x0_rms": denoising["x0_rms"]}
    loss = step["loss"] + config.denoising_weight * denoising["loss"]
    return {**step, "loss": loss, **kept}


def one_step_terms(
    distance: Perceptual,
    config: CVSConfig,
    output: Tensor,
    target: Tensor,
    weights: Tensor,
    backdrop: Tensor,
    seen: Tensor,
    looked_at: bool,
    critic: Critic | None,
) -> dict[str, Tensor]:
    """How far views (B, 4, H, W) in [-1, 1] are from true ones, to the eye.

    The weighted absolute error and 1 - SSIM (over black), whose best guess where a shape is unsure
    is nothing, so also `light_error`, `edge_error` and `cell_error` (part of "edges"); and
    (`looked_at`) the perceptual distance, over white or (a half of them) over the colour that
    `backdrop` (B, 4, 1, 1) says; of a critic, how much it takes them for made (hinge) and how far
    its features of both lie apart (pix2pixHD, arXiv 1711.11585). `seen`: what the critic knows of
    each view.

    Returns:
        "loss", "l1", "ssim", "light", "edges", "perceptual" (0 if not looked at); of a critic (0
        without) "adversarial", "features" and "critic", its own loss, which is part of "loss" and
        reaches the critic alone.
    """
    l1 = (weights * (output - target).abs()).mean()
    behind = torch.where(backdrop[:, 3:] < 0.5, 1.0, backdrop[:, :3])

    def over(image: Tensor) -> Tensor:
        image = (image.float() + 1) / 2
        return (image[:, :3] + (1 - image[:, 3:]) * behind).permute(0, 2, 3, 1)

    none = torch.zeros_like(l1.detach())  # the terms of a run are the same from its first step
    apart = distance(over(output), over(target)).mean() if looked_at else none
    output = output.float()
    light, edges, cells = (
        of(output, target).mean() for of in (light_error, edge_error, cell_error)
    )
    edges = edges + cells
    black = ((image[:, :3].movedim(1, -1) + 1) / 2 for image in (output, target))
    with torch.autocast(output.device.type, enabled=False):  # differences of squares
        ssim = 1 - ssim_map(*black).mean()
    loss = ONE_STEP_L1 * l1 + ONE_STEP_SSIM * ssim
    loss = loss + ONE_STEP_LIGHT * light + ONE_STEP_EDGES * edges
    loss = loss + config.perceptual_weight * apart
    parts = {"l1": l1, "ssim": ssim, "light": light, "edges": edges, "perceptual": apart}
    found = {"loss": loss, **{name: value.detach() for name, value in parts.items()}}
    found |= dict.fromkeys(("adversarial", "features", "critic"), none)
    if critic is None:
        return found
    true, made = critic(target, seen), critic(output.detach(), seen)
    own = F.relu(1 - true[-1].float()).mean() + F.relu(1 + made[-1].float()).mean()
    ours = critic(output, seen, frozen=True)
    adversarial = -ours[-1].float().mean()
    pairs = zip(ours[:-1], true[:-1], strict=True)
    features = torch.stack([(a - b.detach()).float().abs().mean() for a, b in pairs]).mean()
    found["loss"] = loss + own + config.adversarial_weight * (adversarial + 10 * features)
    parts = {"adversarial": adversarial, "features": features, "critic": own}
    return found | {name: value.detach() for name, value in parts.items()}


def original_loss(
    model: CVS,
    ema: nn.Module,
    target: Tensor,
    cond: Tensor,
    weights: Tensor,
    *,
    progress: float,
    generator: torch.Generator,
    network: Callable[..., Tensor] = denoised,
) -> dict[str, Tensor]:
    """The original experiment's loss: weighted L1 + w |D(x_t) - EMA D(x_t')| at the next level.

    Noise levels follow the cosine schedule, sigma = tan(pi u / 2), with 1,000 levels of u; w is
    0.1, 0.3, 1.0 over the thirds of training. Its perceptual term needs a pretrained network: none.
    """
    u = uniform(generator, target.device, len(target))
    levels = (torch.tan((u - step).clamp_min(0) * (math.pi / 2)) for step in (0.0, 1e-3))
    t, lower = (s.clamp(model.config.sigma_min, model.config.sigma_max) for s in levels)
    noise = randn(target, generator)
    output = network(model, target + t.reshape(-1, 1, 1, 1) * noise, t, cond)
    with torch.no_grad():
        neighbour = ema(target + lower.reshape(-1, 1, 1, 1) * noise, lower, cond)
    l1 = (weights * (output - target).abs()).mean()
    consistency = (output - neighbour).abs().mean()
    w = (0.1, 0.3, 1.0)[original_third(progress)]
    return {"loss": l1 + w * consistency, "l1": l1, "consistency": consistency}


def original_third(progress: float) -> int:
    """Which third of the original's training `progress` in [0, 1] is in."""
    return min(int(3 * progress), 2)


WEIGHTS = {
    "rgb_l1": 1.0,
    "rgb_mse": 4.0,
    "ssim": 0.2,
    "alpha_l1": 0.5,
    "depth_l1": 0.25,
    "predicted_depth": 1.0,
    # large Gaussians blur the side views, half-transparent ones hide depth errors from the front
    "scale": 0.02,
    "opacity": 0.002,
}
"""Of the terms of `multiview_loss`."""


def multiview_loss(
    views: Views,
    target: Tensor,
    background: Tensor,
    *,
    target_depth: Tensor | None = None,
    gaussians: Gaussians | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> dict[str, Tensor]:
    """How far rendered views are from the truth, in named terms (unweighted) and their sum.

    Both sides are composited over the same random background, so a Gaussian can't pass for
    background by being black, nor hide behind a known colour.

    Args:
        views: rendered over black, (B, V, H, W, ...).
        target: premultiplied rgba in [0, 1], (B, V, H, W, 4).
        background: sRGB in [0, 1], broadcastable to (B, V, H, W, 3).
        target_depth: z-depth, (B, V, H, W), 0 where unknown; None: no depth term.
        gaussians: the scenes, for the regularisers; None: none.

    Returns:
        "rgb_l1", "rgb_mse", "ssim" (1 - SSIM), "alpha_l1", perhaps "depth_l1", "scale",
        "opacity", all scalars, and "loss", their weighted sum.
    """
    truth = target[..., :3] + (1 - target[..., 3:]) * background
    ours = views.rgb + (1 - views.alpha) * background
    terms = {
        "rgb_l1": F.l1_loss(ours, truth),
        "rgb_mse": F.mse_loss(ours, truth),
        "alpha_l1": F.l1_loss(views.alpha, target[..., 3:]),
        "ssim": 1 - ssim_map(ours, truth).mean(),
    }
    if target_depth is not None:
        depth, alpha = views.depth[..., 0], views.alpha[..., 0].detach()
        valid = ((target_depth > 0) & (target[..., 3] > 0.5) & (alpha > 0.5)).float()
        error = F.smooth_l1_loss(depth, target_depth, beta=0.05, reduction="none")
        terms["depth_l1"] = (error * valid).sum() / valid.sum().clamp_min(1.0)
    if gaussians is not None:
        opacity = gaussians.opacities
        largest = gaussians.scales.amax(-1)
        terms["scale"] = (opacity * largest).sum() / opacity.sum().clamp_min(1.0)
        terms["opacity"] = (opacity * (1 - opacity)).mean()
    terms["loss"] = torch.stack([weights[k] * v for k, v in terms.items()]).sum()
    return terms
