"""Where the original's hours and dollars went, when it could have ended, and what our runs cost."""

import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import pandas as pd


def original() -> dict[str, Any]:
    """The original experiment in the numbers of its report (assets/original_experiment.json)."""
    return json.loads((resources.files("fresnel") / "assets/original_experiment.json").read_text())


def spans() -> pd.DataFrame:
    """The original's items in order: what, hours, began and ended (hours), usd (each its own), and
    what could have been seen then."""
    found = pd.DataFrame(original()["costs"]).rename(columns={"item": "what"})
    ended = found.hours.cumsum()
    return found.assign(ended=ended, began=ended - found.hours)


def refused_after_s(runs: Sequence[dict[str, Any]]) -> list[float]:
    """When the gate ends the original, seconds after its start, for each run of the gate: ten
    images made at its own pace, then the gate's time.  A gate that passes it never does."""
    then = original()
    making = 3600 * then["costs"][0]["hours"] * 10 / then["dataset"]["images"]
    return [making + r["gate_duration_s"] if r["verdict"] == "FAIL" else math.inf for r in runs]


def table(runs: pd.DataFrame, price_per_hour_usd: float = 0.0) -> pd.DataFrame:
    """By notebook: runs, hours and dollars of the control, the corrected run, and of all; at this
    price an hour, or (0) each at its own."""
    known = runs.assign(
        usd=runs.duration_s / 3600 * (price_per_hour_usd or runs.price_per_hour_usd)
    )
    parts = {"the control": ("-original", "-control"), "the corrected run": "-corrected"}
    rows = {}
    for name, ends in {**parts, "all runs": ""}.items():
        sums = known[known.role.str.endswith(ends)].groupby("notebook")[["duration_s", "usd"]].sum()
        sums.loc["in all"] = sums.sum()
        rows[name] = sums.duration_s.map(duration) + ", $" + sums.usd.map("{:.2f}".format)
    found = pd.DataFrame(rows).fillna("-").sort_index()
    order = [*found.index.drop("in all"), "in all"]
    return found.loc[order].rename_axis("notebook").reset_index()


def held_s(runs: pd.DataFrame) -> float:
    """How long the runs held their machines: those that shared one cost its time once."""
    if runs.empty:
        return 0.0
    began = pd.to_datetime(runs.started_utc, utc=True, format="ISO8601").map(pd.Timestamp.timestamp)
    machine = [f"{p.get('cpu')} {p.get('gpu')}" for p in runs.provenance]
    known = pd.DataFrame({"began": began, "ended": began + runs.duration_s}).sort_values("began")
    before = known.ended.groupby(pd.Series(machine, runs.index)).transform(
        lambda ended: ended.cummax().shift(fill_value=-math.inf)
    )
    return float((known.ended - known.began.clip(lower=before)).clip(lower=0).sum())


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
