from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import external_requests

from fresnel.report import page as pages
from fresnel.report import run as report
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


@pytest.fixture
def tiny(make_notebook: Maker) -> Path:
    cells = [
        "# Is **this** fit?\n\nA question.",
        START,
        "## Look at it",
        FIGURE,
        "## Verdict",
        FINISH,
    ]
    return make_notebook("tiny", *cells, parameters=PARAMETERS)


def test_a_run_ends_as_one_page_that_stands_alone(tiny: Path, tmp_path: Path) -> None:
    done = report.run(tiny, {"steps": 5, "rate": 1}, "first", tmp_path / "r", progress=False)
    assert (done.record.status, done.record.verdict) == ("finished", "FAIL")
    assert not done.crashed
    assert sorted(p.name for p in done.directory.iterdir()) == [
        "executed.ipynb",
        "report.html",
        "results.json",
        "thumbnail.png",
    ]
    data = json.loads((done.directory / "results.json").read_text())
    assert data["params"] == {"rate": 1.0, "steps": 5}
    assert (data["name"], data["title"], data["notebook"]) == ("first", "Is this fit?", "tiny")
    assert data["cost_usd"] == pytest.approx(data["duration_s"]) and data["duration_s"] > 0

    html = done.report.read_text()
    assert external_requests(html) == []
    assert "default-src 'none'" in html
    assert html.count("<h1>") == 1 and "<h1>Is this fit?</h1>" in html
    assert "Six of &lt;8&gt; views are empty." in html and "alpha is 0" in html
    assert 'alt="One pixel, &lt;red&gt;"' in html and 'alt="An empty square"' in html
    assert '<h2 id="look-at-it">' in html and 'href="#look-at-it"' in html
    assert "optimiser steps" in html and "going" not in html.split("<main")[1].split("Code,")[0]
    assert '<details class="code">' in html and '<details class="code" open' not in html
    assert f"python is {sys.executable}" in html

    index = report.index(tmp_path / "r").read_text()
    assert external_requests(index) == []
    assert f'href="runs/{done.directory.name}/report.html"' in index
    assert "psnr" in index and "21.5" in index and f"runs/{done.directory.name}/thumb" in index


def test_a_crash_still_gives_a_report(make_notebook: Maker, tmp_path: Path) -> None:
    notebook = make_notebook(
        "bad", "# T", START, 'print("so far")\n1 / 0', "print('never')", parameters=PARAMETERS
    )
    done = report.run(notebook, reports_dir=tmp_path / "r")
    assert done.crashed and done.record.verdict is None and done.record.badge == "CRASHED"
    assert done.record.error == "Code cell 3 stopped with ZeroDivisionError: division by zero"
    html = done.report.read_text()
    assert html.index("Code cell 3 stopped with ZeroDivisionError") < html.index("so far")
    assert "Traceback" in html and "not run" in html
    assert "papermill-error" not in html


def test_papermill_by_itself_gives_the_same_page(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import papermill
    from papermill.engines import papermill_engines

    monkeypatch.setattr(report, "reports_folder", lambda _=None: tmp_path / "r")
    papermill_engines.register("fresnel", report.Engine)
    target, given = str(tmp_path / "out.ipynb"), {"steps": 5, "rate": 1}

    def execute(**params: object) -> None:
        papermill.execute_notebook(
            str(tiny), target, params, engine_name="fresnel", kernel_name="python3",
            language="python", progress_bar=False,
        )  # fmt: skip

    with pytest.raises(ParameterError, match="did you mean 'steps'"):
        execute(step=3)
    with pytest.raises(ParameterError, match="steps: got 'twelve'"):
        execute(steps="twelve")
    assert not (tmp_path / "r").exists(), "refused before anything ran"
    execute(**given)
    ours = report.run(tiny, given, "tiny", tmp_path / "ours", progress=False)
    (folder,) = (tmp_path / "r" / "runs").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        p.name for p in ours.directory.iterdir()
    )
    assert RunRecord.read(folder).params == ours.record.params
    assert (tmp_path / "r" / "index.html").is_file() and "papermill" in Path(target).read_text()

    def told(page: Path) -> str:
        """A page without what differs from run to run: times, sizes, cell ids."""
        text = re.sub(r"<section class=.end.*?</section>|<p class=.kicker.*?</p>", "",
                      page.read_text(), flags=re.DOTALL)  # fmt: skip
        return text.split("<main")[1]

    assert told(folder / "report.html") == told(ours.report)


def test_a_crash_under_papermill_still_gives_a_report(
    make_notebook: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import papermill
    from papermill.engines import papermill_engines

    monkeypatch.setattr(report, "reports_folder", lambda _=None: tmp_path / "r")
    papermill_engines.register("fresnel", report.Engine)
    kill = "import os, signal\nprint('so far', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    notebook = make_notebook("killed", "# T", START, kill, "1", parameters=PARAMETERS)
    with pytest.raises(papermill.PapermillExecutionError, match="killed from outside"):
        papermill.execute_notebook(
            str(notebook), None, engine_name="fresnel", kernel_name="python3", progress_bar=False
        )
    (folder,) = (tmp_path / "r" / "runs").iterdir()
    assert RunRecord.read(folder).badge == "CRASHED"
    assert "killed from outside" in (folder / "report.html").read_text()


def test_a_killed_kernel_still_gives_a_report(make_notebook: Maker, tmp_path: Path) -> None:
    kill = "import os, signal\nprint('so far', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    notebook = make_notebook("killed", "# T", START, kill, "1", parameters=PARAMETERS)
    done = report.run(notebook, reports_dir=tmp_path / "r")
    assert done.crashed and "killed from outside" in (done.record.error or "")
    html = done.report.read_text()
    assert "killed from outside" in html and "Code, 1 line, not run" in html


def test_a_slow_cell_is_stopped(make_notebook: Maker, tmp_path: Path) -> None:
    notebook = make_notebook("slow", "# T", "import time\ntime.sleep(60)")
    done = report.run(notebook, reports_dir=tmp_path / "r", cell_timeout_s=1)
    assert done.crashed and "took longer" in (done.record.error or "")
    assert done.report.is_file()


def test_a_notebook_without_a_verdict_has_crashed(make_notebook: Maker, tmp_path: Path) -> None:
    done = report.run(
        make_notebook("open", START, parameters=PARAMETERS), reports_dir=tmp_path / "r"
    )
    assert done.crashed and "without a verdict" in (done.record.error or "")


def test_ctrl_c_writes_the_report_and_says_stopped(make_notebook: Maker, tmp_path: Path) -> None:
    marker = tmp_path / "begun"
    wait = f"open({str(marker)!r}, 'w').close()\nimport time\ntime.sleep(60)"
    notebook = make_notebook("long", "# T", START, wait, parameters=PARAMETERS)
    command = [sys.executable, "-m", "fresnel", "run", str(notebook)]
    with subprocess.Popen(
        [*command, "--reports", str(tmp_path / "r")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    (folder,) = (tmp_path / "r" / "runs").iterdir()
    record = RunRecord.read(folder)
    assert record.status == "crashed" and "stopped from outside" in (record.error or "")
    assert (folder / "report.html").is_file()


def at_once(*runs: Callable[[], report.Run]) -> list[report.Run]:
    with ThreadPoolExecutor(len(runs)) as pool:
        return [future.result() for future in [pool.submit(run) for run in runs]]


def test_two_runs_at_once_do_not_collide(make_notebook: Maker, tmp_path: Path) -> None:
    notebook = make_notebook("pair", START, FINISH, parameters=PARAMETERS)
    one, two = at_once(
        *(lambda n=n: report.run(notebook, {"steps": n}, "p", tmp_path) for n in (1, 2))
    )
    assert one.directory != two.directory
    assert [run.record.verdict for run in (one, two)] == ["FAIL", "FAIL"]
    assert [run.record.params["steps"] for run in (one, two)] == [1, 2]
    threads = [threading.Thread(target=report.index, args=(tmp_path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "2 runs" in (tmp_path / "index.html").read_text()


def test_of_two_equal_runs_at_once_one_waits_for_the_other(
    make_notebook: Maker, tmp_path: Path
) -> None:
    notebook = make_notebook("pair", START, FINISH, parameters=PARAMETERS)
    done = at_once(*(lambda: report.run(notebook, None, "p", tmp_path) for _ in range(2)))
    assert done[0].directory == done[1].directory
    assert sorted(run.reused for run in done) == [False, True]


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
        ({"bins": ["x"]}, r"bins\[\.\.\.\]: got 'x'"),
        ({"rate": None}, "rate: got None"),
    ]:
        with pytest.raises(ParameterError, match=message):
            report.run(tiny, given, reports_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_parameters_from_a_command_line() -> None:
    assert Parameter("a", 1.0).parse("1e-4") == 1e-4
    assert Parameter("a", 1).parse("-3") == -3
    assert Parameter("a", True).parse("false") is False
    assert Parameter("a", "x").parse("1") == "1"
    assert Parameter("a", [1.0]).parse("[1, 2]") == [1.0, 2.0]
    assert Parameter("a", None).parse("text") == "text"
    with pytest.raises(ParameterError, match=r"parameter a: got 'x', want a whole number"):
        Parameter("a", 1).parse("x")


@pytest.mark.parametrize("source", ["a = b", "import os", "a.b = 1", "a = ", "a = [x for x in y]"])
def test_a_parameters_cell_holds_literals_only(make_notebook: Maker, source: str) -> None:
    with pytest.raises(ParameterError, match="parameter"):
        read_parameters(make_notebook("p", parameters=source))


def test_index_lists_damaged_records_and_published_ones(tmp_path: Path) -> None:
    for number, folder in enumerate(["runs/a", "published/b", "runs/c", "runs/d"]):
        (tmp_path / folder).mkdir(parents=True)
        record = RunRecord(
            "n", "finished", "GO", name=folder, started_utc=f"2026-01-0{number + 1}T00:00:00+00:00"
        )
        record.write(tmp_path / folder)
    (tmp_path / "runs/c/results.json").write_text("{")
    (tmp_path / "runs/d/thumbnail.png").write_bytes(b"no picture")
    html = report.index(tmp_path).read_text()
    assert "3 runs" in html and "1 damaged" in html and "runs/c/results.json: is not valid" in html
    assert html.index(">runs/d<") < html.index(">published/b<") < html.index(">runs/a<")
    assert "published</span>" in html


@pytest.mark.parametrize("where", ["runs", "published", ""])
def test_index_lists_a_run_and_its_published_copy_once(tmp_path: Path, where: str) -> None:
    for folder in ("runs/a", "published/a"):
        (tmp_path / folder).mkdir(parents=True)
        RunRecord("n", "finished", "GO", name="a", started_utc="2026-01-01T00:00:00+00:00").write(
            tmp_path / folder
        )
    if where:
        (tmp_path / where / "a" / "report.html").write_text("<p>page</p>")
    html = report.index(tmp_path).read_text()
    assert "1 run" in html and "2 runs" not in html
    assert (f'href="{where}/a/report.html"' in html) == bool(where)


def test_an_empty_index_says_so(tmp_path: Path) -> None:
    assert "Nothing has been run yet" in report.index(tmp_path / "none").read_text()


def test_what_counts_as_a_request() -> None:
    page = '<a href="https://x.org">x</a><script src="https://cdn.x/a.js"></script>'
    page += (
        "<img src=//h/i.png><style>@import 'http://c/s.css'; a{background:url(https://u)}</style>"
    )
    assert external_requests(page) == [
        "https://cdn.x/a.js",
        "//h/i.png",
        "http://c/s.css",
        "https://u",
    ]


def test_redrawn_lines_keep_their_last_state() -> None:
    text = "a\rb\rc\nstep:  40%|####  | 4/10 [00:01<00:02]\nend\r\n"
    output = nbformat.v4.new_output("stream", name="stderr", text=text)
    tidied = pages._tidy_output(output)
    assert tidied is not None and tidied.text == "c\nend\n"
