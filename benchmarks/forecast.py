"""Did 02's forecasts come true? What 03 spent beside what was forecast, run by run.

    python benchmarks/forecast.py [RUNS ...] [--out benchmarks]

RUNS are folders with runs in them (reports/runs, where the main job and studies leave theirs). Each
03 that had a forecast becomes a row of forecast_gpu.json or forecast_cpu.json, by name and commit,
and forecast.md is written anew from both.
"""

import argparse
import json
from pathlib import Path
from typing import Any

AIM = 0.15
HERE = Path(__file__).resolve().parent


def off(actual: float, forecast: float) -> str:
    error = actual / forecast - 1
    return f"{error:+.0%}" if abs(error) <= AIM else f"**{error:+.0%}**"


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: one line a run, then the parts of each."""
    lines = ["| run | forecast, s | actual, s | error | memory forecast, MB | actual | error |"]
    lines += ["|:--" + "|--:" * 6 + "|"]
    for name, row in rows.items():
        plan, spent = row["plan"], row["spent"]
        cells = [name]
        for key, scale in (("duration_s", 1.0), ("peak_memory_bytes", 1e-6)):
            cells += [f"{found[key] * scale:,.1f}" for found in (plan, spent)]
            cells += [off(spent[key], plan[key])]
        lines.append(f"| {' | '.join(cells)} |")
    for name, row in rows.items():
        planned, spent = row["plan"]["parts"], row["spent"]["parts"]
        parts = [f"{part} {planned[part]:.1f} / {spent.get(part, 0.0):.1f}" for part in planned]
        lines += ["", f"{name}, forecast / actual, s: {', '.join(parts)}"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("runs", nargs="*", type=Path, default=[HERE.parent / "reports" / "runs"])
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    paths = {kind: arguments.out / f"forecast_{kind}.json" for kind in ("gpu", "cpu")}
    kept = {k: json.loads(p.read_text()) if p.exists() else {} for k, p in paths.items()}
    for path in sorted(p for runs in arguments.runs for p in runs.glob("*/results.json")):
        run = json.loads(path.read_text())
        if planned := run["metrics"].get("planned"):
            commit = ((run["provenance"].get("git") or {}).get("commit") or "")[:7]
            kind = "gpu" if run["provenance"].get("gpu") else "cpu"
            row = {"plan": planned, "spent": run["metrics"]["spent"]}
            kept[kind][f"{run['name']} {commit}".strip()] = row
    text = ["# Forecasts of notebook 02 against the runs of 03", "", f"Wanted: within {AIM:.0%}."]
    for kind, rows in kept.items():
        if rows:
            paths[kind].write_text(json.dumps(rows, indent=1) + "\n")
            text += ["", f"## {kind.upper()}", "", *table(rows)]
    (arguments.out / "forecast.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
