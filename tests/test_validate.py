"""`validate`: exit status, what it prints, and that both say the same."""

import importlib
import json
import signal
import sys
import time
from pathlib import Path

import pytest
from boxes import views_of

from fresnel import cli, faults
from fresnel.data import dataset
from fresnel.gate.verdict import validate as gate_validate
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
    try:
        assert cli.main(["validate", str(tmp_path)]) == 130 and "native" in sys.modules
    finally:
        for each, handler in before:
            signal.signal(each, handler)
        sys.modules.pop("native", None)
