"""Draw train.png and the README's memory table from train_gpu.json and train_cpu.json.

    python benchmarks/train_figure.py [--from benchmarks] [--readme README.md]

One row a machine: samples/s of the CVS lever by lever, views/s of the decoder, and peak memory
against the batch, with and without gradient checkpointing. In the README, what stands between
`<!-- memory -->` and `<!-- /memory -->` is written anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

AIMS = {"cvs": 1000, "decoder": 3000}  # samples/s and views/s on one H100
MARKS = ("<!-- memory -->", "<!-- /memory -->")


def levers(section: dict[str, Any], key: str) -> dict[str, float]:
    """Rates by lever, in the order measured."""
    figures = section.get("figures", {})
    return {n: v[key] for n, v in figures.items() if isinstance(v, dict) and key in v}


def memory(section: dict[str, Any]) -> dict[tuple[str, int], dict[int, list[float | None]]]:
    """(size, pixels) -> batch -> peak GB and samples/s, plain and with checkpointing."""
    found: dict[tuple[str, int], dict[int, list[float | None]]] = {}
    for name, cells in section.get("figures", {}).items():
        size, pixels, batch = name.split("/")
        numbers = [None if cell == "-" else float(cell.replace(",", "")) for cell in cells]
        found.setdefault((size, int(pixels)), {})[int(batch)] = numbers
    return found


def machines(folder: Path) -> dict[str, dict[str, Any]]:
    paths = {kind: folder / f"train_{kind}.json" for kind in ("gpu", "cpu")}
    return {kind: json.loads(path.read_text()) for kind, path in paths.items() if path.exists()}


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, grid = plt.subplots(
        len(found), 3, figsize=(13, 3.4 * len(found)), layout="constrained", squeeze=False
    )
    for axes, (kind, record) in zip(grid, found.items(), strict=True):
        sections = record["sections"]
        for axis, name, key, unit in (
            (axes[0], "cvs", "samples_per_s", "CVS, samples/s"),
            (axes[1], "decoder", "views_per_s", "decoder, views/s"),
        ):
            rates = levers(sections.get(name, {}), key)
            bars = axis.barh(list(rates), list(rates.values()), color="tab:blue")
            axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.22)
            axis.set_title(unit)
            axis.tick_params(axis="y", labelsize=8)
            if kind == "gpu":
                axis.axvline(AIMS[name], color="tab:red", linestyle=":", label="wanted")
                axis.legend(frameon=False, fontsize=8)
        for colour, ((size, pixels), rows) in enumerate(memory(sections.get("memory", {})).items()):
            for column, line, text in ((0, "o-", ""), (2, "s--", ", checkpointing")):
                points = [(b, row[column]) for b, row in rows.items() if row[column] is not None]
                if points:
                    axes[2].loglog(
                        *zip(*points, strict=True), line, color=f"C{colour}",
                        label=f"{size}, {pixels} px{text}",
                    )  # fmt: skip
        axes[2].set(title="peak memory, GB", xlabel="samples at a time")
        if axes[2].lines:
            axes[2].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        axes[2].grid(alpha=0.3)
        for side in (axes[2].xaxis, axes[2].yaxis):  # plain numbers, and few of them
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter("{x:g}")
            side.set_minor_formatter("")
        axes[0].set_ylabel(record["machine"].split(", torch")[0], fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: peak memory by network, size and batch, with and without checkpointing."""
    lines = [
        "| on | network | px | samples at a time | peak memory, GB | with `checkpointing` |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for kind, record in found.items():
        for (size, pixels), rows in memory(record["sections"].get("memory", {})).items():
            for batch, (plain, _, less, _) in rows.items():
                cells = ["does not fit" if gb is None else f"{gb:.2f}" for gb in (plain, less)]
                lines.append(
                    f"| {kind.upper()} | `{size}` | {pixels} | {batch} | {' | '.join(cells)} |"
                )
    return "\n".join(lines)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--from", dest="folder", type=Path, default=here)
    parser.add_argument("--out", type=Path, default=here / "train.png")
    parser.add_argument("--readme", type=Path, default=here.parent / "README.md")
    arguments = parser.parse_args()
    found = machines(arguments.folder)
    if not found:
        raise SystemExit(f"{arguments.folder}: no train_gpu.json or train_cpu.json")
    draw(found, arguments.out)
    text = arguments.readme.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise SystemExit(f"{arguments.readme}: lacks {' ... '.join(MARKS)}")
    arguments.readme.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
