"""Who made the objects that a report pictures, under which licence, and where they come from.

CC BY wants title, author, licence and source beside every picture, and that changes are said; CC0
wants nothing, and is named all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from fresnel.data import dataset
from fresnel.data.dataset import MultiViewDataset
from fresnel.data.layout import object_name
from fresnel.objects import assets, furniture, sources
from fresnel.show.style import link, show_table

_LICENCES = {
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-3.0-US": "https://creativecommons.org/licenses/by/3.0/us/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
}
_FURNITURE = "https://packages.debian.org/sid/sweethome3d-furniture"


def credits(names: Iterable[str], source: str | MultiViewDataset) -> list[dict[str, str]]:
    """What must stand beside pictures of these records, an entry an object.

    Args:
        names: of records ("armchair__0") or objects; doubles count once.
        source: the data they are of, or what a notebook's `source` names: "embedded", 3D objects,
            or a dataset.  Of photographs nothing is known, and nothing is returned.

    Returns:
        "title", "author", "licence", "source" each.
    """
    wanted = list(dict.fromkeys(object_name(name) for name in names))
    known, furniture_of = _known(wanted, source), _libraries()
    entries = []
    for text in (known.get(name, "") for name in wanted):
        found = re.fullmatch(r"(.+?) by (.+) \(([^()]+)\)", text)
        if found:
            entry = {"title": found[1], "author": found[2], "licence": found[3]}
            entries.append(entry | {"source": furniture_of.get(text, "")})
    return entries


def show_credits(entries: Sequence[Mapping[str, str]]) -> None:
    """Put `credits` into the notebook's output: who must be named, then what is CC0."""
    rows = credit_rows(entries)
    if rows:
        show_table(rows, links=("licence", "source"))


def credit_rows(entries: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows of `show_credits`; licence and source are HTML."""
    unique = list({tuple(entry.items()): entry for entry in entries}.values())
    others = [entry for entry in unique if not entry["licence"].startswith("CC0")]
    free = [f"{entry['title']} by {entry['author']}" for entry in unique if entry not in others]
    rows = [
        {
            "object pictured": entry["title"],
            "author": entry["author"],
            "licence": link(entry["licence"], _LICENCES.get(entry["licence"], "")),
            "source": link(entry["source"], _FURNITURE if "sweethome3d" in entry["source"] else ""),
            "changed": "rendered at one size, in one light; views of it made by a model",
        }
        for entry in sorted(others, key=lambda e: (e["author"], e["title"]))
    ]
    if free:
        licence = link("CC0-1.0", _LICENCES["CC0-1.0"])
        rows.append({"object pictured": "; ".join(free), "licence": licence})
    return rows


def _known(wanted: Sequence[str], source: str | MultiViewDataset) -> dict[str, str]:
    """Object -> its attribution, as a source states it."""
    if source == "embedded":
        return {asset.name: asset.attribution for asset in assets.embedded_assets()}
    if isinstance(source, str) and sources.holds_objects(source):
        return {asset.name: asset.attribution for asset in assets.find_assets(source)}
    data = dataset.open(source) if isinstance(source, str) else source
    rows = {object_name(name): i for i, name in enumerate(data.names)}
    return {name: data[rows[name]].attribution for name in wanted if name in rows}


def _libraries() -> dict[str, str]:
    """An attribution of the furniture set -> where that object comes from."""
    listed = furniture.listing()
    return {
        furniture.attribution(entry, listed["libraries"][entry["library"]]): (
            f"sweethome3d-furniture 1.8-1, {entry['library']}"
        )
        for entry in listed["objects"]
    }
