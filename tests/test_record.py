from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pynvml
import pytest

from fresnel.host import meters
from fresnel.report import costs, provenance, record
from fresnel.report.record import RecordError, RunRecord

ROOT = Path(__file__).resolve().parent.parent


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_run_leaves_what_the_issue_asks_for(tmp_path: Path) -> None:
    run = record.start("01_x.ipynb", {"seed": 3, "lr": 1e-4}, tmp_path, price_per_hour_usd=3600.0)
    with run.stage("outer"), run.stage("inner"):
        time.sleep(0.02)
    run.metric("psnr", np.float32(21.5))
    run.metrics({"bins": np.arange(3), "name": "x"})
    done = run.finish("PASS", "All well.", ["because"])
    data = read(tmp_path)
    wanted = "notebook status verdict params metrics provenance stages cost_usd schema_version"
    assert set(wanted.split()) <= data.keys()
    assert (data["notebook"], data["status"], data["verdict"]) == ("01_x", "finished", "PASS")
    assert data["metrics"] == {"psnr": 21.5, "bins": [0, 1, 2], "name": "x"}
    assert [stage["name"] for stage in data["stages"]] == ["outer", "inner"]
    assert all(s["duration_s"] >= 0.02 and s["peak_rss_bytes"] > 1 << 20 for s in data["stages"])
    assert data["cost_usd"] == pytest.approx(data["duration_s"])
    assert data["provenance"]["seed"] == 3
    assert data["provenance"]["packages"]["numpy"] == np.__version__
    assert done.badge == "PASS"


def test_reading_gives_back_what_was_written(tmp_path: Path) -> None:
    run = record.start("x", {"a": [1, 2]}, tmp_path)
    with run.stage("s"):
        pass
    done = run.finish("NO-GO", "No.", ["r1", "r2"])
    assert RunRecord.read(tmp_path) == done


def test_the_dataset_is_named_by_its_hash(tmp_path: Path) -> None:
    class Data(list):
        path, content_hash = tmp_path / "d", "sha256:ab"

    run = record.start("x", {}, tmp_path)
    run.dataset(Data("abc"))
    run.dataset(Data("abc"))
    entry = {"content_hash": "sha256:ab", "path": str(tmp_path / "d"), "objects": 3}
    assert read(tmp_path)["provenance"]["datasets"] == [entry]


def test_nan_and_infinity_become_null_with_a_note(tmp_path: Path) -> None:
    run = record.start("x", {}, tmp_path)
    run.metric("a", {"b": [1.0, float("nan")]})
    run.metric("c", np.float64("inf"))
    run.finish("DONE", "")
    data = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert data["metrics"] == {"a": {"b": [1.0, None]}, "c": None}
    assert any("metrics.a.b[1] was nan" in note for note in data["notes"])
    assert any("metrics.c was inf" in note for note in data["notes"])


def test_a_run_that_dies_leaves_its_finished_stages(tmp_path: Path) -> None:
    run = record.start("x", {}, tmp_path)
    with pytest.raises(ZeroDivisionError), run.stage("bad"):
        raise ZeroDivisionError
    data = read(tmp_path)
    assert data["status"] == "running" and data["verdict"] is None
    assert data["stages"][0]["failed"] is True


def test_a_finished_record_is_closed(tmp_path: Path) -> None:
    run = record.start("x", {}, tmp_path)
    with pytest.raises(ValueError, match=r"verdict: got 'MAYBE', want one of PASS"):
        run.finish("MAYBE", "")
    run.finish("GO", "")
    with pytest.raises(RecordError, match="already finished"):
        run.metric("late", 1)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (6, 8, 4)])
def test_thumbnail(tmp_path: Path, shape: tuple[int, ...]) -> None:
    from PIL import Image

    run = record.start("x", {}, tmp_path)
    path = run.thumbnail(np.full(shape, 0.5, np.float32), longest_px=4)
    with Image.open(path) as picture:
        assert picture.size == (4, 3)
    assert run.record.artifacts["thumbnail"] == "thumbnail.png"
    with pytest.raises(ValueError, match=r"image: got shape \(2, 3, 5\)"):
        run.thumbnail(np.zeros((2, 3, 5)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"notebook": "x"}', "lacks status"),
        ('{"notebook": "x", "status": "odd"}', "status must be one of"),
        ('{"notebook": "x", "status": "finished", "metrics": 3}', "metrics must be object"),
        ('{"notebook": "x", "status": "finished", "stages": [1]}', r"stages\[0\] must be object"),
        ('{"notebook": "x", "status": "finished", "schema_version": 99}', "newer than"),
    ],
)
def test_damaged_records_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RecordError, match=message):
        RunRecord.read(tmp_path)


def test_a_deeply_nested_record_is_damaged_and_stops_nothing(tmp_path: Path) -> None:
    from fresnel.report.index import index

    (tmp_path / "runs" / "deep").mkdir(parents=True)
    (tmp_path / "runs" / "deep" / "results.json").write_text("[" * 200_000)
    with pytest.raises(RecordError, match="not valid JSON"):
        RunRecord.read(tmp_path / "runs" / "deep")
    assert "1 damaged" in index(tmp_path).read_text()


def test_a_badge_says_how_a_run_ended(tmp_path: Path) -> None:
    running = record.start("x", {}, tmp_path).record
    assert running.badge == "RUNNING"
    process = dict(running.provenance["process"])
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    gone = {**running.provenance, "process": {**process, "pid": ended.pid}}
    assert running.replace(provenance=gone).badge == "DIED"
    elsewhere = {"process": {"pid": ended.pid, "host": "another machine"}}
    assert running.replace(provenance=elsewhere).badge == "RUNNING"
    stopped = RunRecord("x", "crashed", failure={"kind": "stopped", "cell": 1})
    assert stopped.badge == "STOPPED"
    assert stopped.replace(failure={"kind": "cell_error", "cell": 1}).badge == "CRASHED"


def test_the_schema_is_valid_and_says_what_the_code_says() -> None:
    import jsonschema

    schema = json.loads(record.SCHEMA.read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    properties = schema["properties"]
    assert set(properties["verdict"]["enum"]) == {*record.VERDICTS, None}
    assert properties["schema_version"]["const"] == record.SCHEMA_VERSION
    written = RunRecord("x", "running").to_dict()
    assert set(schema["required"]) == set(properties) == set(written)
    jsonschema.validate(written, schema)


def test_what_does_not_fit_the_schema_is_not_written(tmp_path: Path) -> None:
    good = RunRecord("x", "finished", "GO", "yes")
    good.write(tmp_path)
    for bad, message in [
        (good.replace(verdict="MAYBE"), "verdict must be one of"),
        (good.replace(duration_s=-1.0), "duration_s must be bigger"),
        (good.replace(started_utc="yesterday"), "started_utc must match"),
        (good.replace(failure={"kind": "tired", "cell": 1}), "failure.kind must be one of"),
        (good.replace(cached={"commit": "ab"}), "cached lacks reused_utc, computed_utc, dirty"),
    ]:
        with pytest.raises(RecordError, match=message):
            bad.write(tmp_path)
    assert RunRecord.read(tmp_path) == good


def test_records_of_version_1_are_upgraded() -> None:
    stages = [
        {"name": "a", "duration_s": 1.0, "peak_rss_bytes": 5, "peak_cuda_bytes": 7, "failed": False}
    ]
    old = {"notebook": "x", "status": "crashed", "error": "boom", "schema_version": 1}
    new = RunRecord.from_dict({**old, "stages": stages, "metrics": {"samples_per_s": 3}})
    assert new.schema_version == record.SCHEMA_VERSION and new.cached is None
    assert new.failure == {"kind": "cell_error", "cell": None}
    assert (new.resources["peak_rss_bytes"], new.resources["peak_cuda_bytes"]) == (5, 7)
    assert new.resources["samples_per_s"] == 3.0
    assert new.resources["energy"]["reason"] == "not measured before version 2"
    assert RunRecord.from_dict(new.to_dict()) == new


def test_published_records_are_readable() -> None:
    published = sorted((ROOT / "reports" / "published").rglob("results.json"))
    assert published
    for path in published:
        RunRecord.read(path)


def test_a_training_run_says_what_it_took(tmp_path: Path) -> None:
    run = record.start("03_x", {}, tmp_path)
    with run.stage("train"):
        pass
    run.metric("samples_per_s", 12.5)
    resources = run.finish("PASS", "").resources
    assert resources["samples_per_s"] == 12.5
    assert resources["peak_rss_bytes"] == read(tmp_path)["stages"][0]["peak_rss_bytes"] > 1 << 20
    energy = resources["energy"]
    assert energy["joules"] is not None or energy["reason"]


def package(folder: Path, name: str, microjoules: int) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "max_energy_range_uj").write_text("10000000\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    return folder / name / "energy_uj"


class FakeNvml:
    """Two cards, of what `pynvml` says: an energy in mJ, or else a power in mW."""

    def __init__(self, energy: int | None, power: int | None) -> None:
        self.energy, self.power = energy, power

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:
        return self.answer(index if index < 2 else None)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:
        return self.answer(0 if uuid == "GPU-1" else None)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int:
        return self.answer(self.energy)

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        return self.answer(self.power)

    def answer(self, number: int | None) -> int:
        if number is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return number


def test_energy_is_read_from_counters_that_wrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = package(tmp_path, "intel-rapl:0", 9_000_000)
    package(tmp_path, "intel-rapl:1", 0)
    package(tmp_path, "intel-rapl:0:0", 0)  # a part of the first package: not counted twice
    nvml = FakeNvml(1_000, None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meter = meters.EnergyMeter(tmp_path, nvml)
    first.write_text("1500000")  # beyond 10 J the counter began again
    nvml.energy = 4_000
    energy = meter.read()
    assert energy["cpu_joules"] == pytest.approx(2.5, abs=1e-5)
    assert energy["gpu_joules"] == 6.0  # 3 J on each card
    assert energy["joules"] == pytest.approx(8.5, abs=1e-5) and energy["reason"] is None
    assert energy["source"] == "NVML counter of 2 GPU(s) + RAPL counter of 2 CPU package(s)"
    meter.close()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,7")
    sampled = meters.EnergyMeter(tmp_path / "none", FakeNvml(None, 250_000))
    time.sleep(0.02)
    energy = sampled.read()
    assert energy["joules"] == energy["gpu_joules"] >= 250 * 0.02
    assert energy["source"] == "NVML power, sampled of 1 GPU(s)" and "RAPL" in energy["reason"]
    sampled.close()

    nothing = meters.EnergyMeter(tmp_path / "none", FakeNvml(None, None)).read()
    assert nothing["joules"] is None and nothing["source"] is None
    assert "neither energy nor power" in nothing["reason"] and "RAPL" in nothing["reason"]


def finished(notebook: str, verdict: str, data: str, day: int, **more) -> RunRecord:
    metrics = more.pop("metrics", {})
    dataset = {"content_hash": data, "path": data, "objects": 1}
    return RunRecord(
        notebook, "finished", verdict, provenance={"datasets": [dataset]}, metrics=metrics,
        resources=record._resources((), metrics), price_per_hour_usd=3600.0, cost_usd=10.0,
        duration_s=10.0, started_utc=f"2026-01-0{day}T00:00:00+00:00", **more,
    )  # fmt: skip


def test_cost_avoided_is_the_forecast_less_what_the_verdict_cost() -> None:
    forecast = {"forecast": {"duration_s": 100.0, "cost_usd": 1.0}, "samples_per_s": 1.0}
    smoke = finished("02", "NO-GO", "bad", 1, metrics=forecast)
    own = costs.cost_avoided(smoke)
    assert own is not None
    assert (own["duration_s"], own["usd"], own["dataset"]) == (90.0, 90.0, "bad")
    gate = finished("01", "FAIL", "bad", 2, metrics={"gate_codes": ["pivot"]})
    none = costs.cost_avoided(gate)
    assert none is not None and none["usd"] is None and "no smoke test" in none["basis"]
    other = finished("02", "GO", "good", 3, metrics={"forecast": {"duration_s": 5.0}})
    found = costs.cost_avoided(gate, [smoke, other])
    assert found is not None and found["duration_s"] == 90.0 and "2026-01-01" in found["basis"]
    for permitted in (other, finished("03", "FAIL", "good", 4), finished("03", "REFUSED", "x", 4)):
        assert costs.cost_avoided(permitted, [smoke]) is None

    smoke, gate = smoke.replace(cost_avoided=own), gate.replace(cost_avoided=found)
    total = costs.total_avoided([smoke, gate, gate, other])
    assert (total["usd"], total["duration_s"], total["trainings"]) == (90.0, 90.0, 1)
    control = finished("03", "FAIL", "bad", 5, metrics={"samples_per_s": 1.0})
    total = costs.total_avoided([smoke, gate, other, control])
    assert (total["usd"], total["trainings"]) == (0, 0)
    assert total["trained_anyway"]["usd"] == 90.0


def test_run_folders_never_collide(tmp_path: Path) -> None:
    folders = {record.new_run_dir(tmp_path, "a b/c") for _ in range(5)}
    assert len(folders) == 5
    assert all("a-b-c" in folder.name for folder in folders)


def test_git_state_ignores_products() -> None:
    state = provenance.git_state()
    assert state.keys() == {"commit", "dirty", "changed"}
    assert not [path for path in state["changed"] if path.startswith(("reports", "runs"))]
