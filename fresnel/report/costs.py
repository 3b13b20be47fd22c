"""Cost avoided by the gate: the price of trainings that a verdict forbade.

A FAIL of the gate and a NO-GO of the smoke test forbid one training, that of their data. (A REFUSED
training forbids none: it wants the verdict first.) What it would have cost is a smoke test's
forecast; avoided is that less what reaching the verdict cost, never below 0. Where no smoke test
has made a forecast, nothing is claimed.

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
    of_gate = record.verdict == "FAIL" and "gate_codes" in record.metrics
    if record.status != "finished" or not (of_gate or record.verdict == "NO-GO"):
        return None
    dataset = _dataset(record)
    seconds, basis = _forecast_s(record), "this run's forecast"
    if seconds is None:
        made = [other for other in others if _forecast_s(other) is not None]
        basis = "no smoke test has made a forecast yet"
        if made:
            same = [other for other in made if dataset and _dataset(other) == dataset]
            newest = max(same or made, key=lambda other: other.started_utc)
            seconds = _forecast_s(newest)
            basis = f"the forecast of {newest.name or newest.notebook}, {newest.started_utc}"
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
    anyway: set[str | None] = set()
    for number, record in enumerate(records):
        # a smoke test makes a forecast of a training instead
        if record.resources["samples_per_s"] is not None and _forecast_s(record) is None:
            anyway.add(_dataset(record))
        entry = record.cost_avoided
        if entry is not None and entry["duration_s"] is not None:
            key = entry["dataset"] or f"run {number}"
            best[key] = max(entry, best.get(key, entry), key=lambda e: e["duration_s"])

    def total(trained: bool) -> dict[str, Any]:
        entries = [entry for key, entry in best.items() if (key in anyway) == trained]
        sums = {unit: sum(entry[unit] for entry in entries) for unit in ("usd", "duration_s")}
        return {**sums, "trainings": len(entries)}

    return {**total(False), "trained_anyway": total(True)}


def _dataset(record: RunRecord) -> str | None:
    datasets = record.provenance.get("datasets") or []
    return datasets[0]["content_hash"] if datasets else None


def _forecast_s(record: RunRecord) -> float | None:
    forecast = record.metrics.get("forecast")
    seconds = forecast.get("duration_s") if isinstance(forecast, dict) else None
    return float(seconds) if isinstance(seconds, (int, float)) else None
