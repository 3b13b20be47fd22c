"""Cost avoided by the gate: the price of trainings that a verdict forbade.

Definition. A FAIL of the gate and a NO-GO of the smoke test forbid one training, that of their
data. (A REFUSED training forbids none: it wants the verdict first.) What it would have cost is a
smoke test's forecast: measured throughput, full number of steps. Avoided is that forecast less what
reaching the verdict cost, never below 0. Where no smoke test has made a forecast, nothing is
claimed.

Over many runs each dataset's training is counted once, whoever forbade it and however often; and
not at all where the data was trained on in spite of it, as a control: that money was spent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fresnel.report.record import RunRecord


def cost_avoided(record: RunRecord, others: Iterable[RunRecord] = ()) -> dict[str, Any] | None:
    """The `cost_avoided` of a run's record; None for a run whose verdict forbids no training.

    others: runs whose forecast may stand in where the run made none itself; the newest of the same
    data is taken, else the newest of any."""
    if not _forbids(record):
        return None
    dataset = _dataset(record)
    forecast, basis = _forecast(record), "this run's forecast"
    if forecast is None:
        made = [other for other in others if _forecast(other) is not None]
        made.sort(key=lambda o: (bool(dataset) and _dataset(o) == dataset, o.started_utc))
        if made:
            forecast = _forecast(made[-1])
            basis = f"the forecast of {made[-1].name or made[-1].notebook}, {made[-1].started_utc}"
        else:
            basis = "no smoke test has made a forecast yet"
    seconds = None if forecast is None else float(forecast["duration_s"])
    # at this run's price: the training would have run on this machine
    usd = None if seconds is None else seconds * record.price_per_hour_usd / 3600.0
    return {
        "dataset": dataset,
        "forecast_s": seconds,
        "forecast_usd": usd,
        "spent_s": record.duration_s,
        "spent_usd": record.cost_usd,
        "duration_s": None if seconds is None else max(0.0, seconds - record.duration_s),
        "usd": None if usd is None else max(0.0, usd - record.cost_usd),
        "basis": basis,
    }


def total_avoided(records: Iterable[RunRecord]) -> dict[str, Any]:
    """The sum over runs: {"usd", "duration_s", "trainings"}, and the same in "trained_anyway" for
    what was trained on in spite of the verdict, as a control, and so was not avoided.

    Of several verdicts on one dataset the one that saved most counts: it came first."""
    best: dict[str, dict[str, Any]] = {}
    anyway: set[str] = set()
    for number, record in enumerate(records):
        dataset = _dataset(record)
        if dataset and _trained(record):
            anyway.add(dataset)
        entry = record.cost_avoided
        if entry is None or entry["duration_s"] is None:
            continue
        key = entry["dataset"] or f"run {number}"
        if key not in best or entry["duration_s"] > best[key]["duration_s"]:
            best[key] = entry

    def total(entries: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "usd": sum(entry["usd"] for entry in entries),
            "duration_s": sum(entry["duration_s"] for entry in entries),
            "trainings": len(entries),
        }

    avoided = total([entry for key, entry in best.items() if key not in anyway])
    return {**avoided, "trained_anyway": total([e for key, e in best.items() if key in anyway])}


def _forbids(record: RunRecord) -> bool:
    of_gate = record.verdict == "FAIL" and "gate_codes" in record.metrics
    return record.status == "finished" and (of_gate or record.verdict == "NO-GO")


def _trained(record: RunRecord) -> bool:
    """Whether this run was a full training; a smoke test makes a forecast of one instead."""
    return record.resources["samples_per_s"] is not None and _forecast(record) is None


def _dataset(record: RunRecord) -> str | None:
    datasets = record.provenance.get("datasets") or []
    return datasets[0]["content_hash"] if datasets else None


def _forecast(record: RunRecord) -> dict[str, Any] | None:
    forecast = record.metrics.get("forecast")
    fits = isinstance(forecast, dict) and isinstance(forecast.get("duration_s"), (int, float))
    return forecast if fits else None
