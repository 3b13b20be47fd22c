"""All that is asked of a CVS, of its weights and a held-out set, beside the decoder's render.

    python benchmarks/cvs.py --weights FILE --domain faces --set DIR [--objects N] --out cvs.json

One step of every object; of the first 24 the noise that is left; of the first `--few` also two and
four steps, whether views agree, and where three samples differ.  Objects come in an order that is
drawn once, until all are done or `--seconds` are over; what is found is written after each batch,
as JSON and as tables beside it.
Without weights: those that ship ("sharp").  Intervals are Student's, 95 %, over objects.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fresnel.analysis import stats
from fresnel.data.dataset import ViewTensors
from fresnel.evaluation import agreement, denoising, metrics, noise, perceptual
from fresnel.models import Predictor, cvs, decoder
from fresnel.models.condition import rgba
from fresnel.objects import sources
from fresnel.render import Views
from fresnel.report.provenance import git_state

BATCH, NOISY, UP_TO_30 = 4, 24, "0-30"
STEPS = {"one step": 1, "two steps": 2, "four steps": 4}
WANTED = {"perceptual / render": (0.0, 0.7), "edge_energy_ratio": (0.8, 1.15)}
WANTED |= {"ssim - render": (0.0, math.inf), "psnr - render": (0.0, math.inf)}
WANTED |= {"luminance_ratio": (0.9, 1.1), "coverage_ratio": (0.9, 1.1)}
ON_RENDER, BY_FEATURES = "disagreement, render's surface", "disagreement, perceptual"
OF_STEPS = (
    *("psnr", "ssim", "perceptual", "edge_energy_ratio", "disagreement"),
    *(ON_RENDER, BY_FEATURES),
)
Rows = list[dict[str, Any]]


def kept(predict: Predictor) -> Predictor:
    """Its answers to the last few questions are not computed twice."""
    found: dict[bytes, Views] = {}

    def again(inputs: Any, cameras: Any) -> Views:
        asked = (inputs.rgb, cameras.viewmats)
        key = hashlib.sha1(b"".join(x.contiguous().numpy().tobytes() for x in asked)).digest()
        if key not in found:
            while len(found) >= 4:
                found.pop(next(iter(found)))
            found[key] = predict(inputs, cameras)
        return found[key]

    return again


class Bench:
    """One network, one domain, and what is found."""

    def __init__(self, weights: str, domain: str) -> None:
        ships = cvs.load_shipped(model="cvs-warp", domain=domain) if not weights else None
        self.network = ships or cvs.CVS.load(weights)
        splats = decoder.load_shipped("faces" if domain == "faces" else "pixel")
        if self.network.config.render_condition and self.network.decoder != splats.checksum():
            raise SystemExit(f"{weights}: learned from the renders of another decoder of {domain}")
        self.render = kept(decoder.predictor(splats))
        self.measures = metrics.find_measures(heads=domain == "faces")
        self.rows: dict[str, Rows] = {}
        self.few: dict[str, Rows] = {}
        self.noise: list[list[float]] = []
        self.targets: list[torch.Tensor] = []
        self.spread: dict[str, dict[str, tuple[float, float, float]]] = {}

    def ask(self, steps: int, seed: int = 0) -> Predictor:
        return kept(cvs.predictor(self.network, steps, seed, renderer=self.render))

    def measure(self, part: ViewTensors, *, whole: bool) -> None:
        """Some objects; `whole`: also what takes long."""
        pictures = part.rgb.float() / 255, part.alpha[..., None].float() / 255
        true = Views(*pictures, torch.zeros_like(pictures[1]))
        asked: dict[str, Predictor] = {"render": self.render}
        asked |= {k: self.ask(n) for k, n in STEPS.items() if n == 1 or whole}
        found = {k: self.compared(p, part) for k, p in asked.items()}
        for name in ("one step", "render"):
            self.rows.setdefault(name, []).extend(found[name])
        for k in range(len(part) if len(self.noise) < NOISY else 0):
            self.noise_of(part[[k]])
        if whole:
            asked["truth"] = lambda *_: true
            found["truth"] = self.compared(asked["truth"], part)
            self.agree(part, asked, found)
            for name, rows in found.items():
                self.few.setdefault(name, []).extend(rows)

    def compared(self, predict: Predictor, part: ViewTensors) -> Rows:
        return metrics.evaluate(
            predict, part, batch=len(part), measures=self.measures, progress=False
        )

    @torch.no_grad()
    def noise_of(self, one: ViewTensors) -> None:
        """Of two views of an object: a quarter and half of the way around."""
        sides = sorted({one.rgb.shape[1] // 4, one.rgb.shape[1] // 2})
        target = rgba(one.rgb[:, sides], one.alpha[:, sides]).flatten(0, 1)
        cond = cvs.condition(self.network, one.inputs, one.cameras[:, sides], renderer=self.render)
        drawn = torch.Generator().manual_seed(0)
        self.noise.append(denoising.noise_left(self.network, cond, target, generator=drawn))
        self.targets.append(target)

    @torch.no_grad()
    def agree(self, part: ViewTensors, asked: dict[str, Predictor], found: dict[str, Rows]) -> None:
        """Adds to rows: on the render's surface, and by the perceptual distance on the true one."""
        drawn = self.render(part.inputs, part.cameras)
        surface = agreement.Common.of(part.cameras, drawn.depth[..., 0], drawn.alpha[..., 0])
        known = None
        if part.depth is not None and "perceptual" in self.measures.distances:
            known = agreement.Common.of(part.cameras, part.depth, part.alpha.float() / 255)
        for name, predict in asked.items():
            seen = agreement.white(predict(part.inputs, part.cameras))
            columns = {ON_RENDER: surface.disagreement(seen)}
            if known is not None:
                columns[BY_FEATURES] = known.perceptual(seen, perceptual.distance())
            for column, values in columns.items():
                for row, value in zip(found[name], values.flatten().tolist(), strict=True):
                    row[column] = value

    def targets_met(self) -> list[dict[str, Any]]:
        """By bin: what is wanted of one step, what it is, and whether all of its interval is in
        ("yes"), its mean alone, or neither."""
        own, render = self.rows["one step"], self.rows["render"]
        made = []
        for name, (low, high) in WANTED.items():
            metric, _, versus = name.partition(" ")
            if metric not in own[0] and metric.removesuffix("_ratio") not in own[0]:
                continue
            theirs = metrics.by_object(render, metric)
            for place, objects in metrics.by_object(own, metric).items():
                ours, other = (np.array([*x.values()]) for x in (objects, theirs[place]))
                least = -0.3 if name == "psnr - render" and place == UP_TO_30 else low
                if versus == "/ render":
                    one = stats.over_objects(ours[None], other[None])
                    ends = one.mean, one.low, one.high
                else:
                    ends = metrics.mean_interval(ours - other if versus else ours)
                made.append(verdict(name, place, ends, least, high))
        near = [row for row in own if abs(row["azimuth_deg"]) <= 40.001]
        if near and "faces" in near[0]:
            for name in ("faces", "faces_true"):
                values = np.array([*metrics.by_object(near, name)["all"].values()])
                made.append(verdict(name, "0-40", metrics.mean_interval(values), 0.9, 1.0))
        return made

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        left = np.array(self.noise)
        known = denoising.ignoring(self.network), denoising.linear(torch.cat(self.targets))
        left_of = [
            {"noise level": level, "left": text(metrics.mean_interval(left[:, i]))}
            | {"ignoring its input": text((known[0][i], math.nan, math.nan))}
            | {"best linear denoiser": text((known[1][i], math.nan, math.nan))}
            | {"wanted": {0.17: "0.05 or less", 0.5: "0.02 or less"}.get(level, "")}
            for i, level in enumerate(noise.LEVELS)
        ]
        steps = [
            {"views": name, "objects": len({row["object"] for row in rows})}
            | {
                metric: text(metrics.mean_interval(np.array([*by["all"].values()])))
                for metric in OF_STEPS
                if all(metric in row for row in rows)
                for by in [metrics.by_object(rows, metric)]
            }
            for name, rows in self.few.items()
        ]
        spread = [
            {"samples of": name} | {place: text(ends, 1) for place, ends in found.items()}
            for name, found in self.spread.items()
        ]
        return {"noise": left_of, "wanted": self.targets_met(), "steps": steps, "spread": spread}

    def write(self, out: Path, about: dict[str, Any]) -> None:
        tables = self.tables()
        summaries = {name: metrics.summarise(rows) for name, rows in self.rows.items()}
        about |= {"objects": summaries["one step"][-1]["objects"]}
        record = about | tables | {"summaries": summaries, "spread_by_azimuth": self.spread}
        out.write_text(json.dumps(record, indent=1) + "\n")
        titles = {
            "noise": "Share of the noise that is left, of two views an object",
            "wanted": "What is wanted of one step, by azimuth away from the input",
            "steps": "One, two and four steps, means over all views",
            "spread": "How far three samples spread by azimuth, in steps of 8 bits",
        }
        words = [f"# {about['weights']}, {about['domain']}", "", f"`python {about['command']}`", ""]
        words += [f"{about['objects']} held-out objects of {about['set']}, {about['seconds']} s."]
        for name, rows in tables.items():
            words += ["", f"## {titles[name]}", "", *markdown(rows)]
        words += ["", "## All figures by azimuth", "", metrics.table(summaries), ""]
        out.with_suffix(".md").write_text("\n".join(words) + self.measures.note + "\n")


def verdict(
    name: str, place: str, ends: Sequence[float], low: float, high: float
) -> dict[str, Any]:
    mean, least, most = ends
    met = "yes" if low <= least and most <= high else "no" if not low <= mean <= high else "mean"
    wanted = f"{low:g} to {high:g}".replace("to inf", "or more")
    return {"measured": name, "azimuth": place, "is": text(ends), "wanted": wanted, "met": met}


def text(ends: Sequence[float], digits: int = 3) -> str:
    mean, low, high = ends
    known = f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else ""
    return f"{mean:.{digits}f}{known}" if math.isfinite(mean) else "-"


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["Not measured."]
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="", help="a CVS (default: the one that ships, sharp)")
    parser.add_argument("--domain", choices=["faces", "objects"], default="faces")
    parser.add_argument("--set", default="embedded", help="held-out objects (default: embedded)")
    parser.add_argument("--objects", type=int, default=0, help="at most so many (0: all)")
    parser.add_argument("--few", type=int, default=12, help="objects that see everything")
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--out", type=Path, default=Path("cvs.json"))
    given, began = parser.parse_args(), time.monotonic()
    bench = Bench(given.weights, given.domain)
    size = bench.network.config.image_size
    source = sources.of_domain(given.set, given.domain)
    truth = sources.ground_truth(source, "held_out", image_size=size, seed=1000)
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0)).tolist()
    order = order[: given.objects or None]
    about = {"weights": Path(given.weights).name or "shipped", "domain": given.domain}
    about |= {"set": Path(source).name, "content_hash": truth.content_hash}
    about |= {"checksum": bench.network.checksum(), "commit": git_state()["commit"]}
    about["command"] = f"benchmarks/cvs.py --domain {given.domain} --few {given.few}"
    few = order[: given.few]
    for start in range(0, len(order), BATCH):
        if time.monotonic() - began > given.seconds:
            break
        rows = order[start : start + BATCH]
        bench.measure(truth.subset(rows).tensors(size=size), whole=start < len(few))
        if start < len(few) <= start + BATCH:
            data = truth.subset(few).tensors(size=size)
            for name, n in [*STEPS.items()][:2]:
                samples = [bench.ask(n, seed) for seed in range(3)]
                bench.spread[name] = metrics.spread_by_azimuth(samples, data)
        bench.write(given.out, about | {"seconds": round(time.monotonic() - began)})
        print(f"{start + len(rows)} objects, {time.monotonic() - began:.0f} s", flush=True)
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
