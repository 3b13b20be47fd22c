"""What lies past two cards, computed from what one card was measured at: benchmarks/beyond.md.

    python benchmarks/beyond.py [--price 2.99] [--nics 8]

Nothing here is measured: the measured figures are read from train_gpu.json and bootstrap_gpu.json,
and the model is stated beside each table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent
NVLINK_GB_S = 450.0
"""Of an H100 or H200 in one direction: 18 links of 25 GB/s each way, the 900 GB/s of its data
sheet (https://www.nvidia.com/en-us/data-center/h100/) both ways together."""
NIC_GB_S = 50.0
"""400 Gb/s, ConnectX-7 (NDR InfiniBand); a DGX H100 has one for each of its eight GPUs
(https://docs.nvidia.com/dgx/dgxh100-user-guide/)."""
A_HOST = 8  # GPUs
NETWORKS = {"large, 256 px": ("large", 81.1e6, 128), "compact, 128 px": ("compact", 6.0e6, 256)}


def all_reduce_s(size: float, cards: int, nics: float) -> float:
    """At best, of `size` bytes: 2 (n - 1) / n x size / B (NVIDIA/nccl-tests, doc/PERFORMANCE.md),
    where B is what leaves a card: NVLink's, and between hosts at most all of a host's NICs', which
    NCCL's rings use side by side."""
    bandwidth = NVLINK_GB_S if cards <= A_HOST else min(NVLINK_GB_S, nics * NIC_GB_S)
    return 2 * (cards - 1) / cards * size / (bandwidth * 1e9)


def measured() -> tuple[dict[str, float], float, float, dict[str, float]]:
    """Samples/s of whole steps by network, early; samples/s of a whole 256 px run, the mean of its
    two halves; samples that a step's fixed cost is worth; and the bootstrap's figures."""
    sections = json.loads((HERE / "train_gpu.json").read_text())["sections"]

    def cell(section: str, start: str, column: int) -> float:
        lines = sections[section]["lines"]
        line = next(line for line in lines if line.startswith(f"| {start}"))
        return float(line.split("|")[column].replace(",", ""))

    rates = {"large": cell("cvs", "compiled, steps recorded", 2)}
    rates["compact"] = cell("recording", "compact", 9)
    halves = [cell("cvs", name, 2) for name in ("denoising", "consistency")]
    whole = 2 / sum(1 / rate for rate in halves)
    few, many = ((b, b / cell("memory", f"large | 256 | {b} ", 5)) for b in (8, 128))
    a_sample = (many[1] - few[1]) / (many[0] - few[0])
    boot = json.loads((HERE / "bootstrap_gpu.json").read_text())
    return rates, whole, few[1] / a_sample - few[0], boot


def table(price: float, nics: float) -> str:
    rates, whole, overhead, boot = measured()
    lines = [
        "# Past two cards",
        "",
        "`python benchmarks/beyond.py`: computed from one card's measurements, nothing here is",
        f"measured. {nics:g} x 400 Gb/s a host of {A_HOST} cards, {price:g} USD a card and hour.",
        "",
        "## The same batch a card (weak scaling)",
        "",
        "t = b / r + 2 (n - 1) / n x S / B; r: samples/s of one card at b samples, measured; S:",
        "bytes of the gradient, 4 a parameter; B: bytes/s out of a card, or out of its host.",
        "",
        "| CVS | cards | samples a step | ms a step | all-reduce | samples/s | of n x one |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for title, (name, parameters, batch) in NETWORKS.items():
        for cards in (1, 2, 8, 64, 512):
            shared = all_reduce_s(4 * parameters, cards, nics)
            step = batch / rates[name] + shared
            lines.append(
                f"| {title} | {cards} | {cards * batch:,} | {1e3 * step:.1f} | {1e3 * shared:.2f} "
                f"| {cards * batch / step:,.0f} | {batch / step / rates[name]:.1%} |"
            )
    lines += [
        *("", "## The same batch in all (strong scaling)", ""),
        f"t = (1024 / n + {overhead:.1f}) c + 2 (n - 1) / n x S / B; a step's fixed cost is worth",
        f"{overhead:.1f} samples, by uncompiled steps of 8 and of 128; c: seconds a sample, from r",
        "at 128. `large`, 256 px.",
        "",
        "| cards | samples a card | ms a step | all-reduce | samples/s | of n x one |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    _, parameters, batch = NETWORKS["large, 256 px"]
    a_sample = batch / rates["large"] / (batch + overhead)
    for cards in (8, 64, 512):
        shared = all_reduce_s(4 * parameters, cards, nics)
        step = (1024 / cards + overhead) * a_sample + shared
        lines.append(
            f"| {cards} | {1024 // cards} | {1e3 * step:.1f} | {1e3 * shared:.2f} "
            f"| {1024 / step:,.0f} | {1024 / step / cards / rates['large']:.0%} |"
        )
    lines += [
        *("", "## Where it stops", ""),
        "Samples a card below which the all-reduce takes over a tenth of a step: 9 x 2 S / B x r.",
        "",
        "| CVS | NVLink, 450 GB/s | 400 Gb/s a host | 100 Gb/s a host |",
        "|:--|--:|--:|--:|",
    ]
    for title, (name, parameters, _) in NETWORKS.items():
        least = [72 * parameters / (b * 1e9) * rates[name] for b in (NVLINK_GB_S, NIC_GB_S, 12.5)]
        lines.append(f"| {title} | {' | '.join(f'{samples:,.0f}' for samples in least)} |")
    views, made = 10e6, boot["images"] * boot["views"]
    hours = {
        "make: decode, render, encode, write, hash": views / made * boot["bootstrap_s"] / 3600,
        "gate": views / made * boot["gate_s"] / 3600,
        "train `large`, one pass": views / whole / 3600,
        "train `large`, ten passes": 10 * views / whole / 3600,
    }
    files = (6 + 4 * boot["views"]) / boot["views"]  # a view: `fresnel.data.records`
    disk_gb, held_tb = views / made * boot["megabytes"] / 1e3, views * 4 * 256**2 / 1e12
    return "\n".join(
        [
            *lines,
            *("", "## Ten million views at 256 px", ""),
            "Hours of one H100 with 16 cores, by what 4,000 views and runs of 200 steps took.",
            "Dollars are the same on n cards with 16 cores each, as far as they are n times one.",
            *("", "| | hours of one | USD | hours of 8 |", "|:--|--:|--:|--:|"),
            *(f"| {n} | {h:.1f} | {h * price:.0f} | {h / 8:.1f} |" for n, h in hours.items()),
            "",
            f"On disk {disk_gb:,.0f} GB, {disk_gb * 1e6 / views:.0f} kB a view with inputs and",
            f"depth, in {views * files / 1e6:.0f} million files;",
            f"in memory, as it is trained on (RGB and alpha of 8 bits), {held_tb:.1f} TB.\n",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--price", type=float, default=2.99, help="USD a card and hour")
    parser.add_argument("--nics", type=float, default=8, help="400 Gb/s NICs a host (default: 8)")
    asked = parser.parse_args()
    (HERE / "beyond.md").write_text(text := table(asked.price, asked.nics))
    print(text)
