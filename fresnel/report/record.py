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

import dataclasses
import functools
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
    """One timed part of a run. Memory is the highest value seen while the stage was open.

    peak_rss_bytes: resident memory of this process and its children (shared pages count in each).
    peak_cuda_bytes: memory held by torch's CUDA allocator; None without CUDA.
    """

    name: str
    duration_s: float
    peak_rss_bytes: int
    peak_cuda_bytes: int | None = None
    failed: bool = False


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
        target = Path(path)
        if target.is_dir():
            target = target / RESULTS_NAME
        data = self.to_dict()
        check(data, where=str(target))
        text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)
        write_atomic(target, text + "\n")
        return target

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a results.json (or the one in the folder `path`).

        Raises RecordError that says what is wrong with it; unknown keys are left out."""
        source = Path(path)
        if source.is_dir():
            source = source / RESULTS_NAME
        try:
            data = json.loads(source.read_text(encoding="utf-8"))
            return cls.from_dict(data, where=str(source))
        except OSError as error:
            raise RecordError(f"{source}: cannot be read ({error.strerror})") from error
        except RecordError:
            raise
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{source}: is not valid JSON ({error})") from error

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "results") -> RunRecord:
        if not isinstance(data, dict):
            raise RecordError(f"{where}: must hold an object, got {type(data).__name__}")
        data = upgrade(data, where=where)
        check(data, where=where)
        known = {f.name for f in dataclasses.fields(cls)}
        stage_names = {f.name for f in dataclasses.fields(Stage)}
        kept = {key: value for key, value in data.items() if key in known}
        kept["stages"] = tuple(
            Stage(**{key: value for key, value in stage.items() if key in stage_names})
            for stage in data["stages"]
        )
        kept["reasons"], kept["notes"] = tuple(data["reasons"]), tuple(data["notes"])
        return cls(**kept)


def upgrade(data: Mapping[str, Any], *, where: str = "results") -> dict[str, Any]:
    """`data` in the newest schema's terms; what an older program did not write gets its default.

    1 -> 2: `failure` is told from the status ("cell_error" for what crashed), `resources` from the
    stages and metrics, energy was not measured; `cached` and `cost_avoided` are None. Raises
    RecordError for a record of a newer program."""
    version = data.get("schema_version") or 1
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise RecordError(
            f"{where}: schema_version {version!r} is newer than this program's {SCHEMA_VERSION}; "
            "update fresnel to read it"
        )
    if version == SCHEMA_VERSION:
        return dict(data)
    blank = RunRecord("", "running").to_dict()
    del blank["notebook"], blank["status"]
    new = {**blank, **data, "schema_version": SCHEMA_VERSION}
    if data.get("status") == "crashed":
        new["failure"] = {"kind": "cell_error", "cell": None}
    with_stages = [s for s in data.get("stages") or () if isinstance(s, Mapping)]
    metrics = data.get("metrics")
    new["resources"] = _resources(with_stages, metrics if isinstance(metrics, Mapping) else {})
    new["resources"]["energy"]["reason"] = "not measured before version 2"
    return new


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
    stages: Sequence[Stage | Mapping[str, Any]],
    metrics: Mapping[str, Any],
    energy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `resources` of a run with these stages and metrics."""

    def peak(name: str) -> int | None:
        of_stages = [s.get(name) if isinstance(s, Mapping) else getattr(s, name) for s in stages]
        return max((value for value in of_stages if value is not None), default=None)

    rate = metrics.get("samples_per_s")
    nothing = dict.fromkeys(("joules", "gpu_joules", "cpu_joules", "source"))
    return {
        "peak_rss_bytes": peak("peak_rss_bytes"),
        "peak_cuda_bytes": peak("peak_cuda_bytes"),
        "samples_per_s": float(rate) if isinstance(rate, (int, float)) else None,
        "energy": dict(energy or {**nothing, "reason": "not measured"}),
    }


class Recorder:
    """Collects a RunRecord while a run goes on. Made by `start()`."""

    def __init__(self, record: RunRecord, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._record = record
        self._clock = time.perf_counter()
        self._stages: list[Stage] = []
        self._open: list[PeakMemory] = []
        self._energy = EnergyMeter()
        self._save()

    @property
    def record(self) -> RunRecord:
        """The record as it stands now."""
        return self._record

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block and watch its memory. Stages may nest; each counts its own whole time."""
        self._check_open()
        peak = PeakMemory()
        slot = len(self._stages)  # in order of beginning: the outer stage before its inner ones
        self._fold_cuda_peaks()
        self._open.append(peak)
        begun = time.perf_counter()
        failed = True
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
        self._check_open()
        merged = self._record.metrics | {str(key): value for key, value in values.items()}
        self._record = self._record.replace(metrics=merged)

    def dataset(self, dataset: Any) -> None:
        """Record which data the run used or made: `content_hash`, `path`, length of `dataset`."""
        entry = {
            "content_hash": dataset.content_hash,
            "path": _relative(Path(dataset.path), project_root()),
            "objects": len(dataset),
        }
        known = self._record.provenance.get("datasets", [])
        self._note(datasets=[*(other for other in known if other != entry), entry])
        self.input(dataset.path)

    def input(self, path: str | Path) -> None:
        """Declare a file or folder that the run depends on, or that it made: the run is used again
        only while its content is as it is now. What parameters name counts by itself."""
        place = Path(path).resolve()
        known = self._record.provenance.get("inputs", {})
        self._note(inputs={**known, str(place): digest(place, self.output_dir)})

    def _note(self, **origin: Any) -> None:
        self._check_open()
        self._record = self._record.replace(provenance={**self._record.provenance, **origin})
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
        picture = Image.fromarray(array)
        picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
        path = self.output_dir / THUMBNAIL_NAME
        picture.save(path, optimize=True)
        self.artifact("thumbnail", path)
        return path

    def artifact(self, name: str, path: str | Path) -> None:
        """Name a file that the run made. Paths below the output folder are kept relative to it."""
        self._check_open()
        kept = _relative(Path(path), self.output_dir)
        self._record = self._record.replace(artifacts=self._record.artifacts | {name: kept})

    def note(self, text: str) -> None:
        """Add a line that a reader should see beside the results."""
        self._check_open()
        self._record = self._record.replace(notes=(*self._record.notes, text))

    def finish(self, verdict: str, summary: str, reasons: Sequence[str] = ()) -> RunRecord:
        """State the verdict (one of VERDICTS), a one-paragraph summary and the named reasons."""
        self._check_open()
        if verdict not in VERDICTS:
            raise ValueError(f"verdict: got {verdict!r}, want one of {', '.join(VERDICTS)}")
        self._record = self._record.replace(
            status="finished",
            verdict=verdict,
            summary=summary,
            reasons=tuple(str(reason) for reason in reasons),
        )
        self._save()
        self._energy.close()
        return self._record

    def _check_open(self) -> None:
        if self._record.status != "running":
            raise RecordError(f"the record of {self._record.notebook!r} is already finished")

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
        self._record = self._record.replace(
            stages=tuple(self._stages),
            resources=_resources(self._stages, self._record.metrics, self._energy.read()),
            duration_s=duration,
            cost_usd=self._record.price_per_hour_usd * duration / 3600.0,
        )
        self._record.write(self.output_dir / RESULTS_NAME)


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
    if output_dir:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = new_run_dir(project_root() / "reports", name)
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
    for attempt in range(1, 1000):
        suffix = "" if attempt == 1 else f"-{attempt}"
        folder = Path(reports_dir) / "runs" / f"{stamp}-{slug(name)}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{reports_dir}/runs: a thousand runs named {name!r} in one second")


def _lives(process: Mapping[str, Any] | None) -> bool:
    """Whether a run's process may still be at work; one of another machine may."""
    if not process or process["host"] != socket.gethostname():
        return True
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True


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
        if note not in notes:
            notes.append(note)
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item, f"{where}.{key}" if where else str(key), notes)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, f"{where}[{i}]", notes) for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return _plain(value.tolist(), where, notes)
    return str(value)
