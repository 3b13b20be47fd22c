"""What lies past two cards, computed from what one and two were measured at: benchmarks/beyond.md.

    python benchmarks/beyond.py [--price 2.99] [--nics 8]

Nothing here is measured: measured figures are read from scaling.md, train_gpu.json and
bootstrap_gpu.json, and the model is stated beside each table.
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent
NIC_GB_S = 50.0
"""400 Gb/s, ConnectX-7 (NDR InfiniBand); a DGX H100 has one for each of its eight GPUs
(https://docs.nvidia.com/dgx/dgxh100-user-guide/)."""
A_HOST = 8  # GPUs


def cell(lines: list[str], start: str, column: int) -> float:
    """A number in the first row of a Markdown table that begins so."""
    line = next(line for line in lines if line.startswith(f"| {start}"))
    return float(line.split("|")[column].replace(",", "").strip(" %x"))


class Model:
    """Seconds of a step of `large` at 256 px on n H200, by what two of them were measured at.

    `a_sample` and `fixed`: of one card, from 128 samples alone and 64 on each of two; `beside`:
    what two cards take longer than one and is no all-reduce; `bandwidth`: of the all-reduce.
    """

    def __init__(self, nics: float) -> None:
        lines = (HERE / "scaling.md").read_text().splitlines()
        weak, strong = ("CVS 'large', denoising | weak", "CVS 'large', denoising | strong")
        one, alone = cell(lines, weak, 4), 128 / cell(lines, weak, 4)
        self.size = cell(lines, weak, 8) * 1e6
        exchange, less = cell(lines, weak, 9) / 1e3, cell(lines, strong, 9) / 1e3
        self.beside = 2 * 128 / cell(lines, weak, 5) - alone - exchange
        half = 128 / cell(lines, strong, 5) - less - self.beside
        self.a_sample = (alone - half) / 64
        self.fixed = alone - 128 * self.a_sample
        self.rate, self.bandwidth, self.between = one, self.size / exchange, nics * NIC_GB_S * 1e9

    def all_reduce(self, cards: int) -> float:
        """2 (n - 1) / n x S / B (NVIDIA/nccl-tests, PERFORMANCE.md), where B is what leaves a card:
        as measured, and between hosts at most all of a host's NICs', which NCCL's rings share."""
        bandwidth = self.bandwidth if cards <= A_HOST else min(self.bandwidth, self.between)
        return 2 * (cards - 1) / cards * self.size / bandwidth

    def step(self, cards: int, samples: float) -> float:
        more = self.beside + self.all_reduce(cards) if cards > 1 else 0.0
        return self.fixed + samples * self.a_sample + more


def table(price: float, nics: float) -> str:
    model = Model(nics)
    lines = [
        "# Past two cards",
        "",
        "`python benchmarks/beyond.py`: computed, for `large` at 256 px (81 M parameters) in its",
        f"denoising half, hosts of {A_HOST} H200 with {nics:g} x 400 Gb/s.",
        "",
        "t = fixed + b c + beside + 2 (n - 1) / n x S / B; measured, on one and on two cards:",
        "",
        f"- c = {1e3 * model.a_sample:.3f} ms a sample, fixed = {1e3 * model.fixed:.2f} ms a step,",
        "  from 128 samples on one card, and 64 on each of two less what follows;",
        f"- S / B = {model.size / 1e6:.0f} MB / {model.bandwidth / 1e9:.0f} GB/s, the all-reduce;",
        f"- beside = {1e3 * model.beside:.2f} ms that a step takes longer on two, besides.",
        "",
        "| samples | cards | a card | a step | ms a step | all-reduce | samples/s | of n x one |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    cases = [("128 a card", n, 128.0) for n in (1, 2, 8, 64, 512)]
    cases += [("1,024 in all", n, 1024 / n) for n in (8, 64, 512)]
    for title, cards, each in cases:
        step = model.step(cards, each)
        shared = model.all_reduce(cards) if cards > 1 else 0.0
        lines.append(
            f"| {title} | {cards} | {each:g} | {cards * each:,.0f} | {1e3 * step:.1f} | "
            f"{1e3 * shared:.2f} | {cards * each / step:,.0f} | {each / step / model.rate:.0%} |"
        )
    costly = 9 * (model.beside + model.all_reduce(64)) - model.fixed
    sections = json.loads((HERE / "train_gpu.json").read_text())["sections"]
    halves = [cell(sections["cvs"]["lines"], name, 2) for name in ("denoising", "consistency")]
    boot = json.loads((HERE / "bootstrap_gpu.json").read_text())
    views, made = 10e6, boot["images"] * boot["views"]
    hours = {
        "make: decode, render, encode, write, hash": views / made * boot["bootstrap_s"] / 3600,
        "gate": views / made * boot["gate_s"] / 3600,
        "train `large`, one pass": views * sum(1 / rate for rate in halves) / 2 / 3600,
    }
    hours["train `large`, ten passes"] = 10 * hours["train `large`, one pass"]
    files = (6 + 4 * boot["views"]) / boot["views"]  # a view: `fresnel.data.records`
    disk_gb, held_tb = views / made * boot["megabytes"] / 1e3, views * 4 * 256**2 / 1e12
    return "\n".join(
        [
            *lines,
            "",
            "On 64 cards what an exchange takes is a tenth of a step at "
            f"{costly / model.a_sample:.0f} samples a card.",
            *("", "## Ten million views at 256 px", ""),
            "Hours of one H100 with 16 cores, by what 4,000 views and runs of 200 steps took, at",
            f"{price:g} USD an hour; of 8: an eighth, as if they were eight times one.",
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
    text = table(asked.price, asked.nics)
    if asked.nics == A_HOST:
        (HERE / "beyond.md").write_text(text)
    print(text)
