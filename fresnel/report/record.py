"""What a run was: parameters, provenance, stages, metrics, verdict and cost, in `results.json`.

A notebook calls `start()` once, measures with `Recorder.stage()`, and ends with
`Recorder.finish()`. The file is rewritten after every stage, so that a run that dies leaves what
it had; its status then still says "running", and the runner turns that into "crashed".

The file's shape is `schema/results.schema.json` (JSON Schema, draft 7, version SCHEMA_VERSION); it
is checked on writing and on reading. Beside what a notebook records itself it holds

- ``failure``: how a crashed run ended, ``{"kind", "cell"}``; ``error`` says it in words.
- ``resources``: ``{"peak_rss_bytes", "peak_cuda_bytes", "samples_per_s", "energy"}``; ``energy`` is
  ``{"joules", "gpu_joules", "cpu_joules", "source", "reason"}`` (`meters.EnergyMeter`), None where
  nothing could be read, and then "reason" says why.
- ``cost_avoided``: what the training would have cost that this verdict forbids, less what the
  verdict cost: ``{"usd", "duration_s", ...}`` (`fresnel.report.costs` sums it over runs).
- ``provenance``: `identity` and `inputs` say what the run was made from (`fresnel.report.cache`).
- ``cached``: None, or ``{"reused_utc", "computed_utc", "commit", "dirty"}`` once a later call of
  the same report found nothing changed: the figures are those of `computed_utc` at `commit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from fresnel.host.files import write_atomic
from fresnel.host.machine import cuda, project_root
from fresnel.host.meters import EnergyMeter, PeakMemory
from fresnel.report.provenance import RESULTS_NAME, digest, provenance

SCHEMA_VERSION = 2
SCHEMA = Path(__file__).parent / "schema" / "results.schema.json"
VERDICTS = ("PASS", "FAIL", "GO", "NO-GO", "REFUSED", "DONE")
THUMBNAIL_NAME = "thumbnail.png"


class RecordError(ValueError):
    """A results.json that cannot be read, or a Recorder used in the wrong order."""


@dataclass(frozen=True)
class Stage:
    """One timed part of a run; memory is the most seen meanwhile: resident, of this process and its
    children (shared pages count in each), and of torch's CUDA allocator (None without CUDA)."""

    name: str
    duration_s: float
    peak_rss_bytes: int
    peak_cuda_bytes: int | None = None
    failed: bool = False


@dataclass(frozen=True)
class Failure:
    """How a run ended that did not finish. `kind`: see results.schema.json; `message`: plain words;
    `cell`: the code cell it happened in, counted from 1 as in the source notebook."""

    kind: str
    message: str
    cell: int | None = None


@dataclass(frozen=True)
class RunRecord:
    """One run, exactly as `results.json` holds it. `status` is "running", "finished" or "crashed";
    `verdict` one of VERDICTS, or None as long as there is none (and for ever if it crashed)."""

    notebook: str
    status: str
    verdict: str | None = None
    summary: str = ""
    reasons: tuple[str, ...] = ()
    error: str | None = None
    failure: dict[str, Any] | None = None
    name: str = ""
    title: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    resources: dict[str, Any] = field(default_factory=lambda: _resources((), {}))
    artifacts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    started_utc: str = ""
    duration_s: float = 0.0
    price_per_hour_usd: float = 0.0
    cost_usd: float = 0.0
    cost_avoided: dict[str, Any] | None = None
    cached: dict[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def badge(self) -> str:
        """The one word for a person: the verdict of a finished run, else how it stands or ended;
        DIED where its process is gone without a word."""
        if self.status == "finished" and self.verdict:
            return self.verdict
        if self.status == "crashed" and (self.failure or {}).get("kind") == "stopped":
            return "STOPPED"
        if self.status == "running" and not _lives(self.provenance.get("process")):
            return "DIED"
        return self.status.upper()

    def _repr_markdown_(self) -> str:
        lines = [f"**{self.badge}.** {self.error or self.summary}"]
        return "\n".join([*lines, "", *(f"- {reason}" for reason in self.reasons)])

    def replace(self, **changes: Any) -> RunRecord:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict. NaN and infinities become None, each with a line under "notes"."""
        notes = list(self.notes)
        plain = _plain(dataclasses.asdict(self), "", notes)
        plain["notes"] = notes
        return plain

    def write(self, path: str | Path) -> Path:
        """Write to `path`, or to `path`/results.json where it is a folder; never half a file.

        Raises RecordError if a value does not fit the schema."""
        target, data = _file(path), self.to_dict()
        check(data, where=str(target))
        text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)
        write_atomic(target, text + "\n")
        return target

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a results.json (or the one in the folder `path`).

        Raises RecordError that says what is wrong with it; unknown keys are left out."""
        source = _file(path)
        try:
            data = json.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecordError(f"{source}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{source}: is not valid JSON ({error})") from error
        return cls.from_dict(data, where=str(source))

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "results") -> RunRecord:
        if not isinstance(data, dict):
            raise RecordError(f"{where}: must hold an object, got {type(data).__name__}")
        version = data.get("schema_version", 1)
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            advice = "update fresnel to read it" if newer else "run its notebook again"
            raise RecordError(
                f"{where}: schema_version is {version!r}, this program reads {SCHEMA_VERSION}; "
                f"{advice}"
            )
        check(data, where=where)
        lists = {key: tuple(data[key]) for key in ("reasons", "notes")}
        stages = tuple(_known(Stage, stage) for stage in data["stages"])
        return _known(cls, {**data, **lists, "stages": stages})


def _known(kind: type[Any], data: Mapping[str, Any]) -> Any:
    """A `kind` of those values in `data` that it has; a later program may have written others."""
    return kind(**{f.name: data[f.name] for f in dataclasses.fields(kind) if f.name in data})


def _file(path: str | Path) -> Path:
    return Path(path) / RESULTS_NAME if Path(path).is_dir() else Path(path)


def check(data: Any, *, where: str = "results") -> None:
    """Raise RecordError, saying which value does not fit the schema and why."""
    import fastjsonschema

    try:
        _validator()(data)
    except fastjsonschema.JsonSchemaValueException as error:
        missing = error.rule_definition if error.rule == "required" else []
        missing = [key for key in missing if key not in error.value]
        text = f"{error.name} lacks {', '.join(missing)}" if missing else error.message
        raise RecordError(f"{where}: {text.removeprefix('data').lstrip('. ')}") from None


@functools.cache
def _validator() -> Any:
    import fastjsonschema

    return fastjsonschema.compile(json.loads(SCHEMA.read_text(encoding="utf-8")))


def _resources(
    stages: Sequence[Stage], metrics: Mapping[str, Any], energy: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The `resources` of a run with these stages and metrics."""
    cuda_peaks = [s.peak_cuda_bytes for s in stages if s.peak_cuda_bytes is not None]
    rate = metrics.get("samples_per_s")
    nothing = dict.fromkeys(("joules", "gpu_joules", "cpu_joules", "source"))
    return {
        "peak_rss_bytes": max((stage.peak_rss_bytes for stage in stages), default=None),
        "peak_cuda_bytes": max(cuda_peaks, default=None),
        "samples_per_s": float(rate) if isinstance(rate, (int, float)) else None,
        "energy": dict(energy or {**nothing, "reason": "not measured"}),
    }


class Recorder:
    """Collects a run's `record` while it goes on. Made by `start()`."""

    def __init__(self, record: RunRecord, output_dir: Path) -> None:
        self.output_dir, self.record = output_dir, record
        self._clock = time.perf_counter()
        self._stages: list[Stage] = []
        self._open: list[PeakMemory] = []
        self._energy = EnergyMeter()
        self._save()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block and watch its memory. Stages may nest; each counts its own whole time."""
        self._change()
        peak = PeakMemory()
        slot = len(self._stages)  # in order of beginning: the outer stage before its inner ones
        self._fold_cuda_peaks()
        self._open.append(peak)
        begun, failed = time.perf_counter(), True
        try:
            yield
            failed = False
        finally:
            duration = time.perf_counter() - begun
            self._fold_cuda_peaks()
            self._open.remove(peak)
            self._stages.insert(slot, Stage(name, duration, peak.close(), peak.cuda, failed))
            self._save()

    def metric(self, name: str, value: Any) -> None:
        """Record one measured value: number, text, or a JSON-like structure of them."""
        self.metrics({name: value})

    def metrics(self, values: Mapping[str, Any]) -> None:
        self._change(metrics={**self.record.metrics, **values})

    def dataset(self, dataset: Any) -> None:
        """Record which data the run used or made: `content_hash`, `path`, length of `dataset`."""
        entry = {
            "content_hash": dataset.content_hash,
            "path": _relative(Path(dataset.path), project_root()),
            "objects": len(dataset),
        }
        known = self.record.provenance.get("datasets", [])
        datasets = [*(other for other in known if other != entry), entry]
        self._change(provenance={**self.record.provenance, "datasets": datasets})
        self.input(dataset.path)

    def input(self, path: str | Path) -> None:
        """Declare a file or folder that the run depends on, or that it made: the run is used again
        only while its content is as it is now. What parameters name counts by itself."""
        place = Path(path).resolve()
        known = self.record.provenance.get("inputs", {})
        inputs = {**known, str(place): digest(place, self.output_dir)}
        self._change(provenance={**self.record.provenance, "inputs": inputs})
        self._save()

    def thumbnail(self, image: Any, *, longest_px: int = 480) -> Path:
        """Save `image` as the run's picture in the index.

        image: (H, W, 3), (H, W, 4) or (H, W); uint8, or floats in [0, 1]."""
        import numpy as np
        from PIL import Image

        array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
            raise ValueError(f"image: got shape {array.shape}, want (H, W), (H, W, 3) or (H, W, 4)")
        if array.dtype != np.uint8:
            array = (np.nan_to_num(array).clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        path = save_thumbnail(Image.fromarray(array), self.output_dir, longest_px)
        self.artifact("thumbnail", path)
        return path

    def artifact(self, name: str, path: str | Path) -> None:
        """Name a file that the run made. Paths below the output folder are kept relative to it."""
        kept = _relative(Path(path), self.output_dir)
        self._change(artifacts={**self.record.artifacts, name: kept})

    def note(self, text: str) -> None:
        """Add a line that a reader should see beside the results."""
        self._change(notes=(*self.record.notes, text))

    def finish(self, verdict: str, summary: str, reasons: Sequence[str] = ()) -> RunRecord:
        """State the verdict (one of VERDICTS), a one-paragraph summary and the named reasons."""
        if verdict not in VERDICTS:
            raise ValueError(f"verdict: got {verdict!r}, want one of {', '.join(VERDICTS)}")
        why = tuple(str(reason) for reason in reasons)
        self._change(status="finished", verdict=verdict, summary=summary, reasons=why)
        self._save()
        self._energy.close()
        return self.record

    def _change(self, **changes: Any) -> None:
        if self.record.status != "running":
            raise RecordError(f"the record of {self.record.notebook!r} is already finished")
        self.record = self.record.replace(**changes)

    def _fold_cuda_peaks(self) -> None:
        # torch keeps one process-wide peak: hand it to every open stage, then begin anew
        device = cuda()
        if device is None:
            return
        peak = int(device.max_memory_allocated())
        for watch in self._open:
            watch.cuda = max(watch.cuda or 0, peak)
        device.reset_peak_memory_stats()

    def _save(self) -> None:
        duration = time.perf_counter() - self._clock
        self.record = self.record.replace(
            stages=tuple(self._stages),
            resources=_resources(self._stages, self.record.metrics, self._energy.read()),
            duration_s=duration,
            cost_usd=self.record.price_per_hour_usd * duration / 3600.0,
        )
        self.record.write(self.output_dir / RESULTS_NAME)


def save_thumbnail(picture: Any, folder: Path, longest_px: int = 480) -> Path:
    """Save a PIL image, made small, as the picture of the run in `folder`."""
    picture.thumbnail((longest_px, longest_px), 1)  # Lanczos
    picture.save(folder / THUMBNAIL_NAME, optimize=True)
    return folder / THUMBNAIL_NAME


def start(
    notebook: str,
    params: Mapping[str, Any],
    output_dir: str | Path = "",
    *,
    price_per_hour_usd: float = 0.0,
    seed: int | None = None,
) -> Recorder:
    """Begin a run's record and write its first results.json.

    notebook: its name, e.g. "01_validate_data". params: every parameter with its value.
    output_dir: where results.json goes; "" makes reports/runs/<UTC time>-<notebook>.
    price_per_hour_usd: what the machine costs; the record multiplies it by wall time.
    seed: the run's seed; taken from params["seed"] where it is there.
    """
    if not price_per_hour_usd >= 0.0:
        raise ValueError(f"price_per_hour_usd: got {price_per_hour_usd!r}, want a number >= 0")
    name = Path(notebook).stem
    folder = Path(output_dir) if output_dir else new_run_dir(project_root() / "reports", name)
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(
        notebook=name,
        status="running",
        name=name,
        params=dict(params),
        provenance={
            **provenance(seed if seed is not None else params.get("seed")),
            "process": {"pid": os.getpid(), "host": socket.gethostname()},
        },
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        price_per_hour_usd=float(price_per_hour_usd),
    )
    return Recorder(record, folder.resolve())


def slug(name: str) -> str:
    """A run's name as its folder has it."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def new_run_dir(reports_dir: str | Path, name: str) -> Path:
    """Make reports_dir/runs/<UTC time>-<name>, a folder of its own even for runs begun at once."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in itertools.count(1):
        suffix = f"-{number}" if number > 1 else ""
        folder = Path(reports_dir) / "runs" / f"{stamp}-{slug(name)}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def _lives(process: Mapping[str, Any] | None) -> bool:
    """Whether a run's process may still be at work; one of another machine may."""
    here = process is not None and process["host"] == socket.gethostname()
    return process is None or not here or psutil.pid_exists(process["pid"])


def _relative(path: Path, root: Path) -> str:
    resolved, base = path.resolve(), root.resolve()
    return str(resolved.relative_to(base)) if resolved.is_relative_to(base) else str(path)


def _plain(value: Any, where: str, notes: list[str]) -> Any:
    """`value` as JSON's own types; what JSON cannot say (NaN, infinity) as None, with a note."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        note = f"{where} was {value}; stored as null"
        notes += [] if note in notes else [note]
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        within = f"{where}." if where else ""
        return {str(key): _plain(item, f"{within}{key}", notes) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, f"{where}[{i}]", notes) for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return _plain(value.tolist(), where, notes)
    return str(value)
