"""What a run was: parameters, provenance, stages, metrics, verdict and cost, in `results.json`.

A notebook calls `start()` once, measures with `Recorder.stage()`, and ends with
`Recorder.finish()`. The file is rewritten after every stage, so that a run that dies leaves what
it had; its status then still says "running", and the runner turns that into "crashed".

The types here are the file's shape, checked on writing and on reading (`msgspec.json.schema` makes
a JSON Schema of them); what was not measured is None.
"""

import contextlib
import dataclasses
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
from typing import Annotated, Any, Literal, Self, get_args

import msgspec
import psutil

from fresnel.host.files import locked, own, read_json, write_atomic
from fresnel.host.machine import cuda, project_root
from fresnel.host.meters import EnergyMeter, PeakMemory
from fresnel.report.provenance import RESULTS_NAME, digest, provenance

THUMBNAIL_NAME = "thumbnail.png"
RUNNING_NAME = ".running"
"""In a run's folder, locked by its process for as long as that lives."""
Amount = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Verdict = Literal["PASS", "NOT BETTER", "FAIL", "GO", "NO-GO", "REFUSED", "DONE"]
VERDICTS = get_args(Verdict)


class RecordError(ValueError):
    """A results.json that cannot be read."""


@dataclass(frozen=True)
class Stage:
    """One timed part of a run; memory is the most seen meanwhile: resident, of this process and its
    children (shared pages count in each), and of torch's CUDA allocator (None without CUDA)."""

    name: str
    duration_s: Amount
    peak_rss_bytes: Count
    peak_cuda_bytes: Count | None = None
    failed: bool = False


@dataclass(frozen=True)
class RunRecord:
    """One run, exactly as `results.json` holds it. `name`: of the step; runs of one are comparable.
    `failure`, of a crashed run: {"kind": a key of `run.EXIT_STATUS` or "died", "cell": its number
    among the source's code cells}; `error` says it in words. `cost_avoided`: see the index.
    `cached`: {"reused_utc", "computed_utc", "commit", "dirty"} once a later call found nothing
    changed: the figures are those of `computed_utc` at `commit`."""

    notebook: str
    status: Literal["running", "finished", "crashed"]
    verdict: Verdict | None = None
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
    resources: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    started_utc: str = ""
    duration_s: Amount = 0.0
    price_per_hour_usd: Amount = 0.0
    cost_usd: Amount = 0.0
    cost_avoided: dict[str, Any] | None = None
    cached: dict[str, Any] | None = None
    schema_version: Literal[2] = 2

    @property
    def badge(self) -> str:
        """The one word for a person: the verdict of a finished run ("overridden" beside it where it
        rests on data that the gate refused), else how it stands or ended; DIED where its process is
        gone without a word."""
        if self.status == "finished" and self.verdict:
            stamp = ", overridden" if self.metrics.get("gate_overridden") else ""
            return f"{self.verdict}{stamp}"
        words = {"stopped": "STOPPED", "died": "DIED"}
        return words.get((self.failure or {}).get("kind", ""), self.status.upper())

    def _repr_markdown_(self) -> str:
        lines = [f"**{self.badge}.** {self.error or self.summary}"]
        return "\n".join([*lines, "", *(f"- {reason}" for reason in self.reasons)])

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able dict. NaN and infinities become None, each with a line under "notes"."""
        notes = list(self.notes)
        return {**_plain(dataclasses.asdict(self), "", notes), "notes": notes}

    def write(self, path: str | Path) -> Path:
        """Write to `path`, or to `path`/results.json where it is a folder; never half a file.

        Raises RecordError if a value is not of its type."""
        target, data = _file(path), self.to_dict()
        RunRecord.from_dict(data, where=str(target))
        text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)
        write_atomic(target, text + "\n")
        return target

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a results.json (or the one in the folder `path`).

        Raises RecordError that says what is wrong with it; unknown keys are left out."""
        source = _file(path)
        try:
            data = read_json(source)
        except OSError as error:
            raise RecordError(f"{source}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise RecordError(f"{source}: is not valid JSON ({error})") from error
        return cls.from_dict(data, where=str(source))

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "results") -> Self:
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != 2:
            raise RecordError(
                f"{where}: schema_version is {version!r}, this program reads 2; "
                "run its notebook again, or update fresnel if a newer one wrote it"
            )
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise RecordError(f"{where}: {error}") from error


def _file(path: str | Path) -> Path:
    return Path(path) / RESULTS_NAME if Path(path).is_dir() else Path(path)


def _plain(value: Any, where: str, notes: list[str]) -> Any:
    """`value` as JSON's own types; what JSON cannot say (NaN, infinity) as None, with a note."""
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        value = value.tolist()
    if isinstance(value, Mapping):
        dot = where and f"{where}."
        return {str(key): _plain(item, f"{dot}{key}", notes) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, f"{where}[{i}]", notes) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        notes.append(f"{where} was {value}; stored as null")
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


class Recorder:
    """Collects a run's `record` while it goes on. Made by `start()`.

    What is recorded after the end, by cells that are run once more, reopens it: the files stay as
    they are until `finish` is called again. `alone`: no runner watches this process.
    """

    def __init__(self, record: RunRecord, output_dir: Path) -> None:
        self.output_dir, self.record, self.alone = output_dir, record, False
        self._clock, self._energy = time.perf_counter(), EnergyMeter()
        self._open: list[PeakMemory] = []
        self._stages: dict[str, tuple[float, Stage]] = {}
        self._reopened, self._alive = False, contextlib.ExitStack()
        with contextlib.suppress(OSError):  # where there are no locks, its number tells
            lock = output_dir / RUNNING_NAME
            if self._alive.enter_context(locked(lock, wait=False)):  # else the runner has it
                self.alone = True
                self._alive.callback(lock.unlink, missing_ok=True)
        self._save()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block and watch its memory. Stages may nest; each counts its own whole time.
        One that is run again replaces that of its name."""
        self._change()
        peak = PeakMemory()
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
            done = Stage(name, duration, peak.close(), peak.cuda, failed)
            self._stages[name] = begun, done
            # in order of beginning: the outer one before its inner ones
            stages = sorted(self._stages.values(), key=lambda entry: entry[0])
            self.record = self.record.replace(stages=tuple(stage for _, stage in stages))
            self._save()

    def metric(self, name: str, value: Any) -> None:
        """Record one measured value: number, text, or a JSON-like structure of them."""
        self.metrics({name: value})

    def metrics(self, values: Mapping[str, Any]) -> None:
        self._change(metrics={**self.record.metrics, **values})

    def dataset(self, dataset: Any) -> None:
        """Record which data the run used or made: `content_hash`, `path`, length of `dataset`."""
        path = _relative(Path(dataset.path), project_root())
        entry = {"content_hash": dataset.content_hash, "path": path, "objects": len(dataset)}
        known = [other for other in self.record.provenance["datasets"] if other != entry]
        self._change(provenance={**self.record.provenance, "datasets": [*known, entry]})
        self.input(dataset.path)

    def input(self, path: str | Path) -> None:
        """Declare a file or folder that the run depends on, or that it made: the run is used again
        only while its content is as it is now. What parameters name counts by itself."""
        place, known = Path(path).resolve(), self.record.provenance
        inputs = {**known.get("inputs", {}), str(place): digest(place, self.output_dir)}
        self._change(provenance={**known, "inputs": inputs})
        self._save()

    def uses(self, cards: str, processes: int) -> None:
        """Record that several processes do the work, and on what (`machine.cards`)."""
        more = {"processes": processes, "gpu": cards}
        self._change(provenance={**self.record.provenance, **more})

    def thumbnail(self, image: Any, *, longest_px: int = 480) -> Path:
        """Save `image` as the run's picture in the index.

        image: (H, W, 3), (H, W, 4) or (H, W), uint8; a TypeError else."""
        from PIL import Image

        path = save_thumbnail(Image.fromarray(image), self.output_dir, longest_px)
        self.artifact("thumbnail", path)
        return path

    def artifact(self, name: str, path: str | Path) -> None:
        """Name a file that the run made. Paths below the output folder are kept relative to it."""
        kept = _relative(Path(path), self.output_dir)
        self._change(artifacts={**self.record.artifacts, name: kept})

    def note(self, text: str) -> None:
        """Add a line that a reader should see beside the results."""
        self._change(notes=(*self.record.notes, text))

    def finish(self, verdict: Verdict, summary: str, reasons: Sequence[str] = ()) -> RunRecord:
        """State the verdict (one of VERDICTS), a one-paragraph summary and the named reasons."""
        if verdict not in VERDICTS:
            raise ValueError(f"verdict: got {verdict!r}, want one of {', '.join(VERDICTS)}")
        said = {"summary": summary, "reasons": tuple(map(str, reasons))}
        self._change(status="finished", verdict=verdict, **said)
        self._save()
        self.release()
        return self.record

    def crash(self, error: str, kind: str, cell: int | None = None) -> RunRecord:
        """State that the run ended without a verdict; see `RunRecord` for the words."""
        self._change(status="crashed", error=error, failure={"kind": kind, "cell": cell})
        self._save()
        return self.record

    def release(self) -> None:
        """Let go of what marks the run as going on."""
        self._energy.close()
        self._alive.close()

    def _change(self, **changes: Any) -> None:
        if self.record.status != "running":
            self._reopened = True
            again: dict[str, Any] = {"verdict": None, "error": None, "failure": None}
            self.record = self.record.replace(status="running", **again)
        self.record = self.record.replace(**changes)

    def _fold_cuda_peaks(self) -> None:
        # torch keeps one process-wide peak: hand it to every open stage, then begin anew
        if device := cuda():
            peak = int(device.max_memory_allocated())
            for watch in self._open:
                watch.cuda = max(watch.cuda or 0, peak)
            device.reset_peak_memory_stats()

    def _save(self) -> None:
        duration, stages = time.perf_counter() - self._clock, self.record.stages
        rate = self.record.metrics.get("samples_per_s")
        cuda_peaks = [s.peak_cuda_bytes for s in stages if s.peak_cuda_bytes is not None]
        resources = {
            "peak_rss_bytes": max((stage.peak_rss_bytes for stage in stages), default=None),
            "peak_cuda_bytes": max(cuda_peaks, default=None),
            "samples_per_s": float(rate) if isinstance(rate, (int, float)) else None,
            "energy": self._energy.read(),
        }
        cost = self.record.price_per_hour_usd * duration / 3600.0
        self.record = self.record.replace(resources=resources, duration_s=duration, cost_usd=cost)
        if not (self._reopened and self.record.status == "running"):
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
    made_by = provenance(seed if seed is not None else params.get("seed"))
    record = RunRecord(
        *(name, "running"),
        name=name,
        params=dict(params),
        provenance={**made_by, "process": process()},
        started_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        price_per_hour_usd=float(price_per_hour_usd),
    )
    return Recorder(record, folder.resolve())


def process() -> dict[str, Any]:
    """What names this process."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def is_dead(folder: Path, record: RunRecord) -> bool:
    """Whether a run's process is gone before its report was complete; of another machine's run
    nobody can tell."""
    said, lock = record.provenance.get("process") or {}, folder / RUNNING_NAME
    if said.get("host") != socket.gethostname():
        return False
    if not lock.exists():
        return record.status == "running" and not psutil.pid_exists(said["pid"])
    with own(lock) as free:
        return bool(free)


def slug(name: str) -> str:
    """A run's name as its folder has it."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"


def new_run_dir(reports_dir: str | Path, name: str) -> Path:
    """Make reports_dir/runs/<UTC time>-<name>, a folder of its own even for runs begun at once."""
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{slug(name)}"
    for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
        folder = Path(reports_dir) / "runs" / f"{stem}{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def _relative(path: Path, root: Path) -> str:
    resolved, base = path.resolve(), root.resolve()
    return str(resolved.relative_to(base)) if resolved.is_relative_to(base) else str(path)
