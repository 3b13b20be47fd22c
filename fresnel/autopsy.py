"""The original experiment's report against what this project measures: tables and verdicts.

Everything is computed from the `results.json` of finished runs; a missing run makes a claim
"open", never "confirmed".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from fresnel.attribution import PATH_ALONE
from fresnel.comparison import Study, difference, in_bin, mean
from fresnel.evaluate import AZIMUTH_BINS, format_rows

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


def claims(
    runs: Runs, found: Mapping[str, Any] | None = None, study: Study | None = None
) -> list[dict[str, str]]:
    """The original's claims, claim by claim: what it said, the test, the measurement, the verdict.

    Args:
        runs: the main job's, by role.
        found: what `attribution.attribute` returned; None: not measured.
        study: the arms', see `comparison.study_runs`.

    Returns:
        One dict a claim: "id", "claim", "test", "measured", "verdict" ("confirmed", "refuted" or
        "open", with a qualification where it needs one).
    """
    measured = {
        "decoder": _decoder(found),
        "frontal": _frontal(study or {}),
        "exposure": _exposure(found),
        "loss": _loss(runs.get("03-control")),
        "mask": _mask(),
        "cvs": _cvs(study or {}),
        "epochs": _epochs(runs.get("02-control")),
        "viable": _viable(runs.get("03-corrected")),
        "external": _external(study or {}),
        "early": _early(runs),
    }
    rows = []
    for claim in original()["claims"]:
        verdict, words = measured[claim["id"]]
        rows.append({**claim, "measured": words, "verdict": verdict})
    return rows


def claims_table(rows: Sequence[Mapping[str, str]]) -> str:
    """What `claims` returned as a Markdown table."""
    return format_rows(
        [
            {
                "what it said": row["claim"],
                "the test": row["test"],
                "the measurement": row["measured"],
                "verdict": f"**{row['verdict']}**",
            }
            for row in rows
        ]
    )


_OPEN = "no run measured it"
_Said = tuple[str, str]


def _decoder(found: Mapping[str, Any] | None) -> _Said:
    if not found:
        return "open", _OPEN
    light = found["light"]["factors"]
    decoder, path = light["decoder"], light["path"]
    words = (
        f"of the light that the original's views lack and the mended ones have, the decoder's "
        f"training accounts for {_percent(decoder)}, the camera path for {_percent(path)}"
    )
    alone = next((cell for cell in found["cells"] if cell["cell"] == PATH_ALONE), None)
    if alone is not None:
        said = ", ".join(alone["codes"]) or "nothing"
        words += (
            f". With the path alone mended the views hold {alone['light']:.2f} of the input's "
            f"light; what the gate then still objects to: {said}"
        )
    if _certain(decoder["share_high"], below=0.5) and path["share"] > 0.5:
        return "refuted as the cause of darkness", words
    return ("confirmed" if decoder["share"] > 0.5 else "open"), words


def _exposure(found: Mapping[str, Any] | None) -> _Said:
    if not found:
        return "open", _OPEN
    entry = found["light"]["factors"]["exposure"]
    words = (
        f"exposure accounts for {_percent(entry)} of the light; normalising it and nothing else "
        f"gains {entry['alone']:.2f} of the input's light: brightened emptiness is empty"
    )
    return ("refuted" if _certain(entry["share_high"], below=0.1) else "open"), words


def _certain(value: float | None, *, below: float) -> bool:
    return value is not None and math.isfinite(value) and value < below


def _percent(entry: Mapping[str, float]) -> str:
    text = f"{100 * entry['share']:.0f} %"
    if not math.isfinite(entry["share_low"]):
        return text
    return f"{text} [{100 * entry['share_low']:.0f}, {100 * entry['share_high']:.0f}]"


def _frontal(study: Study) -> _Said:
    runs = list(study.get("decoder-frontal", {}).values())
    if not runs:
        return "open", _OPEN
    near, far = (
        [
            in_bin(run, "decoder-frontal", b, "psnr") - in_bin(run, "copy_input", b, "psnr")
            for run in runs
        ]
        for b in ("0-30", "90-180")
    )
    words = (
        f"against copying the input it is {mean(near):+.1f} dB within 30 degrees and "
        f"{mean(far):+.1f} dB beyond 90 ({len(runs)} seeds)"
    )
    return ("confirmed" if mean(near) - mean(far) > 1 else "refuted"), words


def _loss(control: dict[str, Any] | None) -> _Said:
    if not control:
        return "open", _OPEN
    metrics = control["metrics"]
    return "confirmed, and misleading", (
        f"the control's loss fell {metrics['loss_fall']:.1f}-fold while its held-out views hold "
        f"{metrics['luminance_ratio']:.2f} of the true light"
    )


def _mask() -> _Said:
    """The original's mask where nothing was rendered, and at the edge of something."""
    from fresnel.cvs import CVSConfig
    from fresnel.cvs_task import pixel_weights

    depth = torch.zeros(1, 16, 16)
    depth[..., 8:] = 2.5
    config = CVSConfig(loss_weight="depth_laplacian")
    weight = pixel_weights(config, torch.zeros(1, 4, 16, 16), depth)[0, 0, 8]
    empty, edge = float(weight[2]), float(weight[8])
    return ("refuted" if empty > edge else "confirmed"), (
        f"an empty black pixel weighs {empty:.2f}, the highest weight there is; a pixel at an "
        f"object's edge {edge:.2f}"
    )


def _cvs(study: Study) -> _Said:
    names = {k: f"loss-corrected-{k}" for k in ("laplacian-onestep", "alpha-consistency")}
    if not all(name in study for name in names.values()):
        return "open", _OPEN
    theirs, ours = (
        [in_bin(run, "cvs", "all", "psnr") for run in study[name].values()]
        for name in names.values()
    )
    gain = mean(ours) - mean(theirs)
    words = (
        f"on the same corrected data its network and mask reach {mean(theirs):.1f} dB, ours "
        f"{mean(ours):.1f} ({len(theirs)} and {len(ours)} seeds)"
    )
    return ("refuted in part" if gain > 0.5 else "confirmed"), words


def _epochs(smoke: dict[str, Any] | None) -> _Said:
    if not smoke:
        return "open", _OPEN
    words = (
        f"after {smoke['duration_s']:.0f} s the smoke test says {smoke['verdict']}: "
        f"{smoke['reasons'][0] if smoke['reasons'] else smoke['summary']}"
    )
    return ("refuted" if smoke["verdict"] == "NO-GO" else "open"), words


def _viable(mended: dict[str, Any] | None) -> _Said:
    if not mended:
        return "open", _OPEN
    metrics = mended["metrics"]
    good = 0.8 <= metrics["luminance_ratio"] <= 1.25
    return ("refuted for light and area" if good else "open"), (
        f"held-out views hold {metrics['luminance_ratio']:.2f} of the true light and "
        f"{metrics['coverage_ratio']:.2f} of the area, at {metrics['psnr']:.1f} dB; "
        f"sharpness is another question"
    )


def _external(study: Study) -> _Said:
    if not {"gated", "oracle"} <= study.keys():
        return "open", _OPEN
    worst = min(
        (difference(study["gated"], study["oracle"], b), b) for b, _ in AZIMUTH_BINS
    )  # the bin in which the bootstrap falls furthest behind
    (gap, low, high), where = worst
    words = (
        f"in the bin where it is furthest behind ({where} degrees) the gated bootstrap is "
        f"{gap:+.2f} dB [{low:+.2f}, {high:+.2f}] against true views of the same objects"
    )
    return ("refuted" if low > -0.5 else "confirmed" if high < -0.5 else "open"), words


def _early(runs: Runs) -> _Said:
    gate = runs.get("01-original")
    return ("confirmed" if gate and gate["verdict"] == "FAIL" else "open"), first_refusal(runs)


# --- the original's hours, and what follows ----------------------------------------------------


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
    making = then["costs"][0]["hours"] * 10 / then["dataset"]["images"]
    hours = making + gate_s / 3600
    return {
        "hours": hours,
        "hours_saved": then["total"]["hours"] - hours,
        "usd_saved": then["total"]["usd"],
    }


def timeline_table(runs: Runs) -> str:
    """Where each of the original's hours and dollars went, and where it would have ended."""
    stop, rows = first_stop(runs), []
    hours = usd = 0.0
    for cost in original()["costs"]:
        began = hours
        hours, usd = hours + cost["hours"], usd + cost["usd"]
        here = began <= stop["hours"] < hours
        rows.append(
            {
                "hours": f"{began:.2f} - {hours:.2f}",
                "what": cost["item"],
                "USD by then": f"{usd:.0f}",
                "the gate": f"stops it after {3600 * stop['hours']:.0f} s" if here else "",
            }
        )
    return format_rows(rows)


LESSONS = (
    (
        "Look at ten examples before making the rest.",
        "fresnel.gate.validate",
        "01_validate_data makes no full set unless the gate passes its ten examples",
    ),
    (
        "Say what the cameras orbit.",
        "fresnel.cameras.orbit",
        "a pivot has no default; the gate's first check is where the object is (pivot_offset)",
    ),
    (
        "Emptiness is not darkness: keep alpha beside colour.",
        "fresnel.checks.check_empty",
        "empty views are never reported as under-exposed",
    ),
    (
        "No training on data that nobody has approved.",
        "fresnel.receipts.require_receipt",
        "train.fit refuses without a passing receipt of exactly these files",
    ),
    (
        "A falling loss says nothing about its targets.",
        "fresnel.experiment.smoke_verdict",
        "a smoke test's GO needs outputs with the targets' light, and targets with the inputs'",
    ),
    (
        "Ask what a cloud run would cost before renting it.",
        "fresnel.experiment.forecast",
        "02_smoke_train states time and price of the full run",
    ),
    (
        "Weigh what matters: an empty pixel must not weigh most.",
        "fresnel.cvs_task.pixel_weights",
        "alpha-aware weights give the object a stated share of the loss",
    ),
    (
        "Judge by held-out truth, beside what costs nothing.",
        "fresnel.evaluate.baselines",
        "every table shows copy-input, mean image and black image",
    ),
    (
        "Blame a part only after exchanging it.",
        "fresnel.attribution.factorial",
        "all 16 combinations are rendered before a factor is named",
    ),
)
"""Rule, the function that enforces it, and how."""


def lessons_table() -> str:
    """The rules and the checks that enforce them (Markdown)."""
    rows = [
        {"rule": rule, "enforced by": f"`{function}`", "how": how}
        for rule, function, how in LESSONS
    ]
    return format_rows(rows)


def citation(provenance: Mapping[str, Any]) -> str:
    """How to cite this analysis: a BibTeX entry with version and commit."""
    from fresnel import __version__

    commit = str((provenance.get("git") or {}).get("commit") or "unknown")[:12]
    return (
        "```bibtex\n"
        "@software{fresnel_autopsy,\n"
        "  title   = {How a {G}aussian bootstrap went black: an autopsy by experiment},\n"
        "  author  = {{The fresnel contributors}},\n"
        f"  version = {{{__version__}}},\n"
        f"  note    = {{Notebook 04\\_analyze\\_negative\\_results, commit {commit}}},\n"
        "}\n"
        "```"
    )
