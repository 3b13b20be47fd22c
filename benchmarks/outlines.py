"""What a CVS that adds to renders makes of right outlines and of wrong ones.

    python benchmarks/outlines.py objects DATA OUT.json [--name test] [--records 0]

DATA is a folder of views, of objects that nothing was trained on, or of others.  Each view is drawn
by the decoder that ships for the domain, and in one call by the CVS that ships.  Views are grouped
by how far the render's outline agrees with the truth's: over pixels the sum of the smaller alpha
over that of the larger one (IoU).  OUT.json gets means of each group, as "DOMAIN NAME", beside what
it has.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fresnel.data import dataset
from fresnel.data.images import InputImages
from fresnel.data.records import ViewTensors
from fresnel.evaluation import metrics
from fresnel.host.files import write_atomic
from fresnel.models import cvs
from fresnel.render import Views
from fresnel.report.provenance import git_state
from fresnel.scene.cameras import Cameras
from fresnel.study import arms

EDGES = (0.0, 0.7, 0.85, 0.95, 1.01)
SHOWN = ("iou", "perceptual", "psnr")


def main(given: argparse.Namespace) -> None:
    data, device = dataset.open(given.data), "cuda" if torch.cuda.is_available() else "cpu"
    order = np.random.default_rng(1).permutation(len(data))[: given.records or None]
    truth = data.tensors(size=128)[order.tolist()].to(device)
    render = arms.renderer("cvs-warp", device, domain=given.domain)
    network = cvs.load_shipped(device, "cvs-warp", given.domain)
    asked = {"render": render, "one call": cvs.predictor(network, renderer=render)}
    measures = metrics.find_measures(device)
    rows = {name: compared(predict, truth, measures) for name, predict in asked.items()}
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    found["commit"] = git_state()["commit"]
    found[f"{given.domain} {given.name}"] = groups(rows)
    write_atomic(given.out, json.dumps(found, indent=1).encode())
    for name, table in found.items():
        if name != "commit":
            print(name, *table, sep="\n  ")


def compared(
    predict: metrics.Predictor, truth: ViewTensors, measures: metrics.Measures
) -> dict[str, np.ndarray]:
    """Of every view: the agreement of outlines, and its distance and PSNR to the truth."""
    drawn = list[Tensor]()

    def noted(inputs: InputImages, cameras: Cameras) -> Views:
        views = predict(inputs, cameras)
        drawn.append(views.alpha[..., 0])
        return views

    rows = metrics.evaluate(noted, truth, measures=measures)
    ours, true = torch.cat(drawn), truth.alpha / 255
    both, either = (f(ours, true).sum((-2, -1)) for f in (torch.minimum, torch.maximum))
    found = {"iou": (both / either).flatten().cpu().numpy()}
    return found | {name: np.array([row[name] for row in rows]) for name in SHOWN[1:]}


def groups(rows: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Means by the render's IoU, least first, and of all views last; `better`: the share of views
    whose outline one call brings nearer to the truth's."""
    iou, made = rows["render"]["iou"], []
    nearer = rows["one call"]["iou"] > iou
    for low, high in [*pairwise(EDGES), (EDGES[0], EDGES[-1])]:
        inside = (iou >= low) & (iou < high)
        if not inside.any():
            continue
        means = {
            name: {m: round(float(values[m][inside].mean()), 3) for m in SHOWN}
            for name, values in rows.items()
        }
        ratio = means["one call"]["perceptual"] / means["render"]["perceptual"]
        made.append(
            {"from": low, "to": high, "views": int(inside.sum()), **means}
            | {"ratio": round(ratio, 3), "better": round(float(nearer[inside].mean()), 3)}
        )
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("domain", choices=("objects", "faces"))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="test", help="of the records, in OUT.json and the table")
    parser.add_argument("--records", type=int, default=0, help="as many, drawn once (0: all)")
    main(parser.parse_args())
