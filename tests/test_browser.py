"""The pages in a real browser: from file://, without a network, by clicking.

Skipped where there is no Chromium or no playwright; `./run_all.sh test` installs the browser where
it may. Playwright's own browsers are not used.
"""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Shown
from PIL import Image
from test_pages import page_of

from fresnel.report import run as report
from fresnel.report.record import RunRecord, Stage
from fresnel.scene.cameras import orbit
from fresnel.scene.gaussians import Gaussians
from fresnel.show import charts, credits, pictures, scenes, style

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine: apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is missing")

pytestmark = pytest.mark.xdist_group("browser")
AXE = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
OURS = ("file:", "data:", "blob:", "about:")

# what a screen reader would say of each figure: its pictures' descriptions
TOLD = """(figures) => figures.map((figure) => [...figure.querySelectorAll("img, svg[role=img]")]
    .map((picture) => picture.getAttribute("alt") || picture.getAttribute("aria-label") || "")
    .join(""))"""

PARAMETERS = 'image_size = 64  # pixels\nseed = 0  # of the poses\noutput_dir = ""\n'
SHOW = """\
import torch
from fresnel.show import charts, pictures, style, widgets
from fresnel.report import record
from fresnel.scene.cameras import orbit
from fresnel.scene.gaussians import Gaussians
run = record.start("tiny", dict(seed=seed), output_dir)
torch.manual_seed(seed)
means, ones = 0.2 * torch.randn(100, 3), torch.ones(100)
quats = torch.tensor([1.0, 0, 0, 0]).expand(100, 4)
many = Gaussians(means, quats, 0.02 * torch.ones(100, 3), 0.9 * ones, torch.rand(100, 3))
size = dict(focal_px=77, width=64, height=64)
cameras = orbit(torch.arange(8) * 45.0, 10.0, 2.0, pivot=(0, 0, 0), **size)
scene = widgets.scene(many, cameras, cameras[0], torch.zeros(3))
widgets.show_scene(scene, "100 Gaussians, eight cameras around them.", height_px=200)
frusta = charts.camera_frusta(cameras, cameras[0], pivot=[0, 0, 0], content=means.numpy())
style.show(frusta, "Eight cameras stand around the cloud.")"""
PICTURES = """\
views = [torch.rand(64, 64, 3) for _ in range(9)]
pictures.show_sheet([views, views], "Nine pictures of noise, twice.", columns=list("abcdefghi"),
                    labels=["one", "two"])
pictures.show_pair(views[:2], views[1:3], ("noise", "more noise"), "Two pictures of noise.")
pictures.show_steps({"one": views[:3], "two": views[3:6]}, ["0", "90", "180"], "Noise that turns.")
rows = [dict(step=i, loss=1 / (i + 1)) for i in range(20)]
light = {"luminance ratio": ([0, 10, 20], [0.0, 0.0, 0.01])}
style.show(charts.loss_curves(rows, against=light), "The loss falls, the light stays at 0.")
lines = ["| a | b |", "|---|---|", *(f"| {i} | {i}.00 [0.1, 2] |" for i in range(20))]
style.show_table("\\n".join(lines))"""
FINISH = (
    'run.metric("psnr", 21.5)\nrun.finish("FAIL", "All of it is noise.", ["there is no object"])'
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # software WebGL, so that a machine without a GPU draws splats too
    arguments = ["--no-sandbox", "--enable-unsafe-swiftshader"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


class Visit:
    """A page that was opened without a network, and what its console and its requests said."""

    def __init__(self, browser: Any, path: Path, width: int = 1440, **options: Any) -> None:
        size = {"width": width, "height": 900}
        self.context = browser.new_context(offline=True, viewport=size, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.resolve().as_uri())

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *exception: Any) -> None:
        self.context.close()
        if exception[0] is None:
            assert self.errors == []
            assert [url for url in self.requests if not url.startswith(OURS)] == []


def violations(page: Any) -> list[str]:
    """What axe-core finds on the page, however small, everything unfolded."""
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found for node in rule["nodes"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a real run of a small notebook with one of everything."""
    import nbformat

    new = nbformat.v4
    lead = "# A tiny run\n\n**Question.** Is it noise?\n\n**Stopping rule, fixed before.** None."
    cells = [new.new_markdown_cell(lead), new.new_code_cell(PARAMETERS)]
    cells[1].metadata["tags"] = ["parameters"]
    for title, code in (("In 3D", SHOW), ("Pictures", PICTURES), ("Verdict", FINISH)):
        cells += [new.new_markdown_cell(f"## {title}"), new.new_code_cell(code)]
    notebook = new.new_notebook(cells=cells)
    folder = tmp_path_factory.mktemp("tiny")
    nbformat.write(notebook, folder / "tiny.ipynb")
    done = report.run(folder / "tiny.ipynb", {"seed": 3}, "tiny", folder / "r", progress=False)
    assert not done.crashed, done.record.error
    return done.report


@pytest.fixture(scope="module")
def page(browser: Any, tiny: Path) -> Iterator[Any]:
    """The report, opened once; what its console and its requests said is judged at the end."""
    assert tiny.stat().st_size < 3_000_000
    with Visit(browser, tiny) as opened:
        yield opened


def test_contents_code_and_theme_answer_to_clicks(page: Any) -> None:
    assert page.locator("h1").count() == 1 and page.locator(".badge.big").is_visible()
    assert "All of it is noise." in page.locator("header .answer").inner_text()
    assert page.locator(".lead dt").all_inner_texts() == ["Question", "Stopping rule, fixed before"]
    page.locator("nav.toc a", has_text="Verdict").click()
    page.wait_for_function("location.hash === '#verdict' && scrollY > 0")
    assert page.locator("h2#verdict").is_visible()
    code, button = page.locator("details.code pre").first, page.locator("#code")
    assert not code.is_visible()
    button.click()
    assert code.is_visible() and button.get_attribute("aria-pressed") == "true"
    assert button.inner_text() == "Hide code"
    button.press("Enter")
    assert not code.is_visible()

    def colors() -> list[str]:
        return page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            "getComputedStyle(document.querySelector('.picture svg text')).fill]"
        )

    light, theme = colors(), page.locator("#theme")
    theme.click(click_count=2, delay=20)
    dark = colors()
    assert theme.inner_text() == "Theme: dark"
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.reload()
    assert theme.inner_text() == "Theme: dark" and colors() == dark
    theme.click()
    assert colors() == light
    changed = page.locator(".params tr.changed")
    page.locator(".params summary").click()
    assert "seed" in changed.inner_text() and "changed" in changed.inner_text()
    assert "pixels" in page.locator(".params").inner_text()


def test_a_slider_parts_two_pictures(page: Any) -> None:
    slider = page.locator(".fresnel-pair input")
    upper = page.locator(".fresnel-pair img + img").last
    clip = "(image) => getComputedStyle(image).clipPath"
    middle = upper.evaluate(clip)
    slider.focus()
    slider.press("End")
    assert slider.input_value() == "100" and upper.evaluate(clip) != middle
    slider.click(position={"x": 4, "y": 6})
    assert float(slider.input_value()) < 10


def test_a_slider_steps_through_pictures_and_any_is_enlarged_by_a_click(page: Any) -> None:
    figure = page.locator(".fresnel-steps")
    strip = figure.locator("img").last
    place = "(image) => image.getBoundingClientRect().x"
    before, width = strip.evaluate(place), figure.locator("img").last.bounding_box()["width"]
    figure.locator("input").focus()
    figure.locator("input").press("ArrowRight")
    assert figure.locator("output").inner_text() == "90"
    assert strip.evaluate(place) == pytest.approx(before - width / 3, abs=1)
    picture = page.locator("figure.picture").first
    drawn, dialog = picture.locator("svg, img"), page.locator("dialog.zoom")
    small = drawn.bounding_box()["width"]
    picture.locator("button.enlarge").click()
    assert dialog.is_visible() and drawn.count() == 0
    assert dialog.locator("svg, img").bounding_box()["width"] > 1.1 * small
    page.keyboard.press("Escape")
    page.wait_for_function("document.querySelector('figure.picture').querySelector('svg, img')")
    assert not dialog.is_visible() and drawn.count() == 1
    cells = page.locator("figure.picture:has(.fresnel-sheet) image").count()
    sheet = page.locator(".fresnel-sheet").bounding_box()["width"]
    assert cells == 9 and sheet / 9 > 200, "as small as nobody wants to look at them"


def test_the_viewer_draws_splats_and_gives_way_to_the_still(page: Any) -> None:
    figure = page.locator(".fresnel-viewer")
    still, frame, button = (figure.locator(name) for name in ("img", "iframe", "button"))
    assert still.is_visible() and not frame.is_visible()
    button.click()
    page.frame_locator(".fresnel-viewer iframe").locator("canvas").first.wait_for()
    for _ in range(60):
        page.wait_for_timeout(200)
        with Image.open(io.BytesIO(frame.screenshot(timeout=60_000))) as picture:
            middle = np.asarray(picture.convert("RGB"))[40:160, 250:600]
        if len(np.unique(middle.reshape(-1, 3), axis=0)) > 100:
            break
    else:
        pytest.fail("the viewer never drew the cloud")
    assert not still.is_visible() and button.inner_text() == "Show the still picture"
    button.click()
    assert still.is_visible() and not frame.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_viewer_alone_is_of_the_object_in_the_readers_theme(
    browser: Any, tmp_path: Path, scheme: Any
) -> None:
    """And its console has nothing to say (see `Visit`)."""
    import torch

    means = torch.nn.functional.normalize(torch.randn(300, 3), dim=-1)
    means = means * torch.tensor([0.1, 0.3, 0.1])
    turns, scales = torch.tensor([[1.0, 0, 0, 0]]).expand(300, 4), torch.full((300, 3), 0.05)
    green = torch.tensor([[0.0, 1.0, 0.0]]).expand(300, 3)
    egg = Gaussians(means, turns, 0.4 * scales, torch.ones(300), green)
    size = {"focal_px": 77, "width": 64, "height": 64}
    cameras = orbit(torch.arange(8) * 45.0, 10.0, 2.2, pivot=(0, 0, 0), **size)
    shown = scenes.scene(egg, cameras, cameras[0], torch.zeros(3))
    (tmp_path / "viewer.html").write_text(scenes.page(shown, "</script>An egg"))
    with Visit(browser, tmp_path / "viewer.html", 390, color_scheme=scheme) as page:
        page.locator("canvas").first.wait_for()
        for _ in range(60):
            page.wait_for_timeout(200)
            with Image.open(io.BytesIO(page.screenshot(timeout=60_000))) as picture:
                seen = np.asarray(picture.convert("RGB")).astype(int)
            egg_at = (seen[..., 1] > 150) & (seen[..., 0] < 60) & (seen[..., 2] < 60)
            if egg_at.sum() > 1000:
                break
        rows, columns = (egg_at.any(axis=axis).nonzero()[0] for axis in (1, 0))
        assert 60 < columns[-1] - columns[0] < 250 < rows[-1] - rows[0] < 390
        assert abs(columns[[0, -1]].mean() - 195) < 25 and abs(rows[[0, -1]].mean() - 450) < 25
        assert (seen[850, 195] > 230).all() if scheme == "light" else (seen[850, 195] < 40).all()
        assert page.title() == "</script>An egg"


def test_a_report_is_accessible(browser: Any, page: Any, tiny: Path) -> None:
    told = page.locator("main figure").evaluate_all(TOLD)
    assert len(told) >= 2 and all(told) and "Figure without a description" not in told
    broken = "[...document.images].filter((i) => i.complete && !i.naturalWidth).length"
    assert page.evaluate(broken) == 0
    for width, scheme in ((1440, "light"), (390, "light"), (390, "dark"), (1440, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert violations(page) == [], (width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.emulate_media(media="print", color_scheme="light")
    kept = "(all) => all.map((each) => getComputedStyle(each).breakAfter)"
    assert set(page.locator("main h2, .cell.prose").evaluate_all(kept)) == {"avoid"}
    assert (
        not page.locator("#code").is_visible() and not page.locator(".enlarge").first.is_visible()
    )


@pytest.fixture(scope="module")
def overview(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index over five runs and a damaged one."""
    reports = tmp_path_factory.mktemp("reports")
    summaries = {
        name: [{"bin": "all", "psnr": psnr, "psnr_low": psnr - 1, "psnr_high": psnr + 1}]
        for name, psnr in (("cvs", 20.0), ("better", 25.0))
    }
    kinds = [("control", "FAIL", 20.0), ("corrected", "PASS", 25.0), ("control", "FAIL", 18.5)]
    for number, (name, verdict, score) in enumerate([*kinds, *kinds[:2]]):
        folder = reports / "runs" / f"{number}"
        folder.mkdir(parents=True)
        RunRecord(
            *("03_full_train" if number % 2 else "01_validate_data", "finished", verdict),
            summary=f"Run number {number}.",
            name=name,
            title=f"What about <{number}>?",
            params={"steps": 100 * (number // 2), "seed": 0},
            metrics={"psnr": score, "summaries": summaries},
            provenance={"git": {"commit": f"{number}" * 40, "dirty": False, "changed": []}},
            stages=(Stage("train", 1.0, 2**30),),
            artifacts={"thumbnail": "thumbnail.png", "views": "views.png"},
            started_utc=f"2026-01-0{number + 1}T00:00:00+00:00",
            duration_s=10.0 * (6 - number),
            cost_usd=0.5,
        ).write(folder)
        for file in ("thumbnail.png", "views.png"):
            Image.new("RGB", (90, 30), (40 * number, 90, 120)).save(folder / file)
    (reports / "runs/5").mkdir()
    (reports / "runs/5/results.json").write_text("{")
    (reports / "runs/6").mkdir()
    odd = RunRecord("n", "finished", "PASS", provenance={"cpu": "text", "datasets": [3]})
    odd.write(reports / "runs/6")
    return report.index(reports)


def test_the_index_filters_orders_and_compares(browser: Any, overview: Path) -> None:
    with Visit(browser, overview) as page:
        runs = page.locator(".run:not([hidden])")
        assert runs.count() == 5 and "2 damaged" in page.locator("main").inner_text()

        def names() -> list[str]:
            return page.locator(".run:not([hidden]) .summary").all_text_contents()

        assert names() == [f"Run number {i}." for i in (4, 3, 2, 1, 0)]
        page.locator("#sort").select_option("metric psnr")
        assert names() == [f"Run number {i}." for i in (4, 1, 3, 0, 2)]
        page.locator("#sort").select_option("duration_s")
        assert names()[0] == "Run number 0."
        page.locator("#notebook").select_option("03_full_train")
        assert runs.count() == 2 and page.locator("#shown").inner_text() == "2 of 5 shown"
        page.locator("#notebook").select_option("")
        page.locator("[data-verdict=PASS]").click()
        assert sorted(names()) == ["Run number 1.", "Run number 4."]
        page.locator("[data-verdict=PASS]").click()
        page.locator("#search").fill("about <2>")
        assert names() == ["Run number 2."]
        page.locator("#search").fill("")
        assert runs.count() == 5
        assert page.locator(".histories tbody tr").count() == 2
        assert page.locator(".histories .spark").count() >= 4

        boxes = dict(zip(names(), page.locator(".pick input").all(), strict=True))
        panel = page.locator("#comparison")
        boxes["Run number 1."].check()
        assert "Pick a second run" in panel.inner_text()
        assert "compare=1" in page.url
        boxes["Run number 0."].check()
        text, first = panel.inner_text(), panel.locator("figure img").first
        assert "control beside corrected" in text  # the older run first
        assert "20 [19, 21]" in text and "25 [24, 26]" in text and "+5 *" in text
        assert "All equal." in text and panel.locator("figure img").count() == 2
        first.scroll_into_view_if_needed()
        assert first.evaluate("(image) => image.naturalWidth") == 90
        assert "000000000000" in text and "111111111111" in text and "differs" in text
        assert violations(page) == []
        boxes["Run number 4."].check()
        assert "control beside corrected beside corrected" in panel.inner_text()
        assert panel.locator("figure img").count() == 3 and "+5 *" not in panel.inner_text()
        page.locator("#view").click()
        page.locator("#table button", has_text="PSNR, dB").click()
        rows = page.locator("#table tbody tr")
        assert rows.count() == 5 and rows.first.inner_text().startswith("corrected")
        page.locator("[data-verdict=PASS]").click()
        assert rows.count() == 2 and not page.locator(".run").first.is_visible()
        address = page.url
        page.goto("about:blank")
        page.goto(address)  # what somebody sees to whom it was sent
        assert rows.count() == 2 and panel.locator("figure img").count() == 3
        assert page.locator("#sort").input_value() == "metric psnr"
        panel.locator("button").click()
        assert not panel.is_visible() and "compare" not in page.url


def test_the_index_fits_a_phone_and_a_dark_room(browser: Any, overview: Path) -> None:
    with Visit(browser, overview, 390, color_scheme="dark") as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert violations(page) == []
        seen = page.locator(".thumb").first
        page.wait_for_function("document.querySelector('.thumb').naturalWidth === 90")
        assert seen.get_attribute("loading") == "lazy"


def test_pages_work_without_scripts(browser: Any, tiny: Path, overview: Path) -> None:
    with Visit(browser, tiny, java_script_enabled=False) as page:
        page.locator("details.code summary").first.click()
        assert page.locator("details.code pre").first.is_visible()
        assert not page.locator("#theme").is_visible()
    with Visit(browser, overview, java_script_enabled=False) as page:
        assert page.locator(".run").count() == 5 and not page.locator(".pick").first.is_visible()


HIT = "window.hit=1;fetch('https://evil.example/f');location='https://evil.example/l'"
EVIL = (
    f"<script>{HIT}</script>",
    f'</script><script>{HIT}</script><img src=x onerror="{HIT}">',
    f"\"'><svg onload=\"{HIT}\"><a href='javascript:{HIT}'>a</a>",
    f"[go](javascript:{HIT}) ![p](https://evil.example/p.png) [on](data:text/html,{HIT})",
    f'<iframe srcdoc="<script>parent.{HIT}</script>"></iframe><base href="//evil.example/">',
    '<meta http-equiv="refresh" content="0;url=//evil.example/m"><form action="//evil.example/">',
    f'<style>@import url(//evil.example/s)</style><details open ontoggle="{HIT}">{{{{7*7}}}}',
    f"<math><mtext></form><mglyph><style></math><img src onerror={HIT}> $x$ `` ` ``",
)
LEADS_AWAY = """[...document.querySelectorAll("[href], [src], [srcdoc], [action]")].map((e) =>
    e.getAttribute("href") || e.getAttribute("src") || e.getAttribute("action") || e.outerHTML
).filter((at) => !/^(#|data:(image|font)\\/|data:,$|(?!javascript)[\\w%.\\/-]+$)/.test(at))"""


def test_no_text_of_a_dataset_runs_or_links(browser: Any, tmp_path: Path, shown: Shown) -> None:
    """As names, manifests, credits, files and Markdown reach a report and the index."""
    noise, rows = torch.rand(8, 8, 3), [{"step": i, "loss": 1.0} for i in (0, 1)]
    said = {"text": " ".join(EVIL)}
    for evil in EVIL:
        style.show_table([{evil: evil, "value": 1.0}])
        shown.append(({"text/markdown": f"| {evil} |\n|---|\n| {evil} |"}, {}))
        keys = ("title", "author", "licence", "source")
        credits.show_credits([dict.fromkeys(keys, evil)])
        pictures.show_pair(noise, noise, (evil, evil), evil)
        style.show(charts.loss_curves(rows, against={evil: ([0, 1], [0.0, 1.0])}), evil)
    folder = tmp_path / "runs" / "".join(c for c in said["text"] if c not in "/\0")[:200]
    folder.mkdir(parents=True)
    texts = dict.fromkeys(("summary", "name", "title", "error"), said["text"])
    origin = {
        "git": {"commit": EVIL[0], "dirty": True, "changed": list(EVIL)},
        "datasets": [{"path": evil, "objects": 1, "content_hash": evil} for evil in EVIL],
        "packages": dict.fromkeys(EVIL, "1"),
        **{"cpu": {"model": EVIL[1]}, "python": EVIL[2], "gpu": EVIL[3], "other": list(EVIL)},
    }
    many = {"params": dict.fromkeys(EVIL, 1), "metrics": {**dict.fromkeys(EVIL, EVIL[0]), "a": 1.0}}
    text = "# T " + "\n\n".join(EVIL).replace("https:", "")  # prose may link, data not
    page_of(folder, shown, text, **texts, **many, reasons=EVIL, notes=EVIL, provenance=origin)
    for path in (report.index(tmp_path), folder / "executed.html"):
        with Visit(browser, path) as page:
            assert page.locator("h1").first.is_visible()
            page.wait_for_timeout(200)
            assert page.evaluate("window.hit") is None and "evil" not in page.url.split("/")[2]
            assert page.evaluate(LEADS_AWAY) == []


def test_a_script_that_got_into_a_page_is_not_run(
    browser: Any, tmp_path: Path, shown: Shown
) -> None:
    """The policy stands behind the escaping: it names our scripts by their hashes."""
    page_of(tmp_path, [({"text/html": EVIL[0] + f'<img src=x onerror="{HIT}">'}, {})])
    visit = Visit(browser, tmp_path / "executed.html")
    visit.page.wait_for_timeout(300)
    assert visit.page.evaluate("window.hit") is None
    assert len(visit.errors) >= 2 and all("Content Security Policy" in e for e in visit.errors)
    assert all(url.startswith(OURS) for url in visit.requests)
    assert visit.page.locator("#theme").is_visible()  # ours did
    visit.context.close()
