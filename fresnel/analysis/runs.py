"""Finished runs as tables: a row a run, and a row a figure of a training."""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fresnel.evaluation.metrics import EXTRA, RATIOS
from fresnel.host.files import read_json
from fresnel.report.index import TABLE_NAME, read_table

TABLE = TABLE_NAME
"""Every run's results.json, one a line, without what only its own page needs."""
ROLES = {
    "01-original": "01-original-B",
    "01-corrected": "01-bootstrap-B",
    "02-control": "02-original-B",
    "02-corrected": "02-bootstrap-B",
    "03-control": "03-original",
    "03-corrected": "03-gated",
}
"""The main job's runs, and the step of notebooks/params/study.yaml that does the same."""
OWN = "own"
"""The predictor of a figure: what the run trained, whatever its kind."""
_COLUMNS = [
    *("notebook", "step", "seed", "role", "verdict", "summary", "reasons", "params", "metrics"),
    *("stages", "artifacts", "provenance", "started_utc", "duration_s", "price_per_hour_usd"),
    *("cost_usd", "folder"),
]
_METRICS = ("psnr", "psnr_white", "psnr_foreground", "ssim", *EXTRA, *RATIOS)
_KEYS = ["arm", "metric", "predictor", "bin", "seed"]


def read(folder: str | Path, prefix: str = "", domain: str = "") -> pd.DataFrame:
    """The newest run of each name below a folder that finished and was not refused: of every
    results.json, and of every `TABLE`, which is how a study is published (reports/published/study).

    Args:
        prefix: what the names of the main job's runs start with.
        domain: of the main job's runs those of "objects" or "faces" alone.

    Returns:
        A row a run, by name: columns of results.json, and
        step: the study's step without its seed ("03-gated"), also of the main job's runs where no
            study has that step; a run that is neither is its own step;
        seed: 0 where there is none;
        role: the main job's run that it is or, at seed 0, stands in for (`ROLES`); else "".
    """
    finished = (r for r in _records(Path(folder)) if r.get("status") == "finished")
    judged = [r for r in finished if r.get("name") and r.get("verdict") != "REFUSED"]
    if domain:
        main = {prefix + role for role in ROLES}
        other = "faces" if domain == "objects" else "objects"
        judged = [r for r in judged if r["name"] not in main or r["params"].get("domain") != other]
    ordered = sorted(reversed(judged), key=lambda run: run["started_utc"])  # results.json wins
    newest = {run["name"]: run for run in ordered}
    steps = {name: re.sub(r"-s\d+$", "", name) for name in newest}
    stands_in = {step: role for role, step in ROLES.items() if prefix + role not in newest}
    for name, record in newest.items():
        seed, role = name[len(steps[name]) + 2 :], name.removeprefix(prefix)
        record |= {"step": steps[name], "seed": int(seed or 0), "role": ""}
        if role in ROLES and name.startswith(prefix):
            record["role"] = role
            if ROLES[role] not in steps.values():
                record["step"] = ROLES[role]
        elif seed == "0":
            record["role"] = stands_in.get(steps[name], "")
    found = pd.DataFrame.from_dict(newest, orient="index", columns=_COLUMNS).sort_index()
    return found.astype({"seed": int})


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    """Every readable record below a folder, with the folder that its artifacts lie in."""
    for path in sorted(folder.rglob("results.json")):
        try:
            yield {**read_json(path), "folder": str(path.parent)}
        except (OSError, ValueError, TypeError):
            continue  # a run that is being written, or was damaged: the index says so
    for path in sorted(folder.rglob(TABLE)):
        for record in read_table(path):
            yield {**record, "folder": str(path.parent / record["name"])}


def of(runs: pd.DataFrame, step: str) -> list[dict[str, Any]]:
    """The metrics of a step's runs, one a seed, with "verdict", "summary", "reasons" and times."""
    keep = ("verdict", "summary", "reasons", "duration_s")
    rows = runs[runs.step == step].sort_values("seed").to_dict("records")
    return [row["metrics"] | {name: row[name] for name in keep} for row in rows]


def recorded(runs: pd.DataFrame, metric: str) -> list[Any]:
    """What the newest run that has it recorded as a metric, a list; [] of none."""
    rows = runs[[metric in metrics for metrics in runs.metrics]].sort_values("started_utc")
    return rows.metrics.iloc[-1][metric] if len(rows) else []


def roles(runs: pd.DataFrame) -> dict[str, pd.Series]:
    """Role -> its run, of those that there are."""
    rows = {row.role: row for _, row in runs[runs.role != ""].iterrows()}
    return {role: rows[role] for role in ROLES if role in rows}


def figures(runs: pd.DataFrame) -> pd.DataFrame:
    """What the trainings (03) showed of held-out objects.

    Returns:
        A row for each (arm, metric, predictor, bin, seed), which is the index: columns mean, low,
        high (95 %, over objects) and one an object, where values by object were kept.  An arm is a
        step without "03-"; a predictor is `OWN`, or a name as "copy_input" or "decoder render".
    """
    rows = []
    for run in runs[runs.step.str.startswith("03-")].itertuples():
        for name, summary in run.metrics.get("summaries", {}).items():
            predictor = OWN if name == run.params.get("model") else name
            for metric, entry in itertools.product(_METRICS, summary):
                if entry.get(metric) is None:
                    continue
                key = (run.step[3:], metric, predictor, entry["bin"], run.seed)
                ends = {"mean": "", "low": "_low", "high": "_high"}
                bounds = {word: entry.get(metric + end) for word, end in ends.items()}
                objects = run.metrics.get(f"{metric}_by_object", {}).get(name, {})
                rows.append(dict(zip(_KEYS, key, strict=True)) | bounds | objects.get(key[3], {}))
    found = pd.DataFrame(rows, columns=None if rows else [*_KEYS, "mean", "low", "high"])
    return found.set_index(_KEYS).astype(float).sort_index()


def pictures(runs: Mapping[str, pd.Series], artifact: str) -> dict[str, Path]:
    """Role -> the picture that its run left; a published run may have none."""
    files = {role: Path(run.folder, run.artifacts.get(artifact, "-")) for role, run in runs.items()}
    return {role: path for role, path in files.items() if path.is_file()}
