"""`validate`: exit status, what it prints, and that both say the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from boxes import views_of

from fresnel import cli, faults
from fresnel.data import dataset
from fresnel.gate import verdict as gate


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
    moved = faults.apply(clean, "pivot_offset", 1.0, tmp_path / "moved")
    status, said = validate(moved.path, "--fix", tmp_path / "fixed")
    assert not said["passed"] and said["mended"] is not None
    assert status == int(not said["mended"]["passed"])
    for nothing in (tmp_path / "nowhere", tmp_path):
        assert cli.main(["validate", str(nothing)]) == 2

    def breaks(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(gate, "validate", breaks)
    capsys.readouterr()
    assert cli.main(["validate", str(clean.path)]) == 2
    said = capsys.readouterr().err
    assert "broke down (KeyError" in said and "Traceback" in said and "in breaks" in said
