"""Weights in one safetensors file, with what they belong to as JSON in its header.

The header names the network's kind and configuration, a checksum of the tensors as stored, where
they come from (`provenance`), and what else the kind needs, such as the size that a decoder's
Gaussians were trained to be drawn at.  Files of before the checksum are read without it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from fresnel.host.files import from_json, write_atomic

_LARGEST, _MOST_BLOCKS = 2048, 16
"""Of any size, and of blocks a level: what a file says is not to take all memory and time."""
_GONE = {"gaussian_grid": "full", "encoder": "conv", "dropout": 0.0, "render_base": True}
"""Options of older files, and the one value of each that is left."""
_OWN = ("kind", "config", "checksum", "format", "parameters", "facts", "gate_overridden")


class Stored(nn.Module):
    """A network of a `config` that can be saved and loaded, with its JSON-able `provenance`.

    A subclass names its kind, what makes its configuration, and its facts: attributes that travel
    with the weights, and their values where a file has none.  `gate_overridden` travels too: they
    learned from data that the gate refused, or started from weights that did.
    """

    kind: ClassVar[str]
    make_config: ClassVar[Any]
    facts: ClassVar[dict[str, Any]]
    gate_overridden: bool = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.provenance: dict[str, Any] = {}
        for name, value in self.facts.items():
            setattr(self, name, value)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def checksum(self) -> str:
        """SHA-256 of the weights, "sha256:..."; what is made by this network records it."""
        return checksum(self.state_dict())

    def save(self, path: str | Path, *, half: bool = False) -> Path:
        """Write weights, config, provenance and facts to one file, whole or not at all; `half`: as
        float16, which halves it."""
        tensors = {
            name: (t.half() if half and t.is_floating_point() else t).detach().cpu().contiguous()
            for name, t in self.state_dict().items()
        }
        facts = {name: getattr(self, name) for name in self.facts}
        header = {**self.provenance, "kind": self.kind, "config": asdict(self.config)}
        header |= {"facts": facts, "gate_overridden": self.gate_overridden}
        header["checksum"] = checksum(tensors)
        write_atomic(path, serialise(tensors, metadata={"fresnel": json.dumps(header)}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote, or a file of before it: in float32 and evaluation mode.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not of this kind, damaged, or its configuration is out of bounds.
        """
        header = read_header(path, cls.kind)
        if header.get("kind") != cls.kind:
            raise ValueError(f"{path}: not a {cls.kind} checkpoint (kind {header.get('kind')!r})")
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("checksum", found := checksum(tensors)) != found:
            raise ValueError(f"{path}: its weights are not those that were saved; copy it again")
        config = _bounded(path, header.get("config"), cls.make_config)
        try:
            with torch.device("meta"):  # without memory, until it is known to fit the file
                want = cls(cls.make_config(**config)).state_dict()
        except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
            raise ValueError(f"{path}: not the configuration of a {cls.kind} ({error})") from error
        built, stored = ({n: t.shape for n, t in each.items()} for each in (want, tensors))
        if odd := sorted({name for name, _ in built.items() ^ stored.items()}):
            raise ValueError(f"{path}: weights don't fit the configuration in the file: {odd[:3]}")
        network = cls(cls.make_config(**config))
        network.load_state_dict(tensors)
        network.provenance = {key: value for key, value in header.items() if key not in _OWN}
        params = header.get("params")  # of older files all that is known is what was asked for
        asked = isinstance(params, dict) and params.get("allow_failed_gate")
        network.gate_overridden = bool(header.get("gate_overridden", asked))
        given = header.get("facts")
        for name, usual in cls.facts.items():
            value = given.get(name, usual) if isinstance(given, dict) else usual
            if not _is_like(value, usual) or value == 0:
                raise ValueError(f"{path}: {name} {value!r} is out of bounds; copy the file again")
            setattr(network, name, value)
        return network.eval().to(device)


def read_header(path: str | Path, kind: str = "weights") -> dict[str, Any]:
    """What a file says of itself: "kind", "config", "facts", and its provenance beside them."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such {kind} checkpoint")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
        if "fresnel_decoder" in metadata:  # the decoders that ship
            old = from_json(metadata["fresnel_decoder"].encode())
            return {**(old.pop("provenance", None) or {}), **old, "kind": "decoder"}
        header = from_json(metadata.get("fresnel", "{}").encode())
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a readable {kind} checkpoint ({error})") from error
    return header if isinstance(header, dict) else {}


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, "sha256:..."."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def shipped(name: str, model: str = "") -> Path:
    """The file of that name in fresnel/assets, which 03 makes of that model; FileNotFoundError if
    this installation carries none."""
    path = Path(str(resources.files("fresnel"))) / "assets" / name
    if not path.is_file():
        how = f"train one with notebooks/03_full_train.ipynb (model={model}, export_to=FILE)"
        said = f"fresnel/assets/{name} is missing from this installation"
        raise FileNotFoundError(f"{said}; {how}" if model else said)
    return path


def held_out(network: Stored) -> dict[str, float]:
    """The mean perceptual distances to true views of held-out objects, of the network ("cvs") and
    of the decoder that it is compared with, from its file."""
    found = network.provenance.get("held_out")
    pairs = found.items() if isinstance(found, dict) else ()
    return {n: float(x) for n, x in pairs if isinstance(x, int | float) and math.isfinite(x)}


def _is_like(value: Any, usual: Any, largest: int = _LARGEST) -> bool:
    """Whether a value is of the usual one's type, and no size beyond bounds."""
    if isinstance(usual, tuple):
        return isinstance(value, list) and len(value) <= 16 and all(_is_like(n, 0) for n in value)
    if isinstance(usual, float):
        return type(value) in (int, float) and abs(value) <= 1e6
    return type(value) is type(usual) and (type(value) is not int or 0 <= value <= largest)


def _bounded(path: str | Path, config: Any, known: Any) -> dict[str, Any]:
    """The configuration in a header, without what is gone and with no number out of bounds."""
    if not isinstance(config, dict):
        raise ValueError(f"{path}: its header holds no configuration")
    kept = {}
    for name, value in config.items():
        if value != _GONE.get(name, value):
            raise ValueError(f"{path}: {name} {value!r} is not supported any more")
        largest = _MOST_BLOCKS if name == "blocks_per_level" else _LARGEST
        if hasattr(known, name) and not _is_like(value, getattr(known, name), largest):
            raise ValueError(f"{path}: {name} {value!r} is out of bounds, want at most {largest}")
        if name not in (*_GONE, "encoder_weights"):  # the latter of an encoder that is gone
            kept[name] = tuple(value) if isinstance(value, list) else value
    return kept
