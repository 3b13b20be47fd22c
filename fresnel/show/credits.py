"""Who made the objects that a report pictures, under which licence, and where they come from.

CC BY wants title, author, licence and source beside every picture, and that changes are said; CC0
wants nothing, and is named all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fresnel.data.dataset import MultiViewDataset
from fresnel.data.layout import object_name
from fresnel.evaluation.metrics import format_rows
from fresnel.objects import sources
from fresnel.report.record import Recorder

_LICENCES = {
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-3.0-US": "https://creativecommons.org/licenses/by/3.0/us/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
}
_FURNITURE = "https://packages.debian.org/sid/sweethome3d-furniture"
_CHANGED = (
    "The pictures are renderings of these objects, scaled to one size and lit by one light, and "
    "views that a model makes of them."
)


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
    known = _known(source)
    listed = _furniture()
    entries = []
    for name in wanted:
        text = known.get(name, "")
        entry = listed.get(text) or _parsed(text)
        if entry:
            entries.append(entry)
    return entries


def show_credits(run: Recorder, names: Iterable[str], source: str | MultiViewDataset) -> None:
    """Put `credits` into the notebook's output and, as "credits", into the run's metrics."""
    from fresnel.show import style as figures

    entries = credits(names, source)
    run.metrics({"credits": entries})
    if entries:
        figures.show_table(table(entries))


def table(entries: Iterable[dict[str, str]]) -> str:
    """Entries of `credits` in Markdown: who must be named, then what is under CC0; "" of none."""
    unique = list({tuple(entry.items()): entry for entry in entries}.values())
    free = [entry for entry in unique if entry["licence"].startswith("CC0")]
    others = [entry for entry in unique if entry not in free]
    parts = []
    if others:
        rows = [
            {
                "title": entry["title"],
                "author": entry["author"],
                "licence": _link(entry["licence"], _LICENCES.get(entry["licence"], "")),
                "source": _link(
                    entry["source"], _FURNITURE if "sweethome3d" in entry["source"] else ""
                ),
            }
            for entry in sorted(others, key=lambda e: (e["author"], e["title"]))
        ]
        parts += [f"**Objects pictured.** {_CHANGED}", format_rows(rows)]
    if free:
        named = "; ".join(f"{e['title']} by {e['author']}" for e in free)
        parts.append(f"*Under {_link('CC0-1.0', _LICENCES['CC0-1.0'])}:* {named}.")
    return "\n\n".join(parts)


def _link(text: str, address: str) -> str:
    return f"[{text}]({address})" if address else text


def _known(source: str | MultiViewDataset) -> dict[str, str]:
    """Object -> its attribution, as a source states it."""
    from fresnel.objects.assets import embedded_assets, find_assets

    if source == "embedded":
        return {asset.name: asset.attribution for asset in embedded_assets()}
    if isinstance(source, str) and sources.holds_objects(source):
        return {asset.name: asset.attribution for asset in find_assets(source)}
    data = sources.open(source) if isinstance(source, str) else source
    found = {}
    for name, record in zip(data.names, data.records, strict=True):
        found[object_name(name)] = str(getattr(record, "attribution", ""))
    return found


def _furniture() -> dict[str, dict[str, str]]:
    """The furniture set's attributions, taken apart."""
    from fresnel.objects import furniture

    known = furniture.listing()
    found = {}
    for entry in known["objects"]:
        library = known["libraries"][entry["library"]]
        text = furniture.attribution(entry, library)
        author = entry["creator"]
        if library["copyright"] not in (author, ""):
            author += f" ({library['copyright']})"
        found[text] = {
            "title": entry["name"],
            "author": author,
            "licence": library["licence"],
            "source": f"sweethome3d-furniture 1.8-1, {entry['library']}",
        }
    return found


def _parsed(text: str) -> dict[str, Any] | None:
    """ "Title by Author (licence)" taken apart; None where it is something else."""
    found = re.fullmatch(r"(.+?) by (.+) \(([^()]+)\)", text)
    if found is None:
        return None
    return {"title": found[1], "author": found[2], "licence": found[3], "source": ""}
