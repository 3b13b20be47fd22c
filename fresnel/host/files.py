"""Files: written whole or not at all, locked against others, kept inside their folder, hashed."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock

_DEEPEST = 100
_MOST = 1 << 30
"""Bytes that what JSON says may take."""


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Write so that `path` holds its old content or all of the new one, whatever stops the work.

    Text becomes UTF-8.  A link at `path` is replaced rather than followed.
    """
    target = Path(path)
    with scratch(target) as temporary:
        write(temporary, data.encode() if isinstance(data, str) else data)
        os.replace(temporary, target)


def write(path: Path, data: bytes) -> None:
    """Write a file, and have it on the disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def scratch(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new hidden file or folder beside `target`, to be renamed to it, whose name can't be
    guessed; gone at the end.  It is locked meanwhile: an unlocked one was left by a process that
    was killed, and is removed by the next that writes the same target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in abandoned(target.parent, target.name):
        remove(left)
    with contextlib.ExitStack() as stack:
        mine: bool | None = False
        while mine is False:  # another's cleaning may take it before it is locked
            path = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:12]}")
            if folder:
                path.mkdir()
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            stack.callback(remove, path)
            mine = stack.enter_context(own(path))
        yield path


def abandoned(folder: Path, name: str = "", kinds: str = "tmp|partial|replaced") -> Iterator[Path]:
    """What killed processes left in `folder`: of `name`, or of everything there.  Each is locked
    until the next one is asked for."""
    pattern = re.compile(rf"\.({re.escape(name) or '.+'})\.({kinds})-[\w-]+")
    for path in sorted(p for p in folder.glob(".*") if pattern.fullmatch(p.name)):
        with own(path) as mine:
            if mine:
                yield path


@contextlib.contextmanager
def own(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder itself: True; False while another has it or if it is gone, None where
    locks don't work.  The lock goes with its process, however that ends."""
    handle: int | None = None
    mine: bool | None = False
    try:
        # neither through a link nor waiting at a FIFO
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        mine = filelock.lock_descriptor(handle, blocking=False) and path.exists()
    except FileNotFoundError:
        pass
    except OSError:
        mine = None
    try:
        yield mine
    finally:
        if handle is not None:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def exchange(one: Path, other: Path) -> bool:
    """Swap two files or folders in a single step; False where the system can't (Linux can)."""
    at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    with contextlib.suppress(OSError, AttributeError, TypeError):
        names = os.fsencode(one), os.fsencode(other)
        return ctypes.CDLL(None).renameat2(at_cwd, names[0], at_cwd, names[1], swap) == 0
    return False


def flush(folder: Path) -> None:
    """Have what was written to the file system of `folder` on its disk: one call, where thousands
    of small files would each take one."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        ctypes.CDLL(None).syncfs(handle)
    except (OSError, AttributeError, TypeError):
        os.sync()
    finally:
        os.close(handle)


def inside(folder: Path, name: str) -> Path:
    """``folder / name``; ValueError if the name or a link on the way leads out of the folder."""
    path = folder / name
    step, suspect = str(folder), os.path.isabs(name)
    for part in name.split("/"):  # a set has millions of steps: resolve only what needs it
        step = f"{step}/{part}"
        suspect = suspect or part == ".." or os.path.islink(step)
    # not Path.resolve, to which links in a circle are no OSError
    if suspect and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path}: leads out of its folder; copy the file into it")
    return path


def below(folder: str | Path) -> Iterator[Path]:
    """All that is in a folder and in those in it, but for what links lead to; ValueError where they
    are nested without end."""
    waiting = [(Path(folder), 0)]
    for at, depth in waiting:
        if depth > _DEEPEST:
            raise ValueError(f"{folder}: folders in each other, over {_DEEPEST} deep. Flatten it")
        for each in at.iterdir():
            yield each
            if each.is_dir() and not each.is_symlink():
                waiting.append((each, depth + 1))


def read_bytes(path: str | Path, limit: int = 1 << 30) -> bytes:
    """A regular file's bytes; ValueError if it is none, or has more; OSError as of `open`."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would wait
        said = os.fstat(file.fileno())
        if not stat.S_ISREG(said.st_mode):
            raise ValueError(f"{path}: is no regular file")
        # Python makes room for all that it is asked for, before it reads
        data = file.read(min(limit, said.st_size) + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: more than {limit} bytes, which is the limit. Make it smaller")
    return data


def from_json(data: bytes) -> Any:
    """What JSON says; ValueError if it is damaged, nested deeply, or would fill the memory: a list
    takes 100 bytes of it and an object 200, where the text has two for each."""
    wide = 1 if data.isascii() and b"\\u" not in data else 4  # bytes of a character
    each = {b"[": 100, b"{": 200, b",": 40, b'"': 32}
    if (size := 2 * wide * len(data) + sum(data.count(c) * n for c, n in each.items())) > _MOST:
        raise ValueError(f"it would take about {size >> 20} MB, the limit is {_MOST >> 20}")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path, limit: int = 1 << 28) -> Any:
    """What a JSON file of at most so many bytes says; ValueError or OSError if it can't be read."""
    return from_json(read_bytes(path, limit))


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes, which are not held in memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, waiting: str = "", *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file at `path`: True.  While another process or thread has it, either waits,
    after saying `waiting` and for which process on stderr, or (`wait` False) gives False at once.
    The lock goes with its process, however that ends.  OSError where files can't be locked.
    """
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        if wait:
            for _ in range(20):  # who has just taken it may not have said so yet
                if whom := path.read_text() if path.exists() else "":
                    break
                time.sleep(0.01)
            said = f"{waiting} (process {whom})" if whom else waiting
            print(said if waiting else "", end="\n" if waiting else "", file=sys.stderr, flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", 0) in (errno.EROFS, errno.EACCES, errno.EPERM):
            said = f"{path.parent}: may not be written to ({error.strerror})"  # type: ignore[union-attr]
            raise OSError(f"{said}. Choose a folder that may, or mend its permissions") from error
        raise OSError(
            f"{path}: can't be locked ({error}). Put this folder on a file system with locks "
            "(flock); without them two processes would overwrite each other's work"
        ) from error
    try:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                path.write_text(str(os.getpid()))  # for those who wait
        yield lock.is_locked
    finally:
        lock.release()


def fingerprint(config: Any) -> str:
    """Eight hex digits that name a configuration (a dataclass or a JSON-able mapping)."""
    data = config if isinstance(config, Mapping) else asdict(config)
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
