"""The original experiment's report against what this project measures: tables and verdicts.

Everything is computed from the `results.json` of finished runs; a missing run makes a claim
"open", never "confirmed".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fresnel.evaluate import format_rows

ROLES = ("01-original", "01-corrected", "02-control", "02-corrected", "03-control", "03-corrected")
"""Names of the runs that the analysis reads, as the profiles give them."""

Runs = Mapping[str, dict[str, Any] | None]


def original() -> dict[str, Any]:
    """The original experiment in the numbers of its own report."""
    text = (resources.files("fresnel") / "assets" / "original_experiment.json").read_text()
    return json.loads(text)


def runs_table(runs: Runs) -> str:
    """One line a run: verdict, what it found, time, cost (Markdown)."""
    rows = []
    for role, run in runs.items():
        if run is None:
            rows.append(
                {"run": role, "verdict": "missing", "what it found": "", "s": "", "USD": ""}
            )
            continue
        rows.append(
            {
                "run": role,
                "verdict": run["verdict"] or run["status"],
                "what it found": run["summary"],
                "s": f"{run['duration_s']:.0f}",
                "USD": f"{run['cost_usd']:.4f}",
            }
        )
    return format_rows(rows)


def cost_table(runs: Runs) -> str:
    """The original's costs beside ours, in the manner of its report (Markdown).

    Our times are wall times of the control's and the corrected run's notebooks; at a price of
    0 USD per hour (a machine one owns) the costs are 0, the times are not.
    """
    then = original()
    rows = [
        {"item": cost["item"], "then": f"{cost['hours']:g} h, ${cost['usd']:g}", "now": "-"}
        for cost in then["costs"]
    ]
    ours = {
        "Dataset generation (local)": ("01-original", "01-corrected"),
        "10-epoch test (local)": ("02-control", "02-corrected"),
        "Cloud training (150 epochs)": ("03-control", "03-corrected"),
    }
    total_s = total_usd = 0.0
    for row in rows:
        found = [run for role in ours.get(row["item"], ()) if (run := runs.get(role))]
        if found:
            seconds = sum(run["duration_s"] for run in found)
            usd = sum(run["cost_usd"] for run in found)
            row["now"] = f"{seconds:.0f} s, ${usd:.4f}"
            total_s, total_usd = total_s + seconds, total_usd + usd
    total = then["total"]
    rows.append(
        {
            "item": "Total",
            "then": f"{total['hours']:g} h, ${total['usd']:g}",
            "now": f"{total_s:.0f} s, ${total_usd:.4f}",
        }
    )
    return format_rows(rows)


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


def claims(runs: Runs) -> list[dict[str, str]]:
    """The original's claims, what these runs measured, and what follows: one dict a claim.

    ``verdict`` is "confirmed", "refuted", "open" (not decided by these runs), with the figures
    that decide it under ``measured``.
    """
    texts = {claim["id"]: claim["claim"] for claim in original()["claims"]}
    gate, control, mended = (runs.get(r) for r in ("01-original", "03-control", "03-corrected"))
    rows = []

    def say(name: str, verdict: str, measured: str) -> None:
        rows.append({"claim": texts[name], "measured": measured, "verdict": verdict})

    figures = gate["metrics"].get("gate_figures", {}) if gate else {}
    pivot, identity = figures.get("pivot_distance"), figures.get("identity_psnr")
    if gate and pivot is not None:
        coverage = gate["metrics"]["coverage_ratio"]
        say(
            "decoder",
            "open" if gate["verdict"] != "FAIL" else "refuted in part",
            f"The cameras orbit a point {pivot:.1f} units away from the object: the views cover "
            f"{coverage:.2f} of their input's area, whatever the decoder"
            + (
                f"; from the input camera it reproduces the input at {identity:.1f} dB"
                if identity
                else ""
            )
            + ". How much the decoder adds is the attribution experiment's question.",
        )
    else:
        say("decoder", "open", "no run measured where the cameras point")
    light = gate["metrics"].get("luminance_ratio") if gate else None
    if light is not None:
        empty = gate["metrics"]["empty_views"] if gate else float("nan")
        say(
            "exposure",
            "refuted" if light > 0.4 else "open",
            f"{empty:.0%} of the views are empty; covered pixels have {light:.2f} of the input's "
            f"luminance. Brightening emptiness gives emptiness.",
        )
    else:
        say("exposure", "open", "no covered pixel to measure")
    if control:
        metrics = control["metrics"]
        say(
            "loss",
            "confirmed, and misleading",
            f"The control's loss fell {metrics['loss_fall']:.1f}-fold while its held-out views "
            f"hold {metrics['luminance_ratio']:.2f} of the true light.",
        )
    else:
        say("loss", "open", "the control did not run")
    if mended:
        metrics = mended["metrics"]
        good = 0.8 <= metrics["luminance_ratio"] <= 1.25
        say(
            "viable",
            "refuted for light and area" if good else "open",
            f"With the pivot at the object and a gate, held-out views hold "
            f"{metrics['luminance_ratio']:.2f} of the true light and "
            f"{metrics['coverage_ratio']:.2f} of the area, at {metrics['psnr']:.1f} dB. "
            f"Sharpness is another question.",
        )
    else:
        say("viable", "open", "the corrected run is missing")
    say("early", "confirmed" if gate and gate["verdict"] == "FAIL" else "open", first_refusal(runs))
    return rows


def claims_table(runs: Runs) -> str:
    """`claims` as a Markdown table."""
    return format_rows(claims(runs))
