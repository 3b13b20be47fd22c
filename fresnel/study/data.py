"""What a run trains on, is validated on, and whether the gate lets it: found, or made."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from fresnel import gate
from fresnel.bootstrap import CORRECTED, ORIGINAL, BootstrapConfig, bootstrap
from fresnel.data import dataset, faces
from fresnel.data.dataset import MultiViewDataset, ViewTensors
from fresnel.host.files import fingerprint
from fresnel.host.machine import runs_dir
from fresnel.objects import sources
from fresnel.report.provenance import NOT_TRAINING, code_hash
from fresnel.report.record import Recorder
from fresnel.study.arms import load_decoder

VALIDATION_OBJECTS = 4
"""Embedded training objects whose true views a training is validated on."""
_APART = {
    *("output_dir", "export_to", "price_per_hour_usd", "resume", "compare_steps"),
    *("keep_every", "previews", "gpus"),
}
"""Parameters of 03 that have no part in the training."""


class Refused(RuntimeError):
    """A run that stopped because its protocol said so; the report says why, without a trace."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of the trace
        return [f"Refused: {self}"]


def refuse(run: Recorder, why: str) -> NoReturn:
    """End the run as REFUSED."""
    run.finish("REFUSED", why, [why])
    raise Refused(why)


def require(
    run: Recorder, data: MultiViewDataset, kinds: Sequence[str], *, allow_failed: bool
) -> gate.Receipt:
    """The gate's receipt, if every kind of receipt allows training; else ends the run as REFUSED.

    Raises:
        Refused: says which check is missing or failed and what to run.
    """
    try:
        for kind in kinds:
            run.input(gate.receipt_path(data, kind))
        return receipts(data, kinds, allow_failed)[0]
    except (gate.GateRefusal, ValueError) as refusal:
        refuse(run, str(refusal))


def receipts(data: Any, kinds: Sequence[str], allow_failed: bool) -> list[gate.Receipt]:
    """Receipts of several kinds, each as `gate.require_receipt` has it; files are hashed once."""
    found = []
    for kind in kinds:
        found.append(gate.require_receipt(data, kind, allow_failed))
        same = ("path", "content_hash", "layout")
        data = types.SimpleNamespace(**{name: getattr(data, name) for name in same})
    return found


def bootstrap_config(
    preset: str, views_per_image: int, image_size: int, seed: int
) -> BootstrapConfig | None:
    """The named geometry at this size; None for "truth" and "none", which need no decoder."""
    presets = {"original": ORIGINAL, "corrected": CORRECTED, "truth": None, "none": None}
    if preset not in presets:
        raise ValueError(f"preset: got {preset!r}, want one of {', '.join(map(repr, presets))}")
    known = presets[preset]
    return known and replace(
        known, views_per_image=views_per_image, image_size=image_size, seed=seed
    )


def origin(domain: str) -> dict[str, str]:
    """What a bootstrap of that domain keeps of where its inputs come from, for `domain_of`."""
    return {} if domain == "objects" else {"domain": domain}


def domain_of(data: MultiViewDataset, asked: str = "") -> str:
    """Whose decoders, CVS and held-out set a training on these data is compared with.

    Args:
        asked: "objects" or "faces"; "": as the data say.
    """
    if asked not in ("", *sources.EMBEDDED):
        raise ValueError(f"domain: got {asked!r}, want 'objects', 'faces' or '' (as the data say)")
    kept = data.meta.get("source")
    said = kept.get("domain") if isinstance(kept, dict) else None
    return asked or ("faces" if said == "faces" or faces.expected(data.meta) else "objects")


def dataset_folder(config: BootstrapConfig, source: str, images: int, **more: Any) -> Path:
    """Default folder of a bootstrap: named by what it is, so that a second run finds it.

    `more`: what else makes it what it is (its objects, the decoder's weights).
    """
    more = {name: value for name, value in more.items() if value not in ("", "all")}
    key = fingerprint({**asdict(config), "source": source, "images": images, **more})
    name = f"{config.name}-{Path(source).stem}-{images}x{config.image_size}px-{key}"
    return sources.data_dir() / name


def train_dir(name: str, data: MultiViewDataset, config: Mapping[str, Any]) -> Path:
    """Where the checkpoints of one model on one dataset with one configuration go.

    What has no part in the training does not count: a run that was stopped has a report of its own,
    and the next one must find its checkpoints.  Those of other code it must not find.
    """
    config = {key: value for key, value in config.items() if key not in _APART}
    key = fingerprint({**config, "code": code_hash(NOT_TRAINING)})
    stem = f"{name}-{data.content_hash.removeprefix('sha256:')[:8]}-{key}"
    return runs_dir() / "train" / stem


def demo_dataset(model: str = "cvs", domain: str = "objects") -> MultiViewDataset:
    """The smallest corrected bootstrap (for "decoder": ground truth), made and gated if need be.

    What notebooks 02 and 03 train on when they are opened and run with their defaults.
    """
    domain, image_size = domain or "objects", 32
    source = sources.of_domain("embedded", domain)
    if model.startswith("decoder"):
        data = sources.ground_truth(source, "train", image_size=image_size)
    else:
        config = replace(CORRECTED, image_size=image_size)
        inputs, _ = sources.input_images(source, images=16, image_size=image_size)
        path, decoder = dataset_folder(config, source, 16), load_decoder("pixel", "cpu", "", domain)
        data = bootstrap(inputs, decoder, config, path, reuse=True, source=origin(domain))
    try:
        gate.require_receipt(data)
    except gate.GateRefusal:  # none, or one of an older gate
        gate.issue_receipt(data, gate.validate(data))
    return data


def with_truth(made: MultiViewDataset, source: str, objects: str) -> MultiViewDataset:
    """A bootstrap with true views of some of its source's training objects (`sources.part`) beside
    it, written in its place.

    Raises DatasetError where an object is in both, or sizes or numbers of views differ."""
    true = sources.part(sources.ground_truth(source, "train", image_size=made.image_size), objects)
    return dataset.write(
        made.path,
        (data[k] for data in (made, true) for k in range(len(data))),
        meta={**made.meta, "true_objects": list(true.names)},
        overwrite=True,
        total=len(made) + len(true),
    )


def held_out(source: str, data: MultiViewDataset, objects: int) -> MultiViewDataset:
    """True views, as large as those of `data`, of the objects that judge what was trained on it;
    the first so many of them (0: all)."""
    return sources.ground_truth(
        source, "held_out", image_size=data.image_size, objects=objects, seed=1000
    )


def validation_objects(source: str, held_out: MultiViewDataset) -> ViewTensors | None:
    """What a training's own figures and its `best` checkpoint come from: never the held-out
    objects, which judge it once, in the end.

    The source's "val" objects; of what is embedded true views of a few that may be trained on;
    None of a source that states no such split: the training then looks at its own data.
    """
    size = held_out.image_size
    ships = source in sources.EMBEDDED.values()
    split, count = ("train", VALIDATION_OBJECTS) if ships else ("val", 0)
    try:
        found = sources.ground_truth(source, split, image_size=size, objects=count, seed=2000)
    except dataset.DatasetError:  # no such split
        return None
    if {*found.names} & {*held_out.names}:  # it states no splits at all
        return None
    sources.require_apart(found.names, held_out.names)
    return found.tensors(size=size)
