"""Images -> Gaussians -> novel views -> a dataset on disk: the experiment's central bet.

`ORIGINAL` is the geometry of the experiment this project grew from, kept as the negative control:
its cameras orbit the point where the input camera stands, about three units away from the object.
`CORRECTED` orbits the object.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fresnel.data import dataset
from fresnel.data.dataset import Encoded, InputImages, MultiViewDataset, ObjectViews, encode
from fresnel.host.pool import processes
from fresnel.models.decoder import Decoder, DecoderConfig, prune, render_small
from fresnel.scene.cameras import STANDARD_FOCAL, STANDARD_RADIUS, Cameras, orbit
from fresnel.scene.gaussians import Gaussians

_ORIGIN = (0.0, 0.0, 0.0)
NEAR = 0.2
"""Near plane, 3DGS's own.  One of the original's eight cameras all but touches its Gaussians, and a
splat that grazes a camera is linearised into a smear over the whole picture."""


@dataclass(frozen=True)
class BootstrapConfig:
    """How to turn an image into novel views of it.

    Args:
        name: for reports.
        pivot: what the cameras orbit: "object" (its centre) or "world_origin", the original's
            world in which the input camera itself stands at the origin.  There is no default.
        decoder_kind: the decoder this configuration is meant for, "pixel" or "patch".
        views_per_image: views, evenly spread in azimuth.
        image_size: side of the square views, and of the input as it is stored, in pixels.
        elevation_range_deg: elevations are uniform in it.
        radius: distance from the pivot to the cameras.
        focal: focal length in image widths.
        background: sRGB in [0, 1].
        seed: of the elevations; each image mixes in its name, so a subset gets the same views.
    """

    name: str
    pivot: Literal["object", "world_origin"]
    decoder_kind: Literal["pixel", "patch"] = "pixel"
    views_per_image: int = 8
    image_size: int = 64
    elevation_range_deg: tuple[float, float] = (-30.0, 45.0)
    radius: float = STANDARD_RADIUS
    focal: float = STANDARD_FOCAL
    background: tuple[float, float, float] = _ORIGIN
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.elevation_range_deg
        for name, holds, want in (
            ("pivot", self.pivot in ("object", "world_origin"), "'object' or 'world_origin'"),
            ("decoder_kind", self.decoder_kind in ("pixel", "patch"), "'pixel' or 'patch'"),
            ("views_per_image", self.views_per_image >= 1, "at least 1"),
            ("image_size", self.image_size >= 1, "at least 1"),
            ("elevation_range_deg", -90 < low <= high < 90, "-90 < low <= high < 90"),
            ("radius", self.radius > 0, "a number > 0"),
            ("focal", self.focal > 0, "a number > 0"),
        ):
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want {want}")


ORIGINAL = BootstrapConfig("original", "world_origin", "patch", radius=2.0, focal=1.0)
"""The original's geometry: every camera looks at the point where the input camera stands."""

CORRECTED = BootstrapConfig("corrected", "object", "pixel")
"""The standard orbit about the object's centre, azimuths relative to the input camera."""


def original_input_viewmat() -> Tensor:
    """World-to-camera matrix (4, 4) of the original's input camera: OpenGL's, at the origin."""
    return torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))


def novel_cameras(inputs: InputImages, config: BootstrapConfig) -> Cameras:
    """The cameras (M, V) from which `bootstrap` renders these inputs.

    The original's stand at 2 (cos az cos el, sin el, sin az cos el) and look at 0: their azimuth
    starts on +X and grows towards +Z, ours starts on +Z and grows towards +X.
    """
    count, size, elevations = config.views_per_image, config.image_size, []
    low, high = config.elevation_range_deg
    for name in inputs.names:
        digest = hashlib.sha256(f"{config.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        elevations.append(low + (high - low) * torch.rand(count, generator=generator))
    azimuth = torch.arange(count) * (360.0 / count)
    if config.pivot == "world_origin":
        azimuth = 90.0 - azimuth
    else:
        azimuth = inputs.cameras.azimuth_deg(_ORIGIN).cpu()[:, None] + azimuth
    return orbit(
        azimuth, torch.stack(elevations), config.radius,
        pivot=_ORIGIN, focal_px=config.focal * size, width=size, height=size,
    )  # fmt: skip


def place(
    inputs: InputImages, decoder: Decoder, config: BootstrapConfig
) -> tuple[Gaussians, Cameras]:
    """Decode the inputs into the configuration's world.

    Returns:
        Gaussians (M, N), and the input cameras (M,) of that world: what the Gaussians must look
        like from there is the input image.
    """
    cameras = decoder.input_cameras(inputs)
    if config.pivot == "object":
        return decoder.world(inputs), cameras
    viewmat = original_input_viewmat().to(cameras.viewmats)
    cameras = replace(cameras, viewmats=viewmat.expand_as(cameras.viewmats))
    return decoder(inputs).transform(torch.linalg.inv(viewmat)), cameras


def bootstrap(
    inputs: InputImages,
    decoder: Decoder,
    config: BootstrapConfig,
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    reuse: bool = False,
    batch_size: int = 8,
    source: dict[str, Any] | None = None,
    gpus: int = 1,
) -> MultiViewDataset:
    """Make a multi-view dataset out of single images.

    Rendering one batch overlaps with encoding, hashing and writing those before; memory is bounded
    by the batch.

    Args:
        inputs: M images, the object's pivot at the world origin of their cameras.
        overwrite: replace a dataset that is there already.
        reuse: return it instead; the caller's path names what is in it.
        source: JSON-able facts about where the inputs come from; kept in the dataset's meta.
        gpus: processes that share the batches, each on a GPU of its own, or all on the CPU; what
            is written is the same.

    Raises:
        ValueError: if the decoder is of another kind, or there are no inputs.
    """
    if len(inputs) == 0:
        raise ValueError("inputs: got no images, want at least one")
    if decoder.config.kind != config.decoder_kind:
        raise ValueError(
            f"decoder: got kind {decoder.config.kind!r}, configuration {config.name!r} wants "
            f"{config.decoder_kind!r}; use dataclasses.replace(config, decoder_kind=...) to mix"
        )
    gpus = min(gpus, -(-len(inputs) // batch_size))
    dataset.expect(len(inputs) * config.views_per_image * config.image_size**2)
    decoder = decoder.to(device).eval()
    made_by = {"config": asdict(decoder.config), "provenance": decoder.provenance}
    meta = {
        "generator": "bootstrap",
        "config": asdict(config),
        "decoder": {"checksum": decoder.checksum(), **made_by},
        "elevation_is_assumed": inputs.elevation_is_assumed,
        "source": source or {},
        **({"gate_overridden": True} if decoder.gate_overridden else {}),
    }
    asked = inputs, decoder, config, device, batch_size
    return dataset.write(
        path,
        records(*asked) if gpus < 2 else partial(_shared, *asked, gpus),
        background=config.background,
        meta=meta,
        overwrite=overwrite,
        reuse=reuse,
        total=len(inputs),
    )


def records(
    inputs: InputImages,
    decoder: Decoder,
    config: BootstrapConfig,
    device: torch.device | str,
    batch_size: int,
) -> Iterator[ObjectViews]:
    """Records in order; while one batch is decoded and rendered, those before are put together."""
    pending = deque[Future[list[ObjectViews]]]()
    with ThreadPoolExecutor(2, "records") as pool:
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            pending.append(pool.submit(_drawn(batch, decoder, config, device)))
            if len(pending) > 2:  # bounds memory
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _shared(
    inputs: InputImages,
    decoder: Decoder,
    config: BootstrapConfig,
    device: torch.device | str,
    batch_size: int,
    gpus: int,
    folder: Path,
) -> Encoded:
    """Write the records into `folder` by a process for each GPU, which takes every so-manieth
    batch: whole ones, as a batch of another size may round differently."""
    batches = torch.arange(len(inputs)).split(batch_size)
    threads, state = torch.get_num_threads(), {k: v.cpu() for k, v in decoder.state_dict().items()}
    with processes(gpus) as pool, tqdm(total=len(inputs), desc="writing", delay=2) as bar:
        jobs = []
        for number in range(gpus):
            mine = torch.cat(batches[number::gpus])
            card = f"cuda:{number}" if torch.device(device).type == "cuda" else str(device)
            share = inputs[mine].to("cpu"), decoder.config, state, decoder.render_size, config, card
            jobs.append(pool.submit(_share, *share, batch_size, folder, mine, gpus, threads))
        while wait(jobs, 0.5, FIRST_EXCEPTION).not_done:
            if any(job.done() and job.exception() for job in jobs):
                break
            if new := len(os.listdir(folder)) - bar.n:
                bar.update(new)
        shares = [job.result() for job in jobs]
    written = [record for records, _ in shares for record in records]
    return sorted(written, key=lambda record: (len(record.folder), record.folder)), shares[0][1]


def _rebuilt(config: DecoderConfig, state: dict[str, Tensor], render_size: int) -> Decoder:
    """A decoder whose weights lie in memory as a decoder's do, which chooses the kernels, and with
    them the last bits: a message between processes keeps the numbers alone."""
    decoder = Decoder(config).eval()
    decoder.load_state_dict(state)
    decoder.render_size = render_size
    return decoder


def _share(
    inputs: InputImages,
    decoder_config: DecoderConfig,
    state: dict[str, Tensor],
    render_size: int,
    config: BootstrapConfig,
    device: str,
    batch_size: int,
    folder: Path,
    numbers: Tensor,
    among: int,
    threads: int,
) -> Encoded:
    """One process's records, of these numbers."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # and one thread: the cores are for what encodes
    else:
        torch.set_num_threads(threads)  # a decoder's last bits follow from it
    decoder = _rebuilt(decoder_config, state, render_size).to(device)
    views = records(inputs, decoder, config, device, batch_size)
    return encode(folder, zip(numbers.tolist(), views, strict=True), len(inputs), among)


@torch.no_grad()
def _drawn(
    inputs: InputImages, decoder: Decoder, config: BootstrapConfig, device: torch.device | str
) -> Callable[[], list[ObjectViews]]:
    """Draw a batch. What is returned waits for the pictures and puts the records together."""
    gaussians, here = place(inputs.to(device), decoder, config)
    here, there = here.resized(config.image_size, config.image_size), novel_cameras(inputs, config)
    seen = replace(
        here,
        viewmats=torch.cat([here.viewmats[:, None], there.viewmats.to(device)], dim=1),
        Ks=torch.cat([here.Ks[:, None], there.Ks.to(device)], dim=1),
    )
    views = render_small(prune(gaussians), seen, render_size=decoder.render_size, near=NEAR)
    background = torch.tensor(config.background).repeat(len(seen[0]), 1, 1, 1)
    background[0] = 0.0  # what the input camera sees, the first view, stays over black
    opaque = views.rgb + (1 - views.alpha) * background.to(views.rgb)
    rgb, alpha = (
        (values.clamp(0, 1) * 255).round().to(torch.uint8) for values in (opaque, views.alpha)
    )
    # Depth is meaningless where 8 bits say that nothing is there.
    drawn = (rgb, alpha[..., 0], (views.depth * (alpha > 0))[..., 0])
    rgb, alpha, depth = (image.to("cpu", non_blocking=True) for image in drawn)
    arrived = torch.cuda.Event() if views.rgb.is_cuda else None
    if arrived:
        arrived.record()
    cameras = seen.to("cpu")

    def put_together() -> list[ObjectViews]:
        if arrived:
            arrived.synchronize()
        stored = inputs.to("cpu").resized(config.image_size)
        return [
            ObjectViews(
                name=name,
                input_rgb=stored.rgb[i],
                input_alpha=stored.alpha[i],
                input_camera=cameras[i, 0],
                input_depth=None if stored.depth is None else stored.depth[i],
                identity_rgb=rgb[i, 0],
                identity_alpha=alpha[i, 0],
                rgb=rgb[i, 1:],
                alpha=alpha[i, 1:],
                depth=depth[i, 1:],
                cameras=cameras[i, 1:],
                pivot=torch.zeros(3),
            )
            for i, name in enumerate(inputs.names)
        ]

    return put_together
