"""`validate`: exit status, what it prints, and that both say the same."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from boxes import views_of

from fresnel import cli, faults
from fresnel.data import dataset
from fresnel.gate.verdict import validate as gate_validate
from fresnel.host import stopping
from fresnel.objects import sources


def test_exit_status_and_json_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = dataset.write(tmp_path / "clean", [views_of(i, size=24) for i in range(6)], meta={})

    def validate(*arguments: object) -> tuple[int, dict]:
        status = cli.main(["validate", "--json", *map(str, arguments)])
        said = json.loads(capsys.readouterr().out)
        assert said["exit_status"] == status
        return status, said

    status, said = validate(clean.path)
    assert status == 0 and said["passed"]
    status, said = validate(clean.path, "--against", clean.path)
    assert status == 1 and said["reasons"][0]["code"] == "split_leak"
    empty = faults.apply(clean, "empty_views", 1.0, tmp_path / "empty")
    status, said = validate(empty.path, "--fix", tmp_path / "no")
    assert status == 1 and said["mended"] is None
    with monkeypatch.context() as patch:  # what can be mended is the gate's affair
        good = gate_validate(clean, progress=False)
        patch.setattr("fresnel.gate.fix.fix", lambda *_, **__: (clean, good))
        status, said = validate(empty.path, "--fix", tmp_path / "fixed")
    assert status == 0 and not said["passed"]
    assert said["mended"]["passed"] and said["mended"]["path"] == str(clean.path)
    (tmp_path / "notes.txt").write_text("no data")
    for nothing in (tmp_path / "nowhere", tmp_path / "notes.txt"):
        assert cli.main(["validate", str(nothing)]) == 2

    def breaks(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("fresnel.gate.validate", breaks, raising=False)
    capsys.readouterr()
    assert cli.main(["validate", str(clean.path)]) == 2
    said = capsys.readouterr().err
    assert "broke down (KeyError" in said and "Traceback" in said and "in breaks" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_an_import_end(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules in C++ abort the process, or let it die of SIGINT, where it does not."""
    source = f"import signal, time\nsignal.raise_signal({int(number)})\ntime.sleep(0.2)\nwhole = 1"
    (tmp_path / "native.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    before = [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]

    def read(*_: object, **__: object) -> None:
        assert importlib.import_module("native").whole
        time.sleep(20)

    monkeypatch.setattr(sources, "open", read)
    monkeypatch.setattr(stopping, "_raised_at", -1.0)  # what another test raised just before
    try:
        assert cli.main(["validate", str(tmp_path)]) == 130 and "native" in sys.modules
    finally:
        for each, handler in before:
            signal.signal(each, handler)
        sys.modules.pop("native", None)


def test_a_repeated_signal_does_not_break_off_what_the_first_one_has_begun(monkeypatch) -> None:
    monkeypatch.setattr(stopping, "_raised_at", -1.0)
    frame = sys._getframe()
    with pytest.raises(KeyboardInterrupt):
        stopping.stop(signal.SIGTERM, frame)
    stopping.stop(signal.SIGTERM, frame)
    monkeypatch.setattr(stopping, "_raised_at", time.monotonic() - 2.0)  # a second thought is one
    with pytest.raises(KeyboardInterrupt):
        stopping.stop(signal.SIGTERM, frame)


MANY_CORES = """\
import sys
import fresnel.gate.verdict
fresnel.gate.verdict.core_count = lambda: 6
from fresnel import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_validate_of_many_processes_ends(tmp_path: Path) -> None:
    """Whenever a signal comes, to it alone or (as from `timeout`) to all of its group."""
    box, rng = views_of(0, size=32), random.Random(0)
    records = [replace(box, name=f"box{i}") for i in range(1000)]
    data = dataset.write(tmp_path / "data", records, meta={})
    (tmp_path / "script.py").write_text(MANY_CORES)
    words = [sys.executable, str(tmp_path / "script.py"), "validate", str(data.path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    for turn in range(4):
        with subprocess.Popen(
            words, env=environment, start_new_session=True, text=True, stderr=subprocess.PIPE
        ) as running:
            time.sleep(rng.uniform(3.0, 6.0))
            number = (signal.SIGINT, signal.SIGTERM)[turn % 2]
            running.send_signal(number)
            if turn % 3:
                os.killpg(running.pid, number)
            said = running.communicate(timeout=60)[1]
        assert running.returncode == 130 and said.endswith("fresnel: stopped\n")
        assert "Traceback" not in said
        ended = time.monotonic() + 20
        while left := _of_session(running.pid):
            assert time.monotonic() < ended, left
            time.sleep(0.1)


def _of_session(number: int) -> list[str]:
    """Processes that run, by what /proc says of them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == number and state != "Z":
            found.append(str(path.parent))
    return found
