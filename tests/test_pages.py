"""What the pages make of notebooks and records, without a browser (test_browser.py has one)."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from conftest import Shown, external_requests
from jupyter_core.paths import jupyter_path
from nbconvert.exporters import templateexporter
from nbconvert.exporters.templateexporter import TemplateExporter
from PIL import Image

from fresnel.host.machine import project_root
from fresnel.report import html as _html
from fresnel.report import index as overview
from fresnel.report import page as pages
from fresnel.report import terms
from fresnel.report.record import RunRecord
from fresnel.scene.cameras import orbit
from fresnel.scene.gaussians import Gaussians
from fresnel.show import charts, pictures, style, widgets


def page_of(tmp_path: Path, shown: Shown, text: str = "# T", **record: Any) -> str:
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [
        nbformat.v4.new_output("display_data", data=data, metadata=about) for data, about in shown
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text), cell])
    nbformat.write(notebook, tmp_path / "executed.ipynb")
    if record:
        RunRecord("n", "finished", "PASS", **record).write(tmp_path)
    return pages.to_html(tmp_path / "executed.ipynb").read_text()


def cloud(count: int = 50) -> widgets.Scene:
    generator = torch.Generator().manual_seed(0)
    gaussians = Gaussians(
        0.2 * torch.randn(count, 3, generator=generator),
        torch.tensor([1.0, 0, 0, 0]).expand(count, 4),
        torch.full((count, 3), 0.03),
        torch.linspace(0, 1, count),
        torch.rand(count, 3, generator=generator),
    )
    azimuth = torch.arange(4) * 90.0
    cameras = orbit(azimuth, 10.0, 2.0, pivot=(0, 0, 0), focal_px=40, width=32, height=32)
    return widgets.scene(gaussians, cameras, cameras[0], torch.zeros(3), most=40)


def test_nbconverts_templates_are_found_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `pip install --target` puts them, and Jupyter does not look."""
    (real,) = (p for p in jupyter_path("nbconvert", "templates") if Path(p, "base").is_dir())
    monkeypatch.setattr(TemplateExporter.template_data_paths, "default_args", (["/nowhere"],))
    monkeypatch.setattr(templateexporter, "jupyter_path", lambda *_: ["/nowhere"])
    with pytest.raises(ValueError, match="No template"):
        page_of(tmp_path, [])
    shutil.copytree(real, tmp_path / "share" / "jupyter" / "nbconvert" / "templates")
    monkeypatch.setattr(pages.nbconvert, "__file__", str(tmp_path / "nbconvert" / "__init__.py"))
    assert "<h1>" in page_of(tmp_path, [], "# T")


def test_question_rule_and_answer_come_first(tmp_path: Path) -> None:
    text = "# T\n\n**Question.** Is it *so*?\n\n**Rule, fixed beforehand.** If not, `stop`.\n\nWhy."
    html = page_of(tmp_path, [], text, summary="It is <so>.", reasons=("a & b",))
    order = ["<h1>", "PASS", "It is &lt;so&gt;.", "Is it <em>so</em>?", "<code>stop</code>", "Why."]
    places = [html.index(part, html.index("<h1>")) for part in order]
    assert places == sorted(places) and "a &amp; b" in html
    assert html.count("Is it <em>so</em>?") == 1


def test_figures_have_numbers_and_the_one_that_shows_the_answer_is_first(
    tmp_path: Path, shown: Shown
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    style.show(noise, "A first picture.")
    pictures.show_pair(noise, noise, ("a", "b"), "A pair.", key="pair")
    style.show(noise, "What it shows.", caption="The <answer>.", key="answer", lead=True)
    text = "# T\n\n**Question.** So?\n\nSee [Figure](#fig-answer), [Figure](#fig-pair) and\n"
    html = page_of(tmp_path, shown, text + "[Figure](#fig-lost).", summary="Yes.")
    order = ["Yes.", 'alt="What it shows."', "Figure 1.</b> The &lt;answer&gt;.", "So?"]
    order += ["See", "Figure 2.</b> A first picture.", "Figure 3.</b> A pair."]
    places = [html.index(part, html.index("<h1>")) for part in order]
    assert places == sorted(places)
    assert '<a href="#fig-answer">Figure 1</a>, <a href="#fig-pair">Figure 3</a>' in html
    assert 'id="fig-answer"' in html and 'id="fig-pair"' in html and "fig-lost" not in html


def test_terms_link_to_a_glossary_and_works_to_their_references(tmp_path: Path) -> None:
    text = "# The gate\n\nThe gate asks `the gate` for PSNR; PSNR [@song2023]. See [@nobody]."
    html = page_of(tmp_path, [], text, summary="SSIM fell, and PSNR.")
    assert html.count('href="#term-psnr"') == 1, "the first mention, in the answer"
    assert html.count('href="#term-gate"') == 1 and "<h1>The gate</h1>" in html
    assert "<code>the gate</code>" in html and "[@nobody]" in html
    for anchor in ("term-psnr", "term-ssim", "term-gate", "ref-song2023", "ref-wang2004"):
        assert html.count(f'id="{anchor}"') == 1
    assert 'id="term-azimuth"' not in html and "kerbl2023" not in html, "of what is mentioned"
    assert html.index('href="#ref-song2023"') < html.index('<h2 id="glossary"')
    assert "[1]</a>" in html and "@inproceedings{song2023," in html
    for key, work in terms.references().items():
        assert work["author"] and work["title"] and work["year"].isdigit(), key
        assert work.get("journal") or work.get("booktitle"), key


def test_a_page_without_a_record_or_a_lead_is_still_one(tmp_path: Path) -> None:
    html = page_of(tmp_path, [], "Just text.")
    assert "Just text." in html and "How this was made" not in html and "<dl" not in html


def test_a_page_says_whence_it_is_and_what_is_known(tmp_path: Path) -> None:
    when = {"reused_utc": "2026-02-02T10:00:00+00:00", "computed_utc": "2026-01-01T09:00:00+00:00"}
    git = {"commit": "a" * 40, "dirty": True, "changed": ["x.py"]}
    notes = ("metrics.a was nan; stored as null", "metrics.b[2] was nan; stored as null", "Look.")
    html = page_of(
        *(tmp_path, []),
        summary="S",
        cached={**when, "commit": "0123456789abcdef", "dirty": True},
        provenance={"git": git, "seed": 7, "something_new": {"later": 1}},
        notes=notes,
        price_per_hour_usd=2.0,
    )
    for text in (
        *("from the cache", "2026-01-01 09:00 UTC", "0123456789ab", "with uncommitted changes"),
        *("x.py", "something new", '{"later": 1}', "not a finite number: a, b[2]", "Look."),
        "energy</th><td>not measured",
    ):
        assert text in html


def test_drawings_take_the_pages_ink_and_keep_their_names_apart(
    tmp_path: Path, shown: Shown
) -> None:
    for alt in ("first <one>", "second"):
        style.show(charts.loss_curves([{"step": i, "loss": 2.0 - i} for i in range(2)]), alt)
    style.show(style.to_uint8(np.zeros((2, 3, 3))), "black")
    style.show(style.to_uint8(np.random.default_rng(0).random((80, 80, 3))), "noise")
    html = page_of(tmp_path, shown)
    assert 'aria-label="first &lt;one&gt;"' in html and 'aria-label="second"' in html
    assert 'alt="black"' in html and 'width="3"' in html and 'height="2"' in html
    assert html.count("data:image/webp") == 1, "large pictures, without a loss"
    drawn = "".join(re.findall(r"<svg aria-label.*?</svg>", html, re.DOTALL))
    assert "currentColor" in drawn and "#000000" not in drawn and "#ffffff" not in drawn
    assert "<style" not in drawn and "<metadata" not in drawn
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))
    used = set(re.findall(r'(?:url\(#|href="#)(d\d[^")]+)', drawn))
    assert used and used <= set(names)
    svg = "<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>"
    html = pages._drawing(svg, 'a "b"', 1)  # another program's stays a picture
    assert html.startswith("<img ") and 'alt="a &quot;b&quot;"' in html and "<script" not in html


def test_a_picture_that_webp_makes_larger_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        def save(self, stream: Any, *_: object, **__: object) -> None:
            stream.write(b"0" * 9_000)

    monkeypatch.setattr(Image, "open", lambda *_, **__: Large())
    body = f'<img src="data:image/png;base64,{"A" * 8_000}">'
    assert pages._smaller_pictures(body) == body


EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"| a |\n|---|\n| {EVIL} |", "&lt;script&gt;"),
        ("[go](javascript:alert(1)) and [on](data:text/html,x)", "<a>go</a>"),
        ("<iframe src='https://x.org'></iframe>", "&lt;iframe"),
        ("<a href='https://x.org' onclick='alert(1)'>x</a>", '<a href="https://x.org">x</a>'),
        ("<details><summary>*more*</summary>\n\n**text**</details>", "<strong>text</strong>"),
        ("![p](data:image/png;base64,AAAA)", 'src="data:image/png;base64,AAAA"'),
        ("![p](https://x.org/p.png)", 'alt="p"'),
    ],
)
def test_text_from_elsewhere_runs_nothing(
    tmp_path: Path, shown: Shown, text: str, wanted: str
) -> None:
    """As a dataset's credits and names reach a page: in tables, in summaries, in provenance."""
    shown.append(({"text/markdown": text}, {}))
    git = {"commit": EVIL, "dirty": True, "changed": [EVIL]}
    origin = {"git": git, "packages": {EVIL: EVIL}, "seed": EVIL, "python": EVIL}
    html = page_of(tmp_path, shown, f"# T\n\n{text}", summary=EVIL, name=EVIL, provenance=origin)
    body = html.split("<body>")[1].rsplit("<script>", 1)[0]
    assert wanted in body
    assert not re.search(
        r"<(script|iframe)|<[^>]*\son\w+=|javascript:|href=.data:|<[^>]*src=.http", body
    )


def test_a_viewer_is_complete_in_itself_and_silent(
    tmp_path: Path,
    shown: Shown,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    widgets.show_scene(cloud(), 'A "cloud".')
    assert "viser" not in "".join(capfd.readouterr())
    html = page_of(tmp_path, shown)
    assert external_requests(html) == [] and len(html) < 1_500_000
    assert "data-document=" in html and "alt='A \"cloud\".'" in html
    assert "'unsafe-eval'" in html.split("</head>")[0]
    assert "'unsafe-eval'" not in page_of(tmp_path, []).split("</head>")[0]
    shown.clear()
    monkeypatch.setitem(sys.modules, "viser", None)  # the still picture stands alone
    widgets.show_scene(cloud(), "A cloud.")
    html = page_of(tmp_path, shown)
    assert "pip install viser" in html and "data-document=" not in html


def test_long_tables_fold_and_figures_keep_their_intervals() -> None:
    table = "<table><tr><th>a</th></tr>{}</table>"
    short = pages._region(table.format("<tr><td>1.00 [0.50, 2.00]</td></tr>"), "T")
    assert '<td class="one-line number">1.00 [0.50, 2.00]</td>' in short and "<details" not in short
    long = pages._region(table.format("<tr><td>text</td></tr>" * 20), "T")
    assert "<summary>T, 20 rows</summary>" in long and "one-line" not in long


def test_units_stand_apart_and_names_are_for_people(make_notebook: Callable[..., Path]) -> None:
    cell = "a = 1.0  # degrees; of the camera\nb = 2  # a number\nc = 0.0  # views' coverage"
    rows = pages._parameter_rows(nbformat.read(make_notebook("p", parameters=cell), 4), None)
    told = [("degrees", "of the camera"), ("", "a number"), ("", "views' coverage")]
    assert [(row["unit"], row["comment"]) for row in rows] == told
    names = {"psnr": "PSNR, dB", "gate_duration_s": "gate duration, s", "samples_per_s": None}
    for name, text in names.items():
        assert _html.words(name) == (text or "samples per s")


def test_how_values_are_written() -> None:
    for name, values in {
        "number": {None: "unknown", True: "yes", 12_345.6: "12,346", 0.1234: "0.123"},
        "duration": {1.25: "1.2 s", 59.0: "59 s", 61.0: "1 min 1 s", 7_260.0: "2 h 1 min"},
        "usd": {0.0: "$0", 0.004: "$0.0040", 1.5: "$1.50"},
        "size": {None: "", 3 << 20: "3 MiB", 3 << 30: "3.00 GiB"},
        "moment": {"": "unknown time", "2026-01-02T03:04:05": "2026-01-02 03:04 UTC"},
        "literal": {"a": '"a"', "a" * 300: '"' + "a" * 196 + "..."},
    }.items():  # fmt: skip
        for value, text in values.items():
            assert _html.FILTERS[name](value) == text


def test_redrawn_lines_keep_their_last_state() -> None:
    text = "a\rb\rc\nstep:  40%|####  | 4/10 [00:01<00:02]\nend\r\n"
    output = nbformat.v4.new_output("stream", name="stderr", text=text)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])])
    pages._tidy(notebook)
    assert notebook.cells[0].outputs[0].text == "c\nend\n"


def test_figures_over_time_oldest_first() -> None:
    runs = [
        RunRecord("n", "finished", "PASS", name="a", metrics={"psnr": float(value)}, cost_usd=0.1)
        for value in (3, 2, 1)  # newest first
    ]
    once = RunRecord("n", "finished", "GO", name="b", metrics={"psnr": 9.0})
    refused = RunRecord("n", "finished", "REFUSED", name="a", metrics={"psnr": 9.0})
    (row,) = overview.histories([refused, *runs, once])
    assert (row["name"], row["runs"]) == ("a", 3)
    psnr, time = row["lines"]
    assert psnr["values"] == [1.0, 2.0, 3.0] and time["name"] == "duration_s"
    heights = [float(point.split(",")[1]) for point in psnr["points"].split()]
    assert heights == sorted(heights, reverse=True)  # a rising figure rises: y grows downwards


def test_the_index_of_many_runs_is_small_and_asks_for_pictures_late(tmp_path: Path) -> None:
    Image.new("RGB", (9, 3)).save(tmp_path / "one.png")
    summary = {"bin": "all", "psnr": 20.0, "psnr_low": 19.0, "psnr_high": 21.0}
    for number in range(100):
        folder = tmp_path / "r" / "runs" / f"{number:03d}"
        folder.mkdir(parents=True)
        record = RunRecord(
            "03_full_train",
            "finished",
            "PASS",
            "</script><b>",
            name=f"name-{number % 7}",
            params={"steps": number},
            metrics={"psnr": 20.0, "summaries": {"cvs": [summary]}, "gate": {"empty": 0.5}},
            artifacts={"thumbnail": "thumbnail.png", "secret": "../../../one.png"},
            started_utc=f"2026-01-01T{number // 60:02d}:{number % 60:02d}:00+00:00",
        )
        record.write(folder)
        (folder / "thumbnail.png").write_bytes((tmp_path / "one.png").read_bytes())
    html = overview.index(tmp_path / "r").read_text()
    assert len(html) < 500_000 and html.count('loading="lazy"') == 100
    assert "data:image" not in html and external_requests(html) == []
    assert html.count("</script>") == 2  # no record's text can end the data
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])  # type: ignore[index]
    first = data["runs"][0]
    assert first["params"] == {"steps": 99} and first["name"] == f"name-{99 % 7}"
    assert first["metrics"] == {"psnr": [20.0, 19.0, 21.0], "gate: empty": [0.5, None, None]}
    assert first["pictures"] == {} and first["thumbnail"] == "runs/099/thumbnail.png"


def test_the_front_page_tells_ones_own_runs_from_the_study(tmp_path: Path) -> None:
    def keep(place: str, name: str, notebook: str = "03_full_train", **more: Any) -> RunRecord:
        record = RunRecord(notebook, "finished", "PASS", name=name, **more)
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "report.html").write_text("x")
        record.write(tmp_path / place)
        return record

    took = {"peak_memory_bytes": 5e9, "compile_s": 1.0, "loss_fall": 4.0, "psnr": 20.0}
    keep("runs/1", "03-own", metrics=took, cost_usd=1.5, duration_s=60.0)
    keep("published/study/a", "03-gated-s0", cost_usd=40.0, duration_s=4000.0)
    headline = {"figure": "97 %", "of": "of the <light>"}
    keep("published/study/b", "04", "04_analyze", metrics={"headline": headline}, summary="So.")
    seeds = [
        RunRecord("03_full_train", "finished", verdict, name=name, metrics={"psnr": psnr}).to_dict()
        for name, verdict, psnr in (
            ("03-gated-s0", "PASS", 20.0), ("03-gated-s1", "FAIL", 22.0), ("03-lone-s0", "GO", 30),
        )
    ]  # fmt: skip
    fine = {"luminance_ratio": 1.0, "coverage_ratio": 1.0, "psnr": 20.0, "ssim": 0.8}
    sums = {"cvs": [fine], "copy_input": [fine | {"ssim": 0.7, "psnr": 19.0}]}
    seeds[0] |= {"params": {"model": "cvs"}}
    seeds[0]["metrics"]["summaries"] = sums | {"decoder render": [fine | {"ssim": 0.82}]}
    table = "\n".join(map(json.dumps, seeds))
    (tmp_path / "published/study" / overview.TABLE_NAME).write_text(table)
    lone, gated = overview.study(tmp_path / "published/study" / overview.TABLE_NAME, [])
    assert gated["figures"]["psnr"] == pytest.approx((21.0, 2**0.5)) and gated["seeds"] == 2
    assert gated["what"].startswith("the decoder's views of B"), "as study.yaml has it"
    assert (lone["arm"], lone["what"]) == ("lone", "") and lone["figures"]["psnr"][0] == 30
    assert gated["verdicts"] == [("NOT BETTER", 1), ("FAIL", 1)], "by today's rule"
    assert gated["then"] == [("PASS", 1), ("FAIL", 1)] and lone["then"] == []
    assert overview.verdict_today({"model": "cvs"}, {"summaries": sums}, "FAIL") == "PASS"
    html = overview.index(tmp_path).read_text()
    own, published = html.split('id="study"')
    assert "then: PASS" in published
    assert "$1.50" in own and "$41.50" not in html and "1 run, newest first" in own
    assert ">03-own<" in own and ">03-gated-s0<" not in own and ">03-gated-s0<" in published
    assert '<a href="published/study/a/report.html">gated</a>, 2 seeds' in published
    assert own.index("97 %") < own.index("So.") < own.index("Your runs") and "&lt;light&gt;" in own
    figures = own[own.index(">03-own<") :]
    assert figures.index("PSNR, dB") < figures.index("loss fall") < figures.index("memory")
    html = overview.index(tmp_path / "published").read_text()
    assert "Your runs" not in html and 'id="study" open' in html, "the same, without one's own"


def test_the_published_index_is_what_would_be_made_today(tmp_path: Path) -> None:
    """Its verdicts are those of today's rule, computed from the runs' figures."""
    published = project_root() / "reports" / "published"
    shutil.copytree(published, tmp_path / "published")
    made = overview.index(tmp_path / "published").read_text()
    assert made == (published / "index.html").read_text()
    assert "what ships: refine" in made
