"""Verdicts on disk, each bound to the content hash of the data it was reached on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fresnel.data.images import DatasetError
from fresnel.gate.findings import plain

if TYPE_CHECKING:
    from fresnel.gate.verdict import Verdict

KINDS = ("gate", "smoke-cvs", "smoke-decoder")
_COMMANDS = {
    "gate": "python -m fresnel validate {path}",
    "smoke-cvs": "./run_all.sh notebooks/02_smoke_train.ipynb -p dataset_dir {path} -p model cvs",
    "smoke-decoder": "./run_all.sh notebooks/02_smoke_train.ipynb -p dataset_dir {path} "
    "-p model decoder",
}


class GateRefusal(RuntimeError):
    """Training was refused: there is no receipt, it is of other data, or it records a failure."""


@dataclass(frozen=True)
class Receipt:
    """A verdict on disk, bound to the data it was reached on.

    Args:
        kind: "gate", "smoke-cvs" or "smoke-decoder".
        dataset_hash: `MultiViewDataset.content_hash` of the data.
        passed: the verdict.
        summary: the verdict's sentence.
        reasons: "code: message" of every failure, ranked.
        created_utc: ISO 8601.
        fresnel_version: of the package that issued it.
        overridden: True when a failure was waved through; stays on everything that follows.
    """

    kind: str
    dataset_hash: str
    passed: bool
    summary: str
    reasons: tuple[str, ...]
    created_utc: str
    fresnel_version: str
    overridden: bool = False

    def to_dict(self) -> dict[str, Any]:
        return plain(asdict(self))


def issue_receipt(
    dataset: Any, verdict: Verdict, *, kind: str = "gate", overridden: bool = False
) -> Receipt:
    """Write the verdict, pass or fail, to `dataset.path`/receipts/`kind`.json.

    Raises:
        ValueError: if the verdict is about other data, or about a part of it.
    """
    if getattr(dataset, "is_subset", False):
        raise ValueError("dataset: is a subset; validate and certify the whole set")
    if verdict.dataset_hash and verdict.dataset_hash != dataset.content_hash:
        raise ValueError(
            f"verdict: is about data {verdict.dataset_hash[:19]}, the dataset is "
            f"{dataset.content_hash[:19]}; validate this dataset"
        )
    reasons = tuple(f"{reason.code}: {reason.message}" for reason in verdict.reasons)
    return write_receipt(
        dataset, kind, verdict.passed, verdict.summary, reasons, overridden=overridden
    )


def write_receipt(
    dataset: Any,
    kind: str,
    passed: bool,
    summary: str,
    reasons: Sequence[str] = (),
    *,
    overridden: bool = False,
) -> Receipt:
    """Write a receipt of any kind, atomically; the smoke run's come through here directly."""
    from fresnel import __version__

    receipt = Receipt(
        kind=kind,
        dataset_hash=dataset.content_hash,
        passed=bool(passed),
        summary=summary,
        reasons=tuple(reasons),
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        fresnel_version=__version__,
        overridden=overridden,
    )
    path = _receipt_path(dataset, kind)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(receipt.to_dict(), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return receipt


def read_receipt(dataset: Any, kind: str = "gate") -> Receipt | None:
    """The receipt that lies in the dataset's folder, whatever it says; None if there is none.

    Raises:
        GateRefusal: if the file is there but is no receipt.
    """
    path = _receipt_path(dataset, kind)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        receipt = Receipt(**{**content, "reasons": tuple(content["reasons"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise GateRefusal(
            f"{path}: not a readable receipt ({error}); {_advice(dataset, kind)}"
        ) from error
    if receipt.kind != kind or not isinstance(receipt.passed, bool):
        raise GateRefusal(f"{path}: not a {kind} receipt; {_advice(dataset, kind)}")
    return receipt


def require_receipt(
    dataset: Any,
    kind: str = "gate",
    allow_failed: bool = False,
    *,
    receipt: Receipt | None = None,
) -> Receipt:
    """The passing receipt of exactly this data, or a refusal that says what to do.

    The data's hash is recomputed from the files when the dataset can (`verify`).

    Args:
        kind: "gate", "smoke-cvs" or "smoke-decoder".
        allow_failed: let a recorded failure through (negative controls); the receipt comes back
            with `overridden` set. A missing receipt, or one of other data, is refused regardless:
            validating takes seconds, and the control's failure has to be on record.
        receipt: one in hand, instead of the one in the dataset's folder.

    Raises:
        GateRefusal: if there is none, it is of other data, or it failed and that is not allowed.
    """
    receipt = receipt or read_receipt(dataset, kind)
    advice = _advice(dataset, kind)
    if receipt is None:
        raise GateRefusal(f"no {kind} receipt for {_place(dataset)}; {advice}")
    if receipt.kind != kind:
        raise GateRefusal(f"receipt: got one of kind {receipt.kind!r}, want {kind!r}; {advice}")
    if hasattr(dataset, "verify"):
        try:
            dataset.verify()
        except DatasetError as error:
            raise GateRefusal(f"{error}; {advice}") from error
    if receipt.dataset_hash != dataset.content_hash:
        raise GateRefusal(
            f"the {kind} receipt is of other data ({receipt.dataset_hash[:19]}, this is "
            f"{dataset.content_hash[:19]}); {advice}"
        )
    if receipt.passed and not receipt.overridden:
        return receipt
    if allow_failed:
        return replace(receipt, overridden=True)
    state = "was overridden" if receipt.passed else "failed"
    why = f": {receipt.reasons[0]}" if receipt.reasons else f": {receipt.summary}"
    raise GateRefusal(
        f"the {kind} check of {_place(dataset)} {state}{why}. Mend the data and {advice}, or pass "
        "allow_failed_gate=True for a negative control"
    )


def _receipt_path(dataset: Any, kind: str) -> Path:
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(KINDS)}")
    return Path(dataset.path) / "receipts" / f"{kind}.json"


def _advice(dataset: Any, kind: str) -> str:
    return f"run: {_COMMANDS[kind].format(path=_place(dataset))}"


def _place(dataset: Any) -> str:
    return str(getattr(dataset, "path", "THE DATA"))  # tensors don't know where they come from
