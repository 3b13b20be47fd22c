"""`validate`: exit status, what it prints, and that both say the same."""

import json
from pathlib import Path

import pytest
from boxes import views_of

from fresnel import cli, faults
from fresnel.data import dataset
from fresnel.gate.verdict import validate as gate_validate


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
