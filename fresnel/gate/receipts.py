"""Verdicts on disk, each bound to what it was reached on: content, thresholds, the gate's version.

A receipt protects against accidents, not against forgery: it is not signed (see docs/gate.md).
It lies in receipts/ of a dataset in our layout; those of other people's files, and of folders that
can't be written, lie in runs/receipts/ of the checkout, else in the user's cache, by content hash.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from fresnel.data.images import DatasetError, read_bytes
from fresnel.gate.thresholds import VERSION, GateConfig
from fresnel.host.files import inside, write_atomic
from fresnel.host.machine import cache_dir, project_root

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
        overridden: True when a failure was waved through, thresholds were moved, or the data was
            made by weights that say so; stays on everything that follows.
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
    def moved_thresholds(self) -> dict[str, float | None]:
        """Those that are not the calibrated defaults; None where one is missing."""
        default, own = asdict(GateConfig()), self.thresholds
        names = (default | own) if self.kind == "gate" else ()
        return {name: own.get(name) for name in names if own.get(name) != default.get(name)}


def write_receipt(
    dataset: Any,
    kind: str,
    passed: bool,
    summary: str,
    reasons: Sequence[str] = (),
    *,
    overridden: bool = False,
    thresholds: Mapping[str, float] | None = None,
    records: tuple[int, int] | None = None,
) -> Receipt:
    """Write a receipt of any kind, atomically; the smoke run's come through here directly.

    Args:
        thresholds: of the gate (None: its own).
        records: seen, and of how many (None: all of the data's).
    """
    from fresnel import __version__

    count = _count(dataset)
    if thresholds is None:
        thresholds = asdict(GateConfig()) if kind == "gate" else {}
    receipt = Receipt(
        kind,
        dataset.content_hash,
        bool(passed),
        summary,
        tuple(reasons),
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        fresnel_version=__version__,
        gate_version=VERSION,
        thresholds=dict(thresholds),
        records_seen=records[0] if records else count,
        records_total=records[1] if records else count,
        overridden=overridden,
    )
    receipt = replace(receipt, overridden=overridden or bool(receipt.moved_thresholds))
    text = msgspec.json.format(msgspec.json.encode(receipt), indent=2)
    keep(dataset, _name(kind), text.decode() + "\n")
    return receipt


def read_receipt(dataset: Any, kind: str = "gate") -> Receipt | None:
    """The receipt that was kept for the dataset, whatever it says; None if there is none.

    Raises:
        GateRefusal: if the file is there but is no receipt.
    """
    path = Path(_name(kind))
    try:
        path = kept(dataset, path.name)
        if not path.exists():
            return None
        return msgspec.json.decode(read_bytes(path, 1 << 20), type=Receipt)
    except (OSError, ValueError, RecursionError) as error:  # msgspec's are ValueErrors
        why = f"{path}: not a readable receipt ({error})"
        raise GateRefusal(f"{why}; {_advice(dataset, kind)}") from error


def receipt_path(dataset: Any, kind: str = "gate") -> Path:
    """Where the receipt lies that `read_receipt` reads, or where it would."""
    return kept(dataset, _name(kind))


def kept(dataset: Any, name: str) -> Path:
    """The newest file of that name kept for a dataset, or where it would be kept."""
    places = _places(dataset, name)
    there = [place for place in places if place.exists()]
    return max(there, key=lambda place: place.stat().st_mtime_ns, default=places[0])


def keep(dataset: Any, name: str, text: str) -> Path:
    """Write a file beside a dataset's receipts, whole or not at all; returns where it is.

    Raises:
        OSError: if it can be written nowhere.
        ValueError: if a link leads out of the dataset's folder.
    """
    places, said = _places(dataset, name), list[str]()
    for place in places:
        try:
            write_atomic(place, text)
            return place
        except OSError as error:
            said.append(f"{place} ({error.strerror})")
    raise OSError(
        f"{name} of {_place(dataset)} can't be written, tried {', '.join(said)}; make one of these "
        "folders writable, or set XDG_CACHE_HOME to one that is"
    )


def _places(dataset: Any, name: str) -> list[Path]:
    """Where a file that belongs to a dataset may lie, the best first."""
    places, root = list[Path](), project_root()
    if getattr(dataset, "layout", "fresnel") == "fresnel":
        places.append(inside(Path(dataset.path), f"receipts/{name}"))
    if digest := getattr(dataset, "content_hash", "").removeprefix("sha256:"):
        roots = [root / "runs"] if (root / "pyproject.toml").is_file() else []
        with contextlib.suppress(RuntimeError):  # no home
            roots.append(cache_dir())
        places += [folder / "receipts" / digest[:32] / name for folder in roots]
    return places


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
        allow_failed: let what is no clean pass through (negative controls): a failure, a pass by
            other thresholds, of a part, by another gate, or overridden; the receipt comes back with
            `overridden` set.  A missing receipt, or one of other data, is refused regardless:
            validating takes seconds, and the control's failure has to be on record.
        receipt: one in hand, instead of the one that was kept for the dataset.

    Raises:
        GateRefusal: if there is none, it is of other data, or no clean pass and not allowed.
    """
    receipt, advice = receipt or read_receipt(data, kind), _advice(data, kind)
    if receipt is None:
        raise GateRefusal(f"no {kind} receipt for {_place(data)}; {advice}")
    if receipt.kind != kind:
        raise GateRefusal(f"receipt: got one of kind {receipt.kind!r}, want {kind!r}; {advice}")
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
    if not (stained := _stain(receipt, data)):
        return receipt
    if allow_failed:
        return replace(receipt, overridden=True)
    raise GateRefusal(
        f"the {kind} check of {_place(data)} {stained}. Mend the data and {advice}, or pass "
        "allow_failed_gate=True for a negative control"
    )


def _stain(receipt: Receipt, data: Any) -> str:
    """What keeps a receipt of this data from being a clean pass; "" if nothing does."""
    why = receipt.reasons[0] if receipt.reasons else receipt.summary
    if receipt.gate_version != VERSION:
        return f"is by gate {receipt.gate_version}, want one by gate {VERSION}"
    if not receipt.passed:
        return f"failed: {why}"
    if moved := receipt.moved_thresholds:
        said = ", ".join(f"{name} {value}" for name, value in moved.items())
        return f"passed by thresholds that are not the calibrated ones: {said}"
    count, seen, total = _count(data), receipt.records_seen, receipt.records_total
    if receipt.kind == "gate" and not count <= total == seen:
        return f"saw {seen} records of {total}, this data has {count}"
    return f"was overridden: {why}" if receipt.overridden or receipt.reasons else ""


def _count(data: Any) -> int:
    return len(data) if hasattr(data, "__len__") else 0


def _name(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(KINDS)}")
    return f"{kind}.json"


def _advice(data: Any, kind: str) -> str:
    if kind == "gate":
        return f"run: ./run_all.sh validate {_place(data)}"
    where = f"-p dataset_dir {_place(data)} -p model {kind.removeprefix('smoke-')}"
    return f"run: ./run_all.sh notebooks/02_smoke_train.ipynb {where}"


def _place(data: Any) -> str:
    return str(getattr(data, "path", "THE DATA"))  # tensors don't know where they come from
