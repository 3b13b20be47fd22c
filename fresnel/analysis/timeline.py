"""Where the original's hours and dollars went, when it could have ended, and what ours cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fresnel.analysis.claims import Runs, original
from fresnel.evaluation.metrics import format_rows

_TO = "\N{WORD JOINER}\N{EN DASH}\N{WORD JOINER}"
EXAMPLES = 10
"""Images that the gate looks at before the rest is made."""
_OURS = {
    "Dataset generation (local)": "01",
    "10-epoch test (local)": "02",
    "Cloud training (150 epochs)": "03",
    "Download + analysis": "04",
}
"""The original's items and the notebooks that do the same work."""


def first_refusal(runs: Runs) -> str:
    """When the gate says no to the original's data, in words."""
    run = runs.get("01-original")
    if run is None:
        return "The gate's run on the original's data is missing."
    if run["verdict"] != "FAIL":
        return f"The gate did NOT refuse the original's data: {run['summary']}"
    seconds = run["metrics"].get("gate_duration_s")
    took = f"in {seconds:.1f} s, " if seconds is not None else ""
    return (
        f"The gate refused the original's data {took}on the first examples, "
        f"{run['duration_s']:.0f} s after the notebook began. "
        f"Its first reason: {run['reasons'][0]}."
    )


def first_stop(runs: Runs) -> dict[str, float]:
    """When the gate would have stopped the original: ten of its 500 images, and the gate's time.

    Returns:
        "hours" from its start at its own pace (one hour for 500 images), "hours_saved",
        "usd_saved"; NaN where no gate ran.
    """
    then, run = original(), runs.get("01-original")
    gate_s = run["metrics"].get("gate_duration_s") if run else None
    if gate_s is None or (run and run["verdict"] != "FAIL"):
        return {"hours": math.nan, "hours_saved": math.nan, "usd_saved": math.nan}
    making = then["costs"][0]["hours"] * EXAMPLES / then["dataset"]["images"]
    hours = making + gate_s / 3600
    return {
        "hours": hours,
        "hours_saved": then["total"]["hours"] - hours,
        "usd_saved": then["total"]["usd"],
    }


def spans() -> list[dict[str, Any]]:
    """The original's items as spans of time: "what", "began", "ended" (hours), "usd" (its own),
    and "warning", what stood there to be seen."""
    warnings = {
        "Dataset generation (local)": "every view is there to be looked at",
        "10-epoch test (local)": "dark outputs: a warning sign, ignored",
        "Cloud setup + upload": "",
        "Cloud training (150 epochs)": "the loss converges; the samples are black",
        "Download + analysis": "somebody looks",
    }
    found, began = [], 0.0
    for cost in original()["costs"]:
        ended = began + cost["hours"]
        found.append(
            {
                "what": cost["item"],
                "began": began,
                "ended": ended,
                "usd": cost["usd"],
                "warning": warnings[cost["item"]],
            }
        )
        began = ended
    return found


def timeline_table(runs: Runs) -> str:
    """Where each of the original's hours and dollars went, and where it would have ended."""
    stop, rows, usd = first_stop(runs), [], 0.0
    for span in spans():
        usd += span["usd"]
        here = span["began"] <= stop["hours"] < span["ended"]
        rows.append(
            {
                "hours": f"{span['began']:.2f}{_TO}{span['ended']:.2f}",
                "what": span["what"],
                "USD by then": f"{usd:.0f}",
                "what could be seen": span["warning"],
                "the gate": f"stops it after {3600 * stop['hours']:.0f}\N{NO-BREAK SPACE}s"
                if here
                else "",
            }
        )
    return format_rows(rows)


def ours(runs: Runs) -> dict[str, float]:
    """What our control and our corrected run took, seconds: all of their notebooks."""
    found = {}
    for name, roles in (
        ("our control, refused and run all the same", ("01-original", "02-control", "03-control")),
        ("our corrected run", ("01-corrected", "02-corrected", "03-corrected")),
    ):
        seconds = [run["duration_s"] for role in roles if (run := runs.get(role))]
        if seconds:
            found[name] = sum(seconds)
    return found


def describe_timeline(runs: Runs) -> str:
    """Alternative text of the timeline."""
    stop = first_stop(runs)
    parts = [
        f"{span['what']}: {span['ended'] - span['began']:g} h, ${span['usd']:g}" for span in spans()
    ]
    ending = (
        f"The gate would have stopped it {3600 * stop['hours']:.0f} s after its start, at $0."
        if math.isfinite(stop["hours"])
        else "No gate has run on the original's data."
    )
    return f"The original's time and money. {'; '.join(parts)}. {ending}"


def cost_table(runs: Runs, everything: Mapping[str, Any], price_per_hour_usd: float = 0.0) -> str:
    """The original's costs beside ours, in the manner of its report (Markdown).

    Args:
        runs: the main job's: the control up to its outputs, and the corrected run.
        everything: every finished run by name (`comparison.newest_runs`).
        price_per_hour_usd: of all of them; 0: each at the price that it was run at.
    """
    then = original()
    control = {k: r for k, r in runs.items() if r and k.endswith(("-original", "-control"))}
    mended = {k: r for k, r in runs.items() if r and k.endswith("-corrected")}
    columns = {
        "ours: the control": control,
        "ours: corrected": mended,
        f"ours: all {len(everything)} runs": everything,
    }
    rows = []
    for item in [*then["costs"], {"item": "Total", **then["total"]}]:
        row = {"item": item["item"], "the original": f"{item['hours']:g} h, ${item['usd']:g}"}
        notebook = _OURS.get(item["item"], "0" if item["item"] == "Total" else "none")
        for column, chosen in columns.items():
            found = [r for r in chosen.values() if r["notebook"].startswith(notebook)]
            row[column] = _cost(found, price_per_hour_usd)
        rows.append(row)
    return format_rows(rows)


def occupied(everything: Mapping[str, Any], price_per_hour_usd: float = 0.0) -> str:
    """What the tables' sums leave out: runs that shared a machine cost its time once, in words."""
    spans: dict[str, list[tuple[float, float, float]]] = {}
    for run in everything.values():
        began = datetime.fromisoformat(run["started_utc"]).timestamp()
        price = price_per_hour_usd or run["price_per_hour_usd"]
        known = run["provenance"]
        machine = json.dumps([known.get("cpu"), known.get("gpu")], sort_keys=True)
        spans.setdefault(machine, []).append((began, began + run["duration_s"], price / 3600))
    seconds = usd = 0.0
    for runs in spans.values():
        until = -math.inf
        for began, ended, rate in sorted(runs):
            new = max(0.0, ended - max(began, until))
            seconds, usd, until = seconds + new, usd + new * rate, max(until, ended)
    alone = sum(run["duration_s"] for run in everything.values())
    return (
        f"One after another the {len(everything)} runs would have held a machine for "
        f"{_time(alone)}; as they shared it, it was held for {_time(seconds)}, at ${usd:.2f}."
    )


def stages_table(everything: Mapping[str, Any], price_per_hour_usd: float = 0.0) -> str:
    """Every stage of every run, summed by notebook and stage, from their ledgers (Markdown)."""
    sums: dict[tuple[str, str], list[float]] = {}
    for run in everything.values():
        staged = 0.0
        rate = (price_per_hour_usd or run["price_per_hour_usd"]) / 3600
        for stage in run["stages"]:
            staged += stage["duration_s"]
            _add(sums, (run["notebook"], stage["name"]), stage["duration_s"], rate)
        rest = max(run["duration_s"] - staged, 0.0)
        _add(sums, (run["notebook"], "(between stages)"), rest, rate)
    rows = [
        {
            "notebook": notebook,
            "stage": stage,
            "runs": f"{count:.0f}",
            "time": _time(seconds),
            "USD": f"{usd:.2f}",
        }
        for (notebook, stage), (count, seconds, usd) in sorted(
            sums.items(), key=lambda item: (item[0][0], -item[1][1])
        )
    ]
    return format_rows(rows) or "No run has finished."


def _add(
    sums: dict[tuple[str, str], list[float]], key: tuple[str, str], seconds: float, rate: float
) -> None:
    entry = sums.setdefault(key, [0, 0.0, 0.0])
    entry[0] += 1
    entry[1] += seconds
    entry[2] += seconds * rate


def _cost(runs: list[Any], price_per_hour_usd: float) -> str:
    if not runs:
        return "-"
    seconds = sum(run["duration_s"] for run in runs)
    usd = sum(
        run["duration_s"] / 3600 * (price_per_hour_usd or run["price_per_hour_usd"]) for run in runs
    )
    return f"{_time(seconds)}, ${usd:.2f}"


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
