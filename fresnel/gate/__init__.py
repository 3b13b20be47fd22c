"""The gate: is this multi-view data fit to train on, and if not, what is wrong with it?

measure -> checks -> decide -> explain -> fix.  `validate` gives a `Verdict`, `fix.fix` writes a
copy with what can be mended mended, `issue_receipt` writes the verdict down, bound to the data's
content hash, and `require_receipt` is what training calls before it starts.
"""

import importlib
from typing import Any

_NAMES = {
    "verdict": "Reason Verdict issue_receipt validate",
    "receipts": "GateConfig GateRefusal Receipt read_receipt receipt_path require_receipt "
    "write_receipt",
}


def __getattr__(name: str) -> Any:
    """Loaded when asked for: training needs receipts alone, and nothing that reads data."""
    for module, names in _NAMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
