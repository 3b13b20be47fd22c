"""The original experiment's report against what this project measures: tables and verdicts.

Everything is computed from the `results.json` of finished runs; a missing run makes a claim
"open", never "confirmed".
"""

from __future__ import annotations

import html
import importlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fresnel.analysis.attribution import PATH_ALONE
from fresnel.analysis.comparison import (
    BINS,
    Estimate,
    Run,
    Study,
    difference,
    in_bin,
    loss_cell,
    mean,
)
from fresnel.evaluation.metrics import format_rows

ROLES = {
    "01-original": "01-original-B-s0",
    "01-corrected": "01-bootstrap-B-s0",
    "02-control": "02-original-B-s0",
    "02-corrected": "02-bootstrap-B-s0",
    "03-control": "03-original-s0",
    "03-corrected": "03-gated-s0",
}
"""Names of the runs that the analysis reads, as the profiles give them, and which run of
notebooks/params/study.yaml speaks where the main job has not."""

Runs = Mapping[str, Run | None]


def original() -> dict[str, Any]:
    """The original experiment in the numbers of its own report."""
    text = (resources.files("fresnel") / "assets" / "original_experiment.json").read_text()
    return json.loads(text)


def roles(everything: Mapping[str, Run], prefix: str = "") -> dict[str, Run | None]:
    """The run of every role among `comparison.newest_runs`; None where there is none.

    Args:
        prefix: of the main job's names.
    """
    return {
        role: everything.get(prefix + role) or everything.get(stand_in)
        for role, stand_in in ROLES.items()
    }


def pictures(runs: Runs, artifact: str, rows: int) -> dict[str, Any]:
    """The upper rows of a contact sheet of every run that left it beside its results: role -> RGB.

    A published run may be its results.json alone."""
    from PIL import Image

    from fresnel.study.protocol import crop_rows

    found = {}
    for role, run in runs.items():
        path = Path(run["folder"], run["artifacts"].get(artifact, "-")) if run else None
        if path and path.is_file():
            with Image.open(path) as sheet:
                found[role] = crop_rows(sheet, rows)
    return found


def summary(
    runs: Runs, found: Mapping[str, Any] | None, study: Study, reached: Sequence[Any]
) -> str:
    """The analysis in three or four sentences.

    Args:
        found: what `attribution.attribute` returned, or None.
        reached: what `targets.targets` returned.
    """
    from fresnel.analysis.timeline import first_refusal

    parts = [first_refusal(runs)]
    if found:
        share = _percent(found["light"]["factors"]["path"])
        parts.append(f"The camera path accounts for {share} of the lost light.")
    mended, control = (
        _seeds_or(study, arm, runs.get(role))
        for arm, role in (("gated", "03-corrected"), ("original", "03-control"))
    )
    if mended and control:
        light = [
            mean([r["metrics"]["luminance_ratio"] for r in seen]) for seen in (mended, control)
        ]
        parts.append(
            f"On held-out objects the corrected run's views hold {light[0]:.2f} of the true light, "
            f"the control's {light[1]:.2f} ({_count(mended)} and {len(control)})."
        )
    met = sum(target.verdict == "met" for target in reached)
    missed = sum(target.verdict.startswith("missed") for target in reached)
    open_ = len(reached) - met - missed
    parts.append(f"Targets: {met} met, {missed} missed, {open_} not run.")
    return " ".join(parts)


def runs_table(runs: Runs) -> str:
    """One line a run: verdict, what it found, time, cost (Markdown)."""
    rows = []
    for role, run in runs.items():
        if run is None:
            rows.append(
                {"run": role, "verdict": "missing", "what it found": "", "s": "", "USD": ""}
            )
            continue
        stands_in = "" if run["name"].endswith(role) else f" ({run['name']})"
        rows.append(
            {
                "run": role + stands_in,
                "verdict": run["verdict"] or run["status"],
                "what it found": run["summary"],
                "s": f"{run['duration_s']:.0f}",
                "USD": f"{run['cost_usd']:.4f}",
            }
        )
    return format_rows(rows)


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
        "loss": _loss(runs.get("03-control"), study or {}),
        "mask": _mask(),
        "cvs": _cvs(study or {}),
        "epochs": _epochs(runs.get("02-control")),
        "viable": _viable(runs.get("03-corrected"), study or {}),
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


def _loss(control: Run | None, study: Study) -> _Said:
    runs = _seeds_or(study, "original", control)
    if not runs:
        return "open", _OPEN
    fall, light = (
        mean([run["metrics"][name] for run in runs]) for name in ("loss_fall", "luminance_ratio")
    )
    return "confirmed, and misleading", (
        f"the control's loss fell {fall:.1f}-fold while its held-out views hold {light:.2f} of the "
        f"true light ({_count(runs)})"
    )


def _seeds_or(study: Study, arm: str, run: Run | None) -> list[Run]:
    """The study's runs of an arm, or else the main job's one."""
    return list(study.get(arm, {}).values()) or ([run] if run else [])


def _count(runs: Sequence[Run]) -> str:
    return f"{len(runs)} seed{'s' if len(runs) != 1 else ''}"


def _mask() -> _Said:
    """The original's mask where nothing was rendered, and at the edge of something."""
    from fresnel.models.cvs import CVSConfig
    from fresnel.training.losses import pixel_weights

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
    cells = [
        list(loss_cell(study, "corrected", *cell).values())
        for cell in (("laplacian", "onestep"), ("alpha", "consistency"))
    ]
    if not all(cells):
        return "open", _OPEN
    theirs, ours = ([in_bin(run, "cvs", "all", "psnr") for run in runs] for runs in cells)
    gain = mean(ours) - mean(theirs)
    words = (
        f"on the same corrected data its network and mask reach {mean(theirs):.1f} dB, ours "
        f"{mean(ours):.1f} ({len(theirs)} and {len(ours)} seeds)"
    )
    return ("refuted in part" if gain > 0.5 else "confirmed"), words


def _epochs(smoke: Run | None) -> _Said:
    if not smoke:
        return "open", _OPEN
    words = (
        f"after {smoke['duration_s']:.0f} s the smoke test says {smoke['verdict']}: "
        f"{smoke['reasons'][0] if smoke['reasons'] else smoke['summary']}"
    )
    return ("refuted" if smoke["verdict"] == "NO-GO" else "open"), words


def _viable(mended: Run | None, study: Study) -> _Said:
    runs = _seeds_or(study, "gated", mended)
    if not runs:
        return "open", _OPEN
    light, area, psnr = (
        mean([run["metrics"][name] for run in runs])
        for name in ("luminance_ratio", "coverage_ratio", "psnr")
    )
    return ("refuted for light and area" if 0.8 <= light <= 1.25 else "open"), (
        f"held-out views hold {light:.2f} of the true light and {area:.2f} of the area, at "
        f"{psnr:.1f} dB ({_count(runs)}); sharpness is another question"
    )


def _external(study: Study) -> _Said:
    if not {"gated", "oracle"} <= study.keys():
        return "open", _OPEN
    where, gap = _furthest_behind(study, "gated", "oracle")
    words = (
        f"in the bin where it is furthest behind ({where} degrees) the gated bootstrap is "
        f"{gap.text(2, '+')} dB against true views of the same objects"
    )
    verdict = "refuted" if gap.low > -0.5 else "confirmed" if gap.high < -0.5 else "open"
    if {"rest50-gated", "rest50-oracle"} <= study.keys():
        _, worst = _furthest_behind(study, "rest50-gated", "rest50-oracle")
        words += f"; where its decoder saw 50 objects, {worst.text(2, '+')} dB at most"
        if verdict == "refuted" and worst.low <= -0.5:
            verdict = "refuted where the decoder has seen enough"
    return verdict, words


def _furthest_behind(study: Study, ours: str, theirs: str) -> tuple[str, Estimate]:
    """The bin in which an arm falls furthest behind another, and by how much."""
    gaps = {b: difference(study[ours], study[theirs], b) for b in BINS}
    where = min(gaps, key=lambda b: gaps[b].mean)
    return where, gaps[where]


def _early(runs: Runs) -> _Said:
    from fresnel.analysis.timeline import first_refusal

    gate = runs.get("01-original")
    return ("confirmed" if gate and gate["verdict"] == "FAIL" else "open"), first_refusal(runs)


LESSONS = (
    (
        "Look at ten examples before making the rest.",
        "fresnel.gate.verdict.validate",
        "01_validate_data makes no full set unless the gate passes its ten examples",
    ),
    (
        "Say what the cameras orbit.",
        "fresnel.scene.cameras.orbit",
        "a pivot has no default; the gate's first check is where the object is (pivot_offset)",
    ),
    (
        "Emptiness is not darkness: keep alpha beside colour.",
        "fresnel.gate.checks.check_empty",
        "empty views are never reported as under-exposed",
    ),
    (
        "No training on data that nobody has approved.",
        "fresnel.gate.receipts.require_receipt",
        "train.fit refuses without a passing receipt of exactly these files",
    ),
    (
        "A falling loss says nothing about its targets.",
        "fresnel.study.protocol.smoke_verdict",
        "a smoke test's GO needs outputs with the targets' light, and targets with the inputs'",
    ),
    (
        "Ask what a cloud run would cost before renting it.",
        "fresnel.training.forecast.full_run",
        "02_smoke_train states time and price of the full run",
    ),
    (
        "Weigh what matters: an empty pixel must not weigh most.",
        "fresnel.training.losses.pixel_weights",
        "alpha-aware weights give the object a stated share of the loss",
    ),
    (
        "Judge by held-out truth, beside what costs nothing.",
        "fresnel.evaluation.metrics.baselines",
        "every table shows copy-input, mean image and black image",
    ),
    (
        "Blame a part only after exchanging it.",
        "fresnel.analysis.attribution.factorial",
        "all 16 combinations are rendered before a factor is named",
    ),
)
"""Rule, the function that enforces it, and how."""


def lessons_table() -> str:
    """The rules, each linked to its check as `enforcement` shows it (Markdown)."""
    rows = [
        {
            "rule": rule,
            "enforced by": f"[`{function.removeprefix('fresnel.')}`](#{_anchor(function)})",
            "how": how,
        }
        for rule, function, how in LESSONS
    ]
    return format_rows(rows)


def enforcement() -> str:
    """The code of every check that a lesson names, folded, as HTML with an anchor each.

    The page holds it, rather than point to a file: it works offline, wherever the report goes, and
    shows the check as it was when the report was made.
    """
    parts = []
    for _, function, _ in LESSONS:
        module, _, name = function.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        _, line = inspect.getsourcelines(found)
        code = html.escape(inspect.getsource(inspect.unwrap(found)))
        parts.append(
            f"<details class='fold'><summary><code>{function}</code>, "
            f"{module.replace('.', '/')}.py, line {line}</summary>"
            f"<pre id='{_anchor(function)}' tabindex='0'>{code}</pre></details>"
        )
    return "\n".join(dict.fromkeys(parts))


def _anchor(function: str) -> str:
    return "check-" + function.replace(".", "-").replace("_", "-")


def citation(provenance: Mapping[str, Any], started_utc: str = "") -> str:
    """How to cite this analysis: in words, and as BibTeX, with version, commit and date."""
    from fresnel import __version__

    commit = str((provenance.get("git") or {}).get("commit") or "unknown")[:12]
    title = "How a Gaussian bootstrap went black: an autopsy by experiment"
    year, month = (started_utc[:4] or "n.d."), started_utc[5:7]
    entry = {
        "title": "{How a {G}aussian bootstrap went black: an autopsy by experiment}",
        "author": "{{The fresnel contributors}}",
        "year": f"{{{year}}}",
        **({"month": f"{{{int(month)}}}"} if month else {}),
        "version": f"{{{__version__}}}",
        "note": f"{{Notebook 04\\_analyze\\_negative\\_results, commit {commit}}}",
    }
    lines = "\n".join(f"  {key:<7} = {value}," for key, value in entry.items())
    return (
        f"The fresnel contributors ({year}). *{title}.* fresnel {__version__}, notebook "
        f"04_analyze_negative_results, commit {commit}.\n\n"
        f"```bibtex\n@software{{fresnel_autopsy,\n{lines}\n}}\n```"
    )
