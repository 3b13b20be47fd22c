import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pynvml
import pytest

from fresnel.host import meters
from fresnel.report import provenance, record
from fresnel.report.index import cost_avoided, index, total_avoided
from fresnel.report.record import RecordError, RunRecord

ROOT = Path(__file__).resolve().parent.parent


def read(folder: Path) -> dict:
    """The results.json there, which must be JSON: without NaN."""
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def test_a_run_leaves_what_the_issue_asks_for(tmp_path: Path) -> None:
    run = record.start("01_x.ipynb", {"seed": 3, "lr": 1e-4}, tmp_path, price_per_hour_usd=3600.0)
    with run.stage("outer"), run.stage("inner"):
        time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), run.stage("bad"):
        raise ZeroDivisionError
    data = read(tmp_path)
    assert (data["status"], data["verdict"]) == ("running", None), "if it died here"
    assert [s["failed"] for s in data["stages"]] == [False, False, True]
    run.metric("psnr", np.float32(21.5))
    run.metrics({"bins": np.arange(3), "samples_per_s": 12.5})
    run.metrics({"a": {"b": [1.0, float("nan")]}, "c": np.float64("inf")})
    with pytest.raises(ValueError, match=r"verdict: got 'MAYBE', want one of PASS"):
        run.finish("MAYBE", "")  # type: ignore[arg-type]
    done = run.finish("PASS", "All well.", ["because"])
    data = read(tmp_path)
    assert (data["notebook"], data["status"], data["verdict"]) == ("01_x", "finished", "PASS")
    assert data["metrics"] == {
        **{"psnr": 21.5, "bins": [0, 1, 2], "samples_per_s": 12.5},
        **{"a": {"b": [1.0, None]}, "c": None},
    }
    lost = ["metrics.a.b[1] was nan; stored as null", "metrics.c was inf; stored as null"]
    assert data["notes"] == lost and data["schema_version"] == 2
    assert [stage["name"] for stage in data["stages"]] == ["outer", "inner", "bad"]
    assert all(s["duration_s"] >= 0.02 for s in data["stages"][:2])
    peaks = [stage["peak_rss_bytes"] for stage in data["stages"]]
    assert min(peaks) > 1 << 20 and done.resources["peak_rss_bytes"] == max(peaks)
    assert data["cost_usd"] == pytest.approx(data["duration_s"])
    assert data["provenance"]["seed"] == 3
    assert data["provenance"]["packages"]["numpy"] == np.__version__
    assert done.badge == "PASS" and RunRecord.read(tmp_path).to_dict() == done.to_dict()
    energy = done.resources["energy"]
    assert done.resources["samples_per_s"] == 12.5 and (energy["joules"] or energy["reason"])
    with run.stage("bad"):
        run.metrics({"psnr": 22.0})
    assert read(tmp_path) == data, "what cells that run again record counts from the next end on"
    again = run.finish("FAIL", "Once more.")
    assert RunRecord.read(tmp_path).badge == "FAIL" and again.metrics["psnr"] == 22.0
    assert [(s.name, s.failed) for s in again.stages[2:]] == [("bad", False)]
    crashed = run.crash("It broke.", "cell_error", 3)
    assert (crashed.badge, crashed.verdict, read(tmp_path)["error"]) == (
        "CRASHED",
        None,
        "It broke.",
    )


def test_folders_of_runs_and_the_products_that_make_no_checkout_dirty(tmp_path: Path) -> None:
    folders = {record.new_run_dir(tmp_path, "a b/c").name for _ in range(3)}
    assert len(folders) == 3 and all("a-b-c" in name for name in folders)
    assert not [name for name in provenance.git_state()["changed"] if name.startswith("reports")]


def test_the_dataset_is_named_by_its_hash(tmp_path: Path) -> None:
    class Data(list):
        path, content_hash = tmp_path / "d", "sha256:ab"

    run = record.start("x", {}, tmp_path)
    run.dataset(Data("abc"))
    run.dataset(Data("abc"))
    entry = {"content_hash": "sha256:ab", "path": str(tmp_path / "d"), "objects": 3}
    assert read(tmp_path)["provenance"]["datasets"] == [entry]


def test_thumbnail(tmp_path: Path) -> None:
    from PIL import Image

    run = record.start("x", {}, tmp_path)
    for shape in ((6, 8), (6, 8, 3), (6, 8, 4)):
        path = run.thumbnail(np.full(shape, 128, np.uint8), longest_px=4)
        with Image.open(path) as picture:
            assert picture.size == (4, 3)
            assert np.ravel(picture.getpixel((1, 1)))[0] in (127, 128)
    assert run.record.artifacts["thumbnail"] == "thumbnail.png"
    with pytest.raises(TypeError):
        run.thumbnail(np.zeros((2, 3, 5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": None}, r"Expected `str`.*\$\.status"),
        ({"metrics": 3}, r"Expected `object`.*\$\.metrics"),
        ({"stages": [1]}, r"Expected `object`.*\$\.stages\[0\]"),
        ({"verdict": "MAYBE"}, r"Invalid enum value 'MAYBE'.*\$\.verdict"),
        ({"duration_s": -1.0}, r">= 0\.0.*\$\.duration_s"),
        ({"schema_version": 1}, "is 1, this program reads 2; run its notebook again"),
        ({"schema_version": 99}, "is 99, this program reads 2"),
    ],
)
def test_what_is_of_another_type_is_neither_written_nor_read(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good = RunRecord("x", "finished", "GO", "yes")
    good.write(tmp_path)
    with pytest.raises(RecordError, match=message):
        RunRecord.from_dict({**good.to_dict(), **change})
    with pytest.raises(RecordError):
        good.replace(**change).write(tmp_path)
    assert RunRecord.read(tmp_path) == good
    assert RunRecord.from_dict({**good.to_dict(), "later": 1}) == good


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "schema_version is None"), ("[" * 200_000, "not valid JSON")],
)
def test_a_damaged_record_says_so_and_stops_no_index(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(RecordError, match=message):
        RunRecord.read(tmp_path)
    assert "1 damaged" in index(tmp_path).read_text()


def test_published_records_are_read_and_the_types_make_a_schema() -> None:
    published = sorted((ROOT / "reports" / "published").rglob("results.json"))
    assert published and all(RunRecord.read(path).verdict for path in published)
    schema = msgspec.json.schema(RunRecord)["$defs"]["RunRecord"]
    assert set(schema["properties"]) == set(RunRecord("x", "running").to_dict())


def test_a_badge_says_how_a_run_ended(tmp_path: Path) -> None:
    running = record.start("x", {}, tmp_path).record
    assert running.badge == "RUNNING"
    stopped = RunRecord("x", "crashed", failure={"kind": "stopped", "cell": 1})
    assert stopped.badge == "STOPPED"
    assert stopped.replace(failure={"kind": "died", "cell": None}).badge == "DIED"
    assert stopped.replace(failure={"kind": "cell_error", "cell": 1}).badge == "CRASHED"


def test_a_run_is_dead_when_nobody_holds_its_lock(tmp_path: Path) -> None:
    run = record.start("x", {}, tmp_path)
    host = run.record.provenance["process"]["host"]
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    gone = run.record.replace(provenance={"process": {"pid": ended.pid, "host": host}})
    assert not record.is_dead(tmp_path, gone), "whatever number its process had, it holds the lock"
    run.finish("DONE", "")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert record.is_dead(tmp_path, gone), "an older run, which had no lock"
    assert not record.is_dead(tmp_path, run.record)
    (tmp_path / record.RUNNING_NAME).touch()
    assert record.is_dead(tmp_path, run.record), "its report was not complete"
    elsewhere = {"process": {"pid": ended.pid, "host": "another machine"}}
    assert not record.is_dead(tmp_path, gone.replace(provenance=elsewhere))


def fake_nvml(energy: list[int]) -> Any:
    """Two cards, of what `pynvml` says: an energy in mJ, if any."""

    def answer(found: bool, number: int = 0) -> int:
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return number

    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: answer(index < 2, index),
        nvmlDeviceGetHandleByUUID=lambda uuid: answer(uuid == "GPU-1"),
        nvmlDeviceGetTotalEnergyConsumption=lambda _: answer(bool(energy), *energy),
    )


def test_energy_is_read_from_counters_that_wrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the last is a part of the first package: not counted twice
    for name, energy in ("0", 9_000_000), ("1", 0), ("0:0", 0):
        folder = tmp_path / f"intel-rapl:{name}"
        folder.mkdir()
        (folder / "max_energy_range_uj").write_text("10000000\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
    read = [1_000]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    meter = meters.EnergyMeter(tmp_path, fake_nvml(read))
    (tmp_path / "intel-rapl:0/energy_uj").write_text("1500000")  # beyond 10 J it began again
    read[0] = 4_000
    energy = meter.read()
    assert energy["cpu_joules"] == pytest.approx(2.5, abs=1e-5)
    assert energy["gpu_joules"] == 6.0  # 3 J on each card
    assert energy["joules"] == pytest.approx(8.5, abs=1e-5) and energy["reason"] is None
    assert energy["source"] == "NVML counter of 2 GPU(s) + RAPL counter of 2 CPU package(s)"
    meter.close()

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,7")
    one = meters.EnergyMeter(tmp_path / "none", fake_nvml(read))
    read[0] = 6_000
    energy = one.read()
    assert energy["joules"] == energy["gpu_joules"] == 2.0 and "RAPL" in energy["reason"]
    nothing = meters.EnergyMeter(tmp_path / "none", fake_nvml([])).read()
    assert nothing["joules"] is None and nothing["source"] is None
    assert "no energy counter" in nothing["reason"] and "RAPL" in nothing["reason"]


def finished(notebook: str, verdict: Any, data: str, day: int, **metrics: Any) -> RunRecord:
    return RunRecord(
        *(notebook, "finished", verdict),
        provenance={"datasets": [{"content_hash": data, "path": data, "objects": 1}]},
        metrics=metrics,
        resources={"samples_per_s": metrics.get("samples_per_s")},
        price_per_hour_usd=3600.0,
        cost_usd=10.0,
        duration_s=10.0,
        started_utc=f"2026-01-0{day}T00:00:00+00:00",
    )


def test_cost_avoided_is_the_forecast_less_what_the_verdict_cost() -> None:
    smoke = finished("02", "NO-GO", "bad", 1, forecast={"duration_s": 100.0}, samples_per_s=1.0)
    own = cost_avoided(smoke)
    assert own is not None
    assert (own["duration_s"], own["usd"], own["dataset"]) == (90.0, 90.0, "bad")
    gate = finished("01", "FAIL", "bad", 2, gate_codes=["pivot"])
    none = cost_avoided(gate)
    assert none is not None and none["usd"] is None and "no smoke test" in none["basis"]
    other = finished("02", "GO", "good", 3, forecast={"duration_s": 5.0})
    found = cost_avoided(gate, [smoke, other])
    assert found is not None and found["duration_s"] == 90.0 and "2026-01-01" in found["basis"]
    for permitted in (other, finished("03", "FAIL", "good", 4), finished("03", "REFUSED", "x", 4)):
        assert cost_avoided(permitted, [smoke]) is None

    smoke, gate = smoke.replace(cost_avoided=own), gate.replace(cost_avoided=found)
    total = total_avoided([smoke, gate, gate, other])
    assert (total["usd"], total["duration_s"], total["trainings"]) == (90.0, 90.0, 1)
    control = finished("03", "FAIL", "bad", 5, samples_per_s=1.0)
    total = total_avoided([smoke, gate, other, control])
    assert (total["usd"], total["trainings"]) == (0, 0)
    assert total["trained_anyway"]["usd"] == 90.0
