"""Where the original's hours and dollars went, when it could have ended, and what our runs cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import pandas as pd

_EXAMPLES = 10
"""Images that the gate looks at before the rest is made."""


def original() -> dict[str, Any]:
    """The original experiment in the numbers of its report (assets/original_experiment.json)."""
    return json.loads((resources.files("fresnel") / "assets/original_experiment.json").read_text())


def spans() -> pd.DataFrame:
    """The original's items in order: what, began and ended (hours), usd (each its own), and what
    could have been seen then."""
    found = pd.DataFrame(original()["costs"])
    found["ended"] = found.hours.cumsum()
    found["began"] = found.ended - found.hours
    return found.rename(columns={"item": "what"})


def refused_after_s(runs: Sequence[dict[str, Any]]) -> list[float]:
    """When the gate ends the original, seconds after its start, for each run of the gate: ten
    images made at its own pace, then the gate's time.  A gate that passes it never does."""
    then = original()
    making = 3600 * then["costs"][0]["hours"] * _EXAMPLES / then["dataset"]["images"]
    return [
        making + run["gate_duration_s"] if run["verdict"] == "FAIL" else math.inf for run in runs
    ]


def priced(runs: pd.DataFrame, price_per_hour_usd: float = 0.0) -> pd.DataFrame:
    """Runs with "usd", at this price an hour, or (0) each at its own, and when they "began" and
    "ended" (seconds since 1970)."""
    price = price_per_hour_usd or runs.price_per_hour_usd
    began = pd.to_datetime(runs.started_utc, utc=True, format="ISO8601")
    began = (began - pd.Timestamp(0, tz="UTC")).dt.total_seconds()
    return runs.assign(
        usd=runs.duration_s / 3600 * price, began=began, ended=began + runs.duration_s
    )


def table(runs: pd.DataFrame, price_per_hour_usd: float = 0.0) -> pd.DataFrame:
    """By notebook: runs, hours and dollars of the control, the corrected run, and of all."""
    known = priced(runs, price_per_hour_usd)
    parts = {
        "the control": known[known.role.str.endswith(("-original", "-control"))],
        "the corrected run": known[known.role.str.endswith("-corrected")],
        "all runs": known,
    }
    rows = {}
    for name, part in parts.items():
        sums = part.groupby("notebook")[["duration_s", "usd"]].sum()
        sums.loc["in all"] = sums.sum()
        rows[name] = [f"{duration(s)}, ${usd:.2f}" for s, usd in sums.itertuples(index=False)]
        rows[name] = pd.Series(rows[name], index=sums.index)
    found = pd.DataFrame(rows).fillna("-")
    order = [*sorted(n for n in found.index if n != "in all"), "in all"]
    return found.loc[order].rename_axis("notebook").reset_index()


def held_s(runs: pd.DataFrame) -> float:
    """How long the runs held their machines: those that shared one cost its time once."""
    total = 0.0
    known = priced(runs)
    machine = [json.dumps([p.get("cpu"), p.get("gpu")], sort_keys=True) for p in known.provenance]
    for _, part in known.groupby(machine):
        until = -math.inf
        for began, ended in sorted(zip(part.began, part.ended, strict=True)):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
    return total


def stages(runs: pd.DataFrame) -> pd.DataFrame:
    """By notebook and stage: how many, and their time, from the runs' ledgers."""
    rows = [
        {"notebook": run.notebook, "stage": stage["name"], "seconds": stage["duration_s"]}
        for _, run in runs.iterrows()
        for stage in run.stages
    ]
    if not rows:
        return pd.DataFrame(columns=["notebook", "stage", "runs", "time"])
    sums = pd.DataFrame(rows).groupby(["notebook", "stage"]).seconds.agg(["count", "sum"])
    sums = sums.reset_index().sort_values(["notebook", "sum"], ascending=[True, False])
    sums["time"] = sums["sum"].map(duration)
    return sums.rename(columns={"count": "runs"})[["notebook", "stage", "runs", "time"]]


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
