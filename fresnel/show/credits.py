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
    if source == "embedded":
        known = {asset.name: asset.attribution for asset in assets.embedded_assets()}
    elif isinstance(source, str) and sources.holds_objects(source):
        known = {asset.name: asset.attribution for asset in assets.find_assets(source)}
    else:
        data = dataset.open(source) if isinstance(source, str) else source
        rows = {object_name(name): i for i, name in enumerate(data.names)}
        known = {name: data[rows[name]].attribution for name in wanted if name in rows}
    listed = furniture.listing()
    libraries = {
        furniture.attribution(entry, listed["libraries"][entry["library"]]): entry["library"]
        for entry in listed["objects"]
    }
    entries = []
    for text in (known.get(name, "") for name in wanted):
        if found := re.fullmatch(r"(?P<title>.+?) by (?P<author>.+) \((?P<licence>[^()]+)\)", text):
            of = f"sweethome3d-furniture 1.8-1, {libraries[text]}" if text in libraries else ""
            entries.append(found.groupdict() | {"source": of})
    return entries


def show_credits(entries: Sequence[Mapping[str, str]]) -> None:
    """Put `credits` into the notebook's output: who must be named, then what is CC0."""
    if rows := credit_rows(entries):
        show_table(rows, links=("licence", "source"))


def credit_rows(entries: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows of `show_credits`; licence and source are HTML."""
    free, rows = dict[str, None](), dict[str, dict[str, str]]()
    for entry in sorted(entries, key=lambda e: (e["author"], e["title"])):
        licence, source = entry["licence"], entry["source"]
        rows[str(entry)] = {
            "object pictured": entry["title"],
            "author": entry["author"],
            "licence": link(licence, _LICENCES.get(licence, "")),
            "source": link(source, _FURNITURE if "sweethome3d" in source else ""),
            "changed": "rendered at one size, in one light; views of it made by a model",
        }
    for entry in entries:
        if entry["licence"].startswith("CC0"):
            free[f"{entry['title']} by {entry['author']}"] = None
            rows.pop(str(entry), None)
    if free:
        licence = link("CC0-1.0", _LICENCES["CC0-1.0"])
        rows["CC0"] = {"object pictured": "; ".join(free), "licence": licence}
    return list(rows.values())
