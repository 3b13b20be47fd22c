"""Why targets were missed: what experiments beside the study say, in figures.

`benchmarks/decoder_spread.py` and `benchmarks/twin_limits.py` each leave a JSON file there; where
one is missing, what it would say is missing too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fresnel.analysis.comparison import BINS, Study, difference, estimate
from fresnel.analysis.targets import Target
from fresnel.evaluation.metrics import format_rows

_ALONE, _MEAN = "each alone", "their mean"


def table(study: Study, reached: Sequence[Target], benchmarks: str | Path) -> str:
    """A row a missed target: what held it back (Markdown); "" where nothing is missed or known.

    Args:
        reached: what `targets.targets` returned.
        benchmarks: the folder of the project's benchmarks.
    """
    spread = _read(Path(benchmarks) / "decoder_spread.json").get("128", {}).get("rows", {})
    twins = _read(Path(benchmarks) / "twin_limits.json").get("rows", {})
    rows = []
    for target in reached:
        if target.verdict.startswith("missed"):
            why = _why(target, study, spread, twins)
            if why:
                rows.append({"missed": target.text, "what an experiment says of it": why})
    return format_rows(rows)


def _why(target: Target, study: Study, spread: Mapping[str, Any], twins: Mapping[str, Any]) -> str:
    ours = target.who.partition(" - ")[0]
    if target.text.startswith("the decoder"):
        return _spread(ours, spread)
    if ours == "rest50-gated":
        return _maker(study)
    if target.text.startswith("the best CVS"):
        return _agreement(twins, spread)
    return _average(twins) if target.text.startswith("light") else ""


def _spread(arm: str, rows: Mapping[str, Any]) -> str:
    """What the mean of several trainings' views gains a decoder."""
    alone, together = (rows.get(f"{arm}, {way}") for way in (_ALONE, _MEAN))
    if not (alone and together):
        return ""
    return (
        f"the mean of the views of {alone['seeds']} seeds is {_signed(together['psnr'])} dB above "
        f"copying the input over black, by bin, each alone {_signed(alone['psnr'])}: that much "
        f"differs between trainings (benchmarks/decoder_spread.md)"
    )


def _maker(study: Study) -> str:
    """How far a bootstrap falls behind, by the decoder that made it."""
    parts = []
    for arm, truth, maker in (
        ("gated", "oracle", "decoder-A"),
        ("rest50-gated", "rest50-oracle", "decoder-A50"),
    ):
        if not {arm, truth, maker} <= study.keys():
            return ""
        behind = min(difference(study[arm], study[truth], b).mean for b in BINS)
        gains = [
            estimate(study[maker], b).mean - estimate(study[maker], b, which="copy_input").mean
            for b in BINS
        ]
        parts.append(
            f"by {maker}, {min(gains):+.1f} to {max(gains):+.1f} dB above copying the input, "
            f"{behind:+.2f} dB against true views where it is furthest behind"
        )
    return f"a bootstrap goes with the decoder that made it: {'; '.join(parts)}"


def _agreement(twins: Mapping[str, Any], spread: Mapping[str, Any]) -> str:
    """Whether several trainings of the refining network differ, and of the decoder below it."""
    alone = next((r for n, r in twins.items() if n.endswith(_ALONE)), None)
    together = next((r for n, r in twins.items() if n.startswith("the mean of these ")), None)
    if not (alone and together):
        return ""
    text = (
        f"trainings of the network on one decoder agree: the mean of the views of "
        f"{alone['seeds']} gains {_range(_gains(together, alone))} dB"
    )
    gains = [
        gain
        for name, row in spread.items()
        if name.endswith(_MEAN)
        for gain in _gains(row, spread[name.removesuffix(_MEAN) + _ALONE])
    ]
    if gains:
        text += (
            f"; decoders do not: theirs gains {_range(gains)} dB. So what is left lies in the "
            f"render, or is the same in all trainings of the network"
        )
    return f"{text} (benchmarks/twin_limits.md)"


def _average(twins: Mapping[str, Any]) -> str:
    """Light in the values that networks are trained in, and what a blur alone does to it."""
    shipped = twins.get("the twin that ships")
    blurred = next((n for n in twins if "blurred" in n), "")
    if not (shipped and blurred):
        return ""
    return (
        f"in encoded values, in which networks are trained, the twin that ships holds "
        f"{_range(shipped['encoded'])} of the truth, in linear light {_range(shipped['light'])}; "
        f"{blurred} hold {_range(twins[blurred]['encoded'])} and "
        f"{_range(twins[blurred]['light'])}: averaging what is uncertain costs light "
        f"(benchmarks/twin_limits.md)"
    )


def _gains(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[float]:
    return [a - b for a, b in zip(ours["psnr"], theirs["psnr"], strict=True)]


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    low, high = f"{found[0]:.2f}", f"{found[-1]:.2f}"
    return low if low == high else f"{low} to {high}"


def _signed(values: Iterable[float]) -> str:
    return " / ".join(f"{value:+.1f}" for value in values)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); make it again, or remove it") from error
    return found if isinstance(found, dict) else {}
