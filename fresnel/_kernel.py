"""The process a notebook's cells run in: IPython's kernel, which notes the files that it touches.

    python -m fresnel._kernel -f CONNECTION_FILE

With FRESNEL_TRACE=FILE every file that Python code opens, renames or lists is noted there, one JSON
line [kind, path] each, kind being "read", "write" or "list". `fresnel.cache` makes of it what a run
depends on. Not seen: what compiled libraries open by themselves, and other programs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LISTING = ("os.scandir", "os.listdir")
_IMPORTS = "<frozen importlib._bootstrap_external>"


def trace_files(target: str) -> None:
    """Note, from here on and until this process ends, which files it touches.

    Processes forked from this one write to the same file; each line is one small append."""
    handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    seen: set[tuple[str, str]] = set()

    def note(kind: str, path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        try:
            entry = (kind, os.path.abspath(os.fsdecode(path)))
        except (TypeError, ValueError, OSError):  # the working directory may be gone
            return
        if entry not in seen:
            seen.add(entry)
            try:
                os.write(handle, (json.dumps(entry) + "\n").encode())
            except OSError:  # a full disk: half a list is worse than none
                with contextlib.suppress(OSError):
                    os.unlink(target)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writing = set(mode) & set("wax+") if mode else flags & _WRITING
            note("write" if writing else "read", path)
            if mode and "+" in mode:
                note("read", path)
        elif event == "os.rename":
            note("write", arguments[1])
        # looking for modules lists every folder of sys.path, which is no reading of data
        elif event in _LISTING and sys._getframe(1).f_code.co_filename != _IMPORTS:
            note("list", arguments[0] if arguments[0] is not None else ".")

    sys.addaudithook(hook)


def main() -> None:
    target = os.environ.pop("FRESNEL_TRACE", None)
    if target:
        trace_files(target)
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()


if __name__ == "__main__":
    main()
