"""Files: written whole or not at all, locked against others, kept inside their folder, hashed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write so that `path` holds its old content or all of the new one, whatever stops the work.

    Text becomes UTF-8.  The temporary name beside `path` can't be guessed, and a link at `path` is
    replaced rather than followed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def inside(folder: Path, name: str) -> Path:
    """``folder / name``; ValueError if the name or a link on the way leads out of the folder."""
    path = folder / name
    step, suspect = str(folder), os.path.isabs(name)
    for part in name.split("/"):  # a set has millions of steps: resolve only what needs it
        step = f"{step}/{part}"
        suspect = suspect or part == ".." or os.path.islink(step)
    if suspect and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path}: leads out of its folder; copy the file into it")
    return path


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes, which are not held in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, waiting: str = "", *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file at `path`: True.  While another process or thread has it, either waits,
    after saying `waiting` on stderr, or (`wait` False) gives False at once.  The lock goes with its
    process, however that ends.  OSError where files can't be locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        if wait:
            print(waiting, end="\n" if waiting else "", file=sys.stderr, flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise OSError(
            f"{path}: can't be locked ({error}). Put this folder on a file system with locks "
            "(flock); without them two processes would overwrite each other's work"
        ) from error
    try:
        yield lock.is_locked
    finally:
        lock.release()


def fingerprint(config: Any) -> str:
    """Eight hex digits that name a configuration (a dataclass or a JSON-able mapping)."""
    data = config if isinstance(config, Mapping) else asdict(config)
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
