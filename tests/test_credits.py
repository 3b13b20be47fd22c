"""Credits: every object pictured is named with author, licence and source, or is CC0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from boxes import views_of
from PIL import Image

from fresnel.data import dataset
from fresnel.objects import furniture
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
    assert all(
        entry["creator"] in made["author"] for entry, made in zip(chosen, entries, strict=True)
    )
    assert entries == credits.credits(data.names, str(data.path)), "by path as by data"
    assert all(entry["author"] and "sweethome3d" in entry["source"] for entry in entries)
    rows = credits.credit_rows([*entries, entries[0]])
    assert len(rows) == 3, "two of CC BY, and one that names what is CC0"
    assert "https://creativecommons.org/licenses/by/3.0/us/" in str(rows[:2])
    assert "packages.debian.org" in rows[0]["source"] and "rendered" in rows[0]["changed"]
    assert "zero/1.0" in rows[2]["licence"] and chosen[2]["name"] in rows[2]["object pictured"]


def test_a_set_of_sets_names_everybody_and_their_words_are_only_words(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    for part, author in (("a", "Ann"), ("b", evil)):
        record = replace(
            views_of(0, size=8, views=2), name=f"chair {part}__0",
            attribution=f"Chair {part} by {author} (CC-BY-4.0)",
        )  # fmt: skip
        dataset.write(tmp_path / "both" / part, [record], meta={})
    data = dataset.open(tmp_path / "both")
    entries = credits.credits(data.names, data)
    assert [entry["author"] for entry in entries] == ["Ann", evil]
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", lambda data, **_: shown.append(data["text/html"]))
        credits.show_credits(entries)
        credits.show_credits([])
    (text,) = shown
    assert "<script" not in text and "&lt;script&gt;" in text
    assert '<a href="https://creativecommons.org/licenses/by/4.0/">CC-BY-4.0</a>' in text


def test_embedded_objects_are_cc0_and_of_photographs_nothing_is_known(tmp_path: Path) -> None:
    entries = credits.credits(["dark_couch__0"], "embedded")
    assert entries[0]["licence"] == "CC0-1.0" and entries[0]["author"]
    Image.new("RGB", (16, 16)).save(tmp_path / "0000.png")
    assert credits.credits(["0000"], str(tmp_path)) == [] == credits.credit_rows([])
