"""Checkpoints that survive a kill at any moment: one safetensors file each, JSON in its header.

A file is written under a temporary name, flushed to disk and renamed; the `latest` before it is
kept as `previous`, so that one whole checkpoint is there at every instant.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

SUFFIX = ".safetensors"


class DiskFull(OSError):
    """No room for a checkpoint; those written before are whole."""


def save(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write `folder`/latest.safetensors, moving the one before it to previous.safetensors.

    Raises:
        DiskFull: if there is no room; what was there before is untouched.
    """
    from safetensors.torch import save as serialise

    folder.mkdir(parents=True, exist_ok=True)
    data = serialise(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        {"fresnel": json.dumps(metadata)},
    )
    latest, temporary = folder / f"latest{SUFFIX}", folder / "latest.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                error.errno,
                f"no room for a checkpoint of {len(data) / 1e6:.0f} MB in {folder}; the one "
                "before it is whole: free some space and run again to resume",
            ) from error
        raise
    if latest.exists():
        os.replace(latest, folder / f"previous{SUFFIX}")
    os.replace(temporary, latest)
    _sync(folder)
    return latest


def keep(latest: Path, name: str) -> Path:
    """Keep the latest checkpoint under another name too: a hard link, or a copy where none can be.

    Checkpoints are never changed in place, so a link stays what it was.
    """
    kept, temporary = latest.with_name(name + SUFFIX), latest.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(latest, temporary)
    except OSError:
        shutil.copyfile(latest, temporary)
    os.replace(temporary, kept)
    return kept


class Writer:
    """Writes checkpoints, beside the training where `background`: a gigabyte takes seconds.

    The tensors are copied to the host first, so training may go on changing them. One checkpoint
    is written at a time: the next `save`, and `wait`, wait for it and raise what it raised.
    """

    def __init__(self, *, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # a write that has begun is finished

    def save(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        *,
        keep_as: Sequence[str] = (),
    ) -> None:
        """`save`, and `keep` under each of the names."""

        def write(copies: Mapping[str, Tensor]) -> None:
            latest = save(folder, copies, metadata)
            for name in keep_as:
                keep(latest, name)

        if self._pool is None:
            write(tensors)
            return
        self.wait()
        copies = _to_host(tensors)
        self._pending = self._pool.submit(write, copies)

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
            DiskFull: and whatever else the writing raised.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, by way of pinned memory where they come from a GPU."""
    copies = {
        name: t.detach().to("cpu", non_blocking=True) if t.is_cuda else t.detach().clone()
        for name, t in tensors.items()
    }
    for device in {t.device for t in tensors.values() if t.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a checkpoint.

    Raises:
        ValueError: if the file is damaged or is not a checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = json.loads((file.metadata() or {})["fresnel"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged, or not a checkpoint ({error})") from error
    return tensors, metadata


def read_latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that can be read; a damaged one is passed over with a warning."""
    damaged = []
    for name in ("latest", "previous"):
        path = folder / (name + SUFFIX)
        if not path.exists():
            continue
        try:
            return read(path)
        except ValueError as error:
            damaged.append(path)
            warnings.warn(f"{error}; falling back to the checkpoint before it", stacklevel=2)
    if damaged:
        raise ValueError(
            f"{folder}: no readable checkpoint ({', '.join(p.name for p in damaged)} damaged); "
            "start again with resume=False"
        )
    return None


def load_weights(path: str | Path, model: nn.Module, which: str = "ema") -> dict[str, Any]:
    """Load the "ema" or "model" weights of a checkpoint into `model`; returns its metadata."""
    tensors, metadata = read(Path(path))
    prefix = which + "."
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not weights:
        raise ValueError(f"which: got {which!r}, {path} holds no such weights; want ema or model")
    model.load_state_dict(weights)
    return metadata


def pack(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a run needs to go on, as one flat dict of tensors."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"ema.{name}": t for name, t in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put back what `pack` took out, bit for bit."""
    for prefix, module in (("model.", model), ("ema.", ema)):
        module.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if not name.startswith("optimizer."):
            continue
        _, key, parameter_name = name.split(".", 2)
        parameter = parameters[parameter_name]
        if value.shape == parameter.shape:  # in the parameter's memory format, as AdamW made it
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value.to(parameter.device)


def _sync(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
