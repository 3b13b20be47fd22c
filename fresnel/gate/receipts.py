"""Verdicts on disk, each bound to what it was reached on: content, thresholds, the gate's version.

A receipt protects against accidents, not against forgery: it is not signed (see docs/gate.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from fresnel.data.images import DatasetError
from fresnel.gate.thresholds import VERSION, GateConfig
from fresnel.host.files import inside, write_atomic

KINDS = ("gate", "smoke-cvs", "smoke-decoder")


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
        gate_version: of the gate's rules (`thresholds.VERSION`).
        thresholds: what the verdict was reached with, by name; {} of a smoke run.
        records_seen: looked at, of `records_total` in the data.
        overridden: True when a failure was waved through; stays on everything that follows.
    """

    kind: str
    dataset_hash: str
    passed: bool
    summary: str
    reasons: tuple[str, ...]
    created_utc: str
    fresnel_version: str
    gate_version: int = 1
    thresholds: dict[str, float] = field(default_factory=dict)
    records_seen: int = 0
    records_total: int = 0
    overridden: bool = False

    @property
    def moved_thresholds(self) -> dict[str, float]:
        """Those that are not the calibrated defaults."""
        default = asdict(GateConfig())
        return {k: v for k, v in self.thresholds.items() if default.get(k) != v}


def write_receipt(
    dataset: Any,
    kind: str,
    passed: bool,
    summary: str,
    reasons: Sequence[str] = (),
    *,
    overridden: bool = False,
    thresholds: Mapping[str, float] | None = None,
    records: tuple[int, int] = (0, 0),
) -> Receipt:
    """Write a receipt of any kind, atomically; the smoke run's come through here directly."""
    from fresnel import __version__

    receipt = Receipt(
        kind,
        dataset.content_hash,
        bool(passed),
        summary,
        tuple(reasons),
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        fresnel_version=__version__,
        gate_version=VERSION,
        thresholds=dict(thresholds or {}),
        records_seen=records[0],
        records_total=records[1],
        overridden=overridden,
    )
    text = msgspec.json.format(msgspec.json.encode(receipt), indent=2)
    write_atomic(_receipt_path(dataset, kind), text.decode() + "\n")
    return receipt


def read_receipt(dataset: Any, kind: str = "gate") -> Receipt | None:
    """The receipt that lies in the dataset's folder, whatever it says; None if there is none.

    Raises:
        GateRefusal: if the file is there but is no receipt.
    """
    path = _receipt_path(dataset, kind)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Receipt) if path.exists() else None
    except (OSError, msgspec.MsgspecError) as error:
        why = f"{path}: not a readable receipt ({error})"
        raise GateRefusal(f"{why}; {_advice(dataset, kind)}") from error


def require_receipt(
    data: Any,
    kind: str = "gate",
    allow_failed: bool = False,
    *,
    receipt: Receipt | None = None,
) -> Receipt:
    """The passing receipt of exactly this data, or a refusal that says what to do.

    Args:
        data: a dataset, whose files are hashed anew (`verify`); or tensors, whose `content_hash` is
            that of the files they were read from.
        kind: "gate", "smoke-cvs" or "smoke-decoder".
        allow_failed: let a recorded failure through (negative controls); the receipt comes back
            with `overridden` set.  A missing receipt, or one of other data, is refused regardless:
            validating takes seconds, and the control's failure has to be on record.
        receipt: one in hand, instead of the one in the dataset's folder.

    Raises:
        GateRefusal: if there is none, it is of other data or another version of the gate, or it
            failed, was overridden or reached with other thresholds, and that is not allowed.
    """
    receipt, advice = receipt or read_receipt(data, kind), _advice(data, kind)
    if receipt is None:
        raise GateRefusal(f"no {kind} receipt for {_place(data)}; {advice}")
    if receipt.kind != kind or receipt.gate_version != VERSION:
        raise GateRefusal(
            f"receipt: got one of kind {receipt.kind!r} by gate {receipt.gate_version}, want "
            f"{kind!r} by gate {VERSION}; {advice}"
        )
    if hasattr(data, "verify"):
        try:
            data.verify()
        except DatasetError as error:
            raise GateRefusal(f"{error}; {advice}") from error
    if not data.content_hash or receipt.dataset_hash != data.content_hash:
        raise GateRefusal(
            f"the {kind} receipt is of other data ({receipt.dataset_hash[:19]}, this is "
            f"{data.content_hash[:19] or 'of unknown origin'}); {advice}"
        )
    moved = ", ".join(f"{name} {value:g}" for name, value in receipt.moved_thresholds.items())
    if receipt.passed and not receipt.overridden and not moved:
        return receipt
    if allow_failed:
        return replace(receipt, overridden=True)
    why = receipt.reasons[0] if receipt.reasons else receipt.summary
    state = f"was overridden: {why}" if receipt.passed else f"failed: {why}"
    if receipt.passed and moved:
        state = f"passed by thresholds that are not the calibrated ones: {moved}"
    raise GateRefusal(
        f"the {kind} check of {_place(data)} {state}. Mend the data and {advice}, or pass "
        "allow_failed_gate=True for a negative control"
    )


def _receipt_path(dataset: Any, kind: str) -> Path:
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(KINDS)}")
    return inside(Path(dataset.path), f"receipts/{kind}.json")


def _advice(data: Any, kind: str) -> str:
    if kind == "gate":
        return f"run: ./run_all.sh validate {_place(data)}"
    where = f"-p dataset_dir {_place(data)} -p model {kind.removeprefix('smoke-')}"
    return f"run: ./run_all.sh notebooks/02_smoke_train.ipynb {where}"


def _place(data: Any) -> str:
    return str(getattr(data, "path", "THE DATA"))  # tensors don't know where they come from
