import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import external_requests

from fresnel.report import run as report
from fresnel.report.index import index
from fresnel.report.params import Parameter, ParameterError, check_parameters, read_parameters
from fresnel.report.record import RunRecord

ROOT = Path(__file__).resolve().parent.parent
PARAMETERS = """\
rate = 1.0e-4  # Adam step
steps = 3  # optimiser steps
name = "chair"
flag = True
bins = [30.0, 60.0]  # degrees
limit: float | None = None  # seconds
price_per_hour_usd = 3600.0  # USD
output_dir = ""
"""
START = """\
from fresnel.report import record
run = record.start("tiny", dict(rate=rate, steps=steps), output_dir,
                   price_per_hour_usd=price_per_hour_usd)"""
FIGURE = """\
import base64, sys, time
from IPython.display import HTML, display
from tqdm.auto import tqdm
png = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
       "rkJggg==")
display({"image/png": png}, raw=True, metadata={"image/png": {"alt": "One pixel, <red>"}})
display({"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' width='5' height='5'></svg>"},
        raw=True, metadata={"image/svg+xml": {"alt": "An empty square"}})
for _ in tqdm(range(3), desc="going"):
    pass
print("python is", sys.executable)"""
FINISH = (
    'run.metric("psnr", 21.5)\nrun.finish("FAIL", "Six of <8> views are empty.", ["alpha is 0"])'
)
Maker = Callable[..., Path]
GIVEN = {"steps": 5, "rate": 1}


@pytest.fixture
def tiny(make_notebook: Maker) -> Path:
    cells = "# Is **this** fit?\n\nA question.", START, "## Look at it", FIGURE, "## Verdict"
    return make_notebook("tiny", *cells, FINISH, parameters=PARAMETERS)


def test_a_run_ends_as_one_page_that_stands_alone_and_papermill_gives_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = report.run(tiny, GIVEN, "first", tmp_path / "r", progress=False)
    assert (done.record.status, done.record.verdict) == ("finished", "FAIL")
    files = {"executed.ipynb", "report.html", "results.json", "thumbnail.png"}
    assert {path.name for path in done.directory.iterdir()} == files and not done.crashed
    data = json.loads((done.directory / "results.json").read_text())
    assert data["params"] == {"rate": 1.0, "steps": 5}
    assert (data["name"], data["title"], data["notebook"]) == ("first", "Is this fit?", "tiny")
    assert data["cost_usd"] == pytest.approx(data["duration_s"]) and data["duration_s"] > 0

    html = done.report.read_text()
    assert external_requests(html) == [] and "default-src 'none'" in html
    assert html.count("<h1>") == 1 and "<h1>Is this fit?</h1>" in html
    assert "Six of &lt;8&gt; views are empty." in html and "alpha is 0" in html
    assert 'alt="One pixel, &lt;red&gt;"' in html and 'alt="An empty square"' in html
    assert '<h2 id="look-at-it">' in html and 'href="#look-at-it"' in html
    assert "optimiser steps" in html and "going" not in html.split("<main")[1].split("Code,")[0]
    assert '<details class="code">' in html and '<details class="code" open' not in html
    assert f"python is {sys.executable}" in html

    overview = index(tmp_path / "r").read_text()
    assert external_requests(overview) == []
    assert f'href="runs/{done.directory.name}/report.html"' in overview
    assert all(text in overview for text in ("psnr", "21.5", f"runs/{done.directory.name}/thumb"))

    import papermill
    from papermill.engines import papermill_engines

    monkeypatch.setattr(report, "reports_folder", lambda _=None: tmp_path / "direct")
    papermill_engines.register("fresnel", report.Engine)

    def execute(**params: object) -> None:
        options = {"engine_name": "fresnel", "kernel_name": "python3", "language": "python"}
        target = str(tmp_path / "out.ipynb")
        papermill.execute_notebook(str(tiny), target, params, progress_bar=False, **options)

    for wrong, message in (({"step": 3}, "did you mean 'steps'"), ({"steps": "x"}, "got 'x'")):
        with pytest.raises(ParameterError, match=message):
            execute(**wrong)
    assert not (tmp_path / "direct").exists(), "refused before anything ran"
    execute(**GIVEN)
    (folder,) = (tmp_path / "direct" / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == files
    assert RunRecord.read(folder).params == done.record.params
    assert (tmp_path / "direct" / "index.html").is_file()
    assert "papermill" in (tmp_path / "out.ipynb").read_text()

    def told(place: Path) -> str:
        """A page without what differs from run to run: folder, times, sizes."""
        main = (place / "report.html").read_text().split("<main")[1].split("<section class")[0]
        return main.replace(str(place), "")

    assert told(folder) == told(done.directory)


def test_runs_at_once_do_not_collide_and_equal_ones_wait(
    make_notebook: Maker, tmp_path: Path
) -> None:
    notebook = make_notebook("pair", START, FINISH, parameters=PARAMETERS)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(report.run, notebook, {"steps": n}, "p", tmp_path) for n in (1, 2, 2)]
        one, two, same = (run.result() for run in runs)
        assert [run.record.params["steps"] for run in (one, two)] == [1, 2]
        assert one.directory != two.directory == same.directory
        assert sorted(run.record.cached is not None for run in (two, same)) == [False, True]
        list(pool.map(index, [tmp_path] * 3))
    assert "2 runs" in (tmp_path / "index.html").read_text()


def test_the_kernel_is_this_python_whatever_is_installed(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "jupyter" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "wrong", "language": "python"}
    (wrong / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.chdir(tmp_path)
    show = "import os, sys, fresnel\nprint(sys.executable, fresnel.__file__)"
    done = report.run(make_notebook("which", show), reports_dir=tmp_path / "r{1}")
    assert not done.crashed, done.record.error
    output = nbformat.read(done.directory / "executed.ipynb", 4).cells[0].outputs[0].text
    assert sys.executable in output and str(ROOT) in output


def test_parameters_are_checked_before_anything_runs(tiny: Path, tmp_path: Path) -> None:
    known = read_parameters(tiny)
    assert list(known)[:3] == ["rate", "steps", "name"]
    assert known["rate"] == Parameter("rate", 1e-4, "Adam step")
    assert known["limit"] == Parameter("limit", None, "seconds")
    good = check_parameters(known, {"rate": 2, "limit": 3.5, "bins": (1, 2), "flag": False})
    assert good == {"rate": 2.0, "limit": 3.5, "bins": [1.0, 2.0], "flag": False}
    assert type(good["rate"]) is float
    for given, message in [
        ({"step": 3}, r"no parameter 'step'; did you mean 'steps'\?"),
        ({"rate": "1e-4"}, r"rate: got '1e-4' \(a text\), want a number.*write 1\.0e-4"),
        ({"steps": 2.5}, r"steps: got 2\.5 \(a number\), want a whole number"),
        ({"steps": True}, r"steps: got True \(true or false\), want a whole number"),
        ({"name": 3}, "name: got 3"),
        ({"bins": ["x"]}, r"bins: got \['x'\] \(a list\), want a list such as \[30\.0, 60\.0\]"),
        ({"rate": None}, "rate: got None"),
        ({"rate": True, "steps": "x"}, "rate: got True.*; parameter steps: got 'x'"),
    ]:
        with pytest.raises(ParameterError, match=message):
            report.run(tiny, given, reports_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_parameters_from_a_command_line() -> None:
    cases = [(1.0, "1e-4", 1e-4), (1, "-3", -3), (True, "false", False), ("x", "1", "1")]
    for default, text, value in [*cases, ([1.0], "[1, 2]", [1.0, 2.0]), (None, "text", "text")]:
        assert Parameter("a", default).parse(text) == value
    for default, text, want in ((1, "x", "a whole number"), (True, "maybe", "true or false")):
        with pytest.raises(ParameterError, match=rf"a: got '{text}' \(a text\), want {want}"):
            Parameter("a", default).parse(text)


@pytest.mark.parametrize("source", ["a = b", "import os", "a.b = 1", "a = ", "a = [x for x in y]"])
def test_a_parameters_cell_holds_literals_only(make_notebook: Maker, source: str) -> None:
    with pytest.raises(ParameterError, match="parameter"):
        read_parameters(make_notebook("p", parameters=source))


def test_index_lists_damaged_records_published_ones_and_copies_once(tmp_path: Path) -> None:
    assert "Nothing has been run yet" in index(tmp_path / "none").read_text()
    copies = [("runs/e", 5), ("published/e", 5), ("runs/f", 6), ("published/f", 6)]
    singles = [("runs/a", 1), ("published/b", 2), ("runs/c", 3), ("runs/d", 4), ("runs/g", 7)]
    for place, day in [*singles, *copies]:
        (tmp_path / place).mkdir(parents=True)
        stamp, name = f"2026-01-0{day}T00:00:00+00:00", place[-1] * 3
        stamp = "yesterday" if place == "runs/g" else stamp
        RunRecord("n", "finished", "GO", name=name, started_utc=stamp).write(tmp_path / place)
    for place in ("runs/e", "published/f"):
        (tmp_path / place / "report.html").write_text("<p>page</p>")
    (tmp_path / "runs/c/results.json").write_text("{")
    (tmp_path / "runs/d/thumbnail.png").write_bytes(b"no picture")
    (tmp_path / "remote/box.partial").mkdir(parents=True)  # not yet fetched
    RunRecord("n", "finished", "GO", name="zzz").write(tmp_path / "remote/box.partial")
    html = index(tmp_path).read_text()
    assert "3 runs" in html and "2 damaged" in html and "runs/c/results.json: is not valid" in html
    assert "yesterday" in html
    places = [html.index(f">{name * 3}<") for name in "edafb"]
    assert places == sorted(places) and html.count("published</span>") == 2
    assert html.index(">aaa<") < html.index("Other published runs") < html.index(">fff<")
    assert html.count("report.html") == 4, "two links, and in the data of the comparison"
    assert 'href="runs/e/report.html"' in html and 'href="published/f/report.html"' in html


def test_what_counts_as_a_request() -> None:
    page = '<a href="https://x.org">x</a><script src="https://cdn.x/a.js"></script>'
    page += "<img src=//h/i.png><style>@import 'http://c/s.css'; a{b:url(https://u)}</style>"
    wanted = ["https://cdn.x/a.js", "//h/i.png", "http://c/s.css", "https://u"]
    assert external_requests(page) == wanted
