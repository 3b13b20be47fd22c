"""Credits: every object pictured is named with author, licence and source, or is CC0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from boxes import views_of

from fresnel.data import dataset
from fresnel.objects import furniture
from fresnel.report.record import start
from fresnel.show import credits


def furniture_entry(licence: str) -> dict:
    known = furniture.listing()
    return next(
        entry
        for entry in known["objects"]
        if known["libraries"][entry["library"]]["licence"] == licence
    )


def test_furniture_is_named_with_author_licence_and_source(tmp_path: Path) -> None:
    known = furniture.listing()
    chosen = [furniture_entry(licence) for licence in ("CC-BY-3.0", "CC-BY-3.0-US", "CC0-1.0")]
    records = [
        replace(
            views_of(i, size=8, views=1),
            name=f"{entry['file']}__0",
            attribution=furniture.attribution(entry, known["libraries"][entry["library"]]),
        )
        for i, entry in enumerate(chosen)
    ]
    data = dataset.write(tmp_path / "set", records, meta={})
    entries = credits.credits([*data.names, data.names[0]], data)
    assert [entry["title"] for entry in entries] == [entry["name"] for entry in chosen]
    assert entries == credits.credits(data.names, str(data.path)), "by path as by data"
    assert all(entry["author"] and "sweethome3d" in entry["source"] for entry in entries)
    text = credits.table([*entries, entries[0]])
    assert "https://creativecommons.org/licenses/by/3.0/us/" in text
    assert "packages.debian.org" in text and "renderings" in text, "source, and what was changed"
    assert text.count("\n| ") == 2 + 2 and "Under [CC0-1.0]" in text, "head and two CC BY rows"


def test_embedded_objects_are_cc0_and_photographs_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = credits.credits(["dark_couch__0"], "embedded")
    assert entries[0]["licence"] == "CC0-1.0" and entries[0]["author"]
    assert "**Objects pictured.**" not in credits.table(entries), "CC0 asks for no table"
    photographs = tmp_path / "photos"
    photographs.mkdir()
    (photographs / "0000.png").write_bytes(b"")
    assert credits.credits(["0000"], str(photographs)) == []
    assert credits.table([]) == ""
    run = start("01_validate_data", {}, str(tmp_path / "run"))
    credits.show_credits(run, ["dark_couch__0"], "embedded")
    assert run.record.metrics["credits"] == entries
