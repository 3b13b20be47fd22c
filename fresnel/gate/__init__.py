"""The gate: is this multi-view data fit to train on, and if not, what is wrong with it?

measure -> checks -> decide -> explain -> fix.  `validate` gives a `Verdict`, `fix.fix` writes a
copy with what can be mended mended, `issue_receipt` writes the verdict down, bound to the data's
content hash, and `require_receipt` is what training calls before it starts.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "verdict": ("Verdict", "issue_receipt", "validate"),
    "decide": ("Reason",),
    "thresholds": ("GateConfig",),
    "receipts": (
        *("GateRefusal", "Receipt", "read_receipt", "require_receipt"),
        "write_receipt",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
