"""Weights in one safetensors file, with what they belong to as JSON in its header.

The header names the network's kind and configuration, a checksum of the tensors as stored, where
they come from (`provenance`), and what else the kind needs, such as the size that a decoder's
Gaussians were trained to be drawn at.  Files of before the checksum are read without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from fresnel.host.files import write_atomic

_LARGEST, _MOST_BLOCKS = 2048, 16
"""Of any size, and of blocks a level: what a file says is not to take all memory and time."""
_GONE = {"gaussian_grid": "full", "encoder": "conv", "dropout": 0.0, "render_base": True}
"""Options of older files, and the one value of each that is left."""
_IGNORED = ("encoder_weights",)  # of an encoder that is gone
_OWN = ("kind", "config", "checksum", "format", "parameters", "facts")


def save(
    path: str | Path, kind: str, network: Any, *, half: bool, facts: Mapping[str, Any]
) -> Path:
    """Write a network's weights, its `config` and its `provenance`, whole or not at all.

    Args:
        kind: "decoder" or "cvs"; `load` asks for it.
        half: store float16, which halves the file.
        facts: what the kind needs beside its configuration.
    """
    tensors = {
        name: (t.half() if half and t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in network.state_dict().items()
    }
    own = {"kind": kind, "config": asdict(network.config), "facts": dict(facts)}
    header = {**network.provenance, **own, "checksum": checksum(tensors)}
    write_atomic(path, serialise(tensors, metadata={"fresnel": json.dumps(header)}))
    return Path(path)


def load(
    path: str | Path, kind: str, build: Callable[[dict[str, Any]], Any]
) -> tuple[Any, dict[str, Any]]:
    """Read what `save` wrote, or a file of before it.

    Args:
        build: makes the network of a configuration.

    Returns:
        The network, in float32 and evaluation mode, with its `provenance`; and its facts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not of this kind, damaged, or its configuration is out of bounds.
    """
    header = read_header(path, kind)
    if header.get("kind") != kind:
        raise ValueError(f"{path}: not a {kind} checkpoint (kind {header.get('kind')!r})")
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header.get("checksum", found := checksum(tensors)) != found:
        raise ValueError(f"{path}: its weights are not those that were saved; copy the file again")
    config = _bounded(path, header.get("config"))
    try:
        with torch.device("meta"):  # without memory, until it is known to fit the file
            want = build(config).state_dict()
    except TypeError as error:
        raise ValueError(f"{path}: not the configuration of a {kind} ({error})") from error
    shapes = [{n: tuple(t.shape) for n, t in each.items()} for each in (want, tensors)]
    if odd := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise ValueError(f"{path}: weights don't fit the configuration in the file: {odd[:3]}")
    network = build(config)
    network.load_state_dict(tensors)
    network.provenance = {key: value for key, value in header.items() if key not in _OWN}
    return network.eval(), dict(header.get("facts") or {})


def read_header(path: str | Path, kind: str = "weights") -> dict[str, Any]:
    """What a file says of itself: "kind", "config", "facts", and its provenance beside them."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such {kind} checkpoint")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        if "fresnel_decoder" in metadata:  # the decoders that ship
            old = json.loads(metadata["fresnel_decoder"])
            return {**(old.pop("provenance", None) or {}), **old, "kind": "decoder"}
        header = json.loads(metadata.get("fresnel", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable {kind} checkpoint ({error})") from error
    return header if isinstance(header, dict) else {}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, "sha256:..."."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def shipped(name: str, model: str) -> Path:
    """The file of that name in fresnel/assets, which 03 makes of that model.

    Raises:
        FileNotFoundError: if this installation carries none; the message says how to make one.
    """
    path = Path(str(resources.files("fresnel"))) / "assets" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"fresnel/assets/{name} is missing from this installation; train one with "
            f"notebooks/03_full_train.ipynb (model={model}, export_to=FILE)"
        )
    return path


def _bounded(path: str | Path, config: Any) -> dict[str, Any]:
    """The configuration in a header, without what is gone and with no number out of bounds."""
    if not isinstance(config, dict):
        raise ValueError(f"{path}: its header holds no configuration")
    for name, value in config.items():
        if value != _GONE.get(name, value):
            raise ValueError(f"{path}: {name} {value!r} is not supported any more")
        numbers = value if isinstance(value, list) else [value]
        counts = [n for n in numbers if isinstance(n, int)]
        largest = _MOST_BLOCKS if name == "blocks_per_level" else _LARGEST
        if len(numbers) > 16 or any(abs(n) > largest for n in counts):
            raise ValueError(f"{path}: {name} {value!r} is out of bounds, want at most {largest}")
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name not in (*_GONE, *_IGNORED)
    }
