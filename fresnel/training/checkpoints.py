"""Checkpoints that survive a kill at any moment: one safetensors file each, JSON in its header.

A file is written under a temporary name, flushed to disk and renamed; the `latest` before it is
kept as `previous`, so that one whole checkpoint is there at every instant.
"""

import errno
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor, nn

from fresnel.host.files import from_json, scratch, write

SUFFIX = ".safetensors"


class DiskFull(OSError):
    """No room for a checkpoint; those written before are whole."""


def save(
    folder: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    also: Sequence[str] = (),
) -> None:
    """Write `folder`/latest.safetensors, moving the one before it to previous.safetensors.

    Under the names in `also` it is there first (a hard link, or a copy where none can be): a kill
    in between makes the next run write `latest` and these again, and none of them can be stale.

    Raises:
        DiskFull: if there is no room; what was there before is untouched.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = serialised(whole, {"fresnel": json.dumps(metadata)})
    latest = folder / f"latest{SUFFIX}"
    try:
        with scratch(latest) as fresh:
            write(fresh, data)
            for name in also:
                with scratch(path := folder / f"{name}{SUFFIX}") as linked:
                    linked.unlink()
                    try:
                        os.link(fresh, linked)
                    except OSError:
                        write(linked, data)
                    os.replace(linked, path)
            if latest.exists():
                os.replace(latest, folder / f"previous{SUFFIX}")
            os.replace(fresh, latest)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFull(
            error.errno,
            f"no room for a checkpoint of {len(data) / 1e6:.0f} MB in {folder}; the one "
            "before it is whole: free some space and run again to resume",
        ) from error


class Writer(ThreadPoolExecutor):
    """Writes one checkpoint at a time; beside the training, where `background`. On leaving its
    context a write that has begun is finished."""

    def __init__(self, *, background: bool) -> None:
        super().__init__(1, "checkpoint")
        self.background, self.pending = background, list[Future[None]]()

    def save(self, folder: Path, tensors: Mapping[str, Tensor], *rest: Any) -> None:
        """`save` copies of the tensors, which training may go on changing."""
        self.wait()
        copies = {n: t.detach().to("cpu", non_blocking=True, copy=True) for n, t in tensors.items()}
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()
        self.pending.append(self.submit(save, folder, copies, *rest))
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on disk; raises what the writing raised."""
        while self.pending:
            self.pending.pop().result()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a checkpoint; ValueError if the file is damaged, or is none."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = from_json((file.metadata() or {})["fresnel"].encode())
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or not a checkpoint ({error})") from error


def read_latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that can be read, None if there is none; a damaged one is passed over
    with a warning. ValueError if all of them are damaged."""
    found = [path for n in ("latest", "previous") if (path := folder / (n + SUFFIX)).exists()]
    for path in found:
        try:
            return read(path)
        except ValueError as error:
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
    if found:
        raise ValueError(f"{folder}: every checkpoint is damaged; start again with resume=False")
    return None


def pack(
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    critic: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Everything a run needs to go on, as one flat dict of tensors."""
    nets = {"model": model, "ema": ema} | ({"critic": critic} if critic else {})
    tensors = {f"{w}.{name}": t for w, net in nets.items() for name, t in net.state_dict().items()}
    for name, parameter in _trained(model, critic).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def _trained(model: nn.Module, critic: nn.Module | None) -> dict[str, nn.Parameter]:
    others = critic.named_parameters("critic") if critic else ()
    return {**dict(model.named_parameters()), **dict(others)}


def unpack(
    found: Mapping[str, Tensor],
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    critic: nn.Module | None = None,
) -> None:
    """Put back what `pack` took out, bit for bit."""
    if critic is not None:
        critic.load_state_dict(_part(found, "critic"))
    model.load_state_dict(_part(found, "model"))
    ema.load_state_dict(_part(found, "ema"))
    parameters = _trained(model, critic)
    for name, value in _part(found, "optimizer").items():
        key, parameter_name = name.split(".", 1)
        parameter = parameters[parameter_name]
        if value.shape == parameter.shape:  # in the parameter's memory format, as AdamW made it
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value.to(parameter.device)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
