"""Each part of the forecast, and the set-up that 02 and 03 share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from fresnel.report.record import Stage
from fresnel.training import forecast as planning


def history(*rates: float, every: int = 5) -> list[dict[str, float]]:
    return [{"step": every * (k + 1), "samples_per_s": rate} for k, rate in enumerate(rates)]


def test_pace_counts_what_happens_once_apart_from_the_steps():
    # ten samples a step: 0.1 s each in the first half, 0.2 s in the second, after a slow start
    rows = history(10, 100, 100, 100, 50, 50, 50, 50)
    step_s, once_s = planning.pace(rows, 10)
    assert step_s == pytest.approx(0.15)
    assert once_s == pytest.approx(5 * (1.0 - 0.1))
    assert planning.pace(history(100), 10) == pytest.approx((0.1, 0.0))
    # where steps are recorded, the fastest row of either half tells
    rows = history(10, 20, 100, 5, 6, 50)
    step_s, once_s = planning.pace(rows, 10, recorded=True)
    assert step_s == pytest.approx((0.1 + 0.2) / 2)
    assert once_s == pytest.approx(5 * (0.9 + 0.4 + 1.8 + (10 / 6 - 0.2)))
    assert planning.pace(rows, 10)[0] > 0.7, "what a short run's median would say"


def test_a_forecast_is_the_sum_of_its_parts():
    result = SimpleNamespace(
        history=history(100, 100, 50, 50), model=nn.Linear(1, 1), compile_s=7.0, duration_s=3.0,
        paused_s=0.6, peak_memory_bytes=123,
    )  # fmt: skip
    stages = [
        Stage("open the data", 1.0, 0),
        Stage("check the receipt", 0.5, 0),
        Stage("draw the loss", 0.25, 0),
        Stage("import the compiler", 3.0, 0),
        Stage("overfit one batch", 99.0, 0),
    ]
    acts = {
        "compile": 2.0, "validation": 0.5, "preview": 0.3, "checkpoint": 0.1,
        "evaluate_first": 4.0, "evaluate_record": 1.0,
    }  # fmt: skip
    config = planning.full_config(1000)
    plan = planning.full_run(
        acts, result, stages, config, batch_size=10, records=8,
        around_s=planning.around_steps(result, 7 + 3 + 0.6 + 0.6 + 1.5), start_s=3.0,
        price_per_hour_usd=3600.0,
    )  # fmt: skip
    assert set(plan["parts"]) == set(planning.PARTS)
    assert plan["parts"]["data"] == pytest.approx(1.5)
    assert plan["parts"]["pictures"] == pytest.approx(0.25 + 4), "another stage is not repeated"
    assert plan["parts"]["compile"] == 7.0, "what a cache holds is not compiled, but loaded again"
    assert plan["parts"]["steps"] == pytest.approx(150)
    # set-up, eleven stops, a hundred rows of the log
    assert plan["parts"]["pauses"] == pytest.approx(1.5 + 11 * 0.6 + 100 * 0.2)
    assert plan["parts"]["evaluation"] == pytest.approx(11)
    assert plan["duration_s"] == pytest.approx(sum(plan["parts"].values()))
    assert plan["cost_usd"] == pytest.approx(plan["duration_s"])
    assert plan["samples"] == 10_000 and plan["peak_memory_bytes"] == 123


def test_what_a_run_took_stands_beside_its_forecast(tmp_path):
    data = SimpleNamespace(path=tmp_path)
    config = planning.full_config(20, precision="bf16")
    settings = planning.settings_of(config, model="cvs", batch_size=16)
    assert planning.kept(data, settings) is None
    result = SimpleNamespace(
        samples_per_s=10.0, compile_s=0.0, duration_s=8.0, peak_memory_bytes=2 * 10**6
    )
    stages = [Stage("open the data", 1.0, 0), Stage("train", 10.0, 0)]
    spent = planning.spent(stages, result, start_s=2.0, price_per_hour_usd=1.0)
    assert spent["parts"]["pauses"] == pytest.approx(2.0) and spent["duration_s"] == 13
    plan = {**spent, "duration_s": 10.0}
    planning.keep(data, settings, plan)
    found = planning.kept(data, settings)
    assert found is not None and found["settings"] == settings
    other = planning.settings_of(planning.full_config(21, precision="bf16"), model="cvs")
    assert planning.kept(data, other) is None, "another run's forecast is not this one's"
    metrics = planning.compared(found, spent)
    assert metrics["forecast_error"]["duration_s"] == pytest.approx(0.3)
    assert metrics["forecast_error"]["peak_memory_bytes"] == pytest.approx(0)
    assert "forecast_error" not in planning.compared(None, spent)
    rows = {row.pop(""): row for row in planning.table(found, spent)}
    assert rows["**in all, s**"] == {"forecast": "10.0", "actual": "13.0"}
    assert rows["peak memory of the training, MB"]["actual"] == "2.0"
    assert len(rows) == len(planning.PARTS) + 3 and "actual" not in planning.table(found)[0]


def test_a_forecast_that_was_cut_off_is_none(tmp_path):
    data, settings = SimpleNamespace(path=tmp_path / "data"), {"steps": 1}
    plan = {"parts": dict.fromkeys(planning.PARTS, 1.0), "duration_s": 7.0}
    planning.keep(data, settings, plan)
    (path,) = (tmp_path / "data/receipts").iterdir()
    whole = path.read_text()
    assert planning.kept(data, settings) == {**plan, "settings": settings}
    for damaged in (whole[:20], "", "[]", "null", '{"parts": {}}', '{"parts": 3}'):
        path.write_text(damaged)
        assert planning.kept(data, settings) is None
    (tmp_path / "elsewhere").mkdir()
    linked = SimpleNamespace(path=tmp_path / "linked")
    linked.path.mkdir()
    (linked.path / "receipts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of its folder"):
        planning.keep(linked, settings, plan)


def test_pictures_and_snapshots_asked_for_are_forecast_and_made():
    result = SimpleNamespace(
        history=history(10, 10), model=nn.Linear(1, 1), compile_s=0, paused_s=0, peak_memory_bytes=1
    )
    names = ("compile", "validation", "evaluate_first", "evaluate_record")
    acts = {**dict.fromkeys(names, 0), "preview": 10.0, "checkpoint": 1.0}
    free = dict.fromkeys(("around_s", "start_s", "price_per_hour_usd"), 0)

    def pauses(**options) -> float:
        config = planning.full_config(100, **options)
        plan = planning.full_run(acts, result, [], config, batch_size=1, records=1, **free)
        return plan["parts"]["pauses"]

    assert pauses(previews=4) - pauses() == pytest.approx(5 * 10.0)
    assert pauses(keep_every=25) - pauses() == pytest.approx(4 * 1.0)
    assert planning.full_config(100, previews=4).preview_every == 25


def test_a_batch_is_computed_in_equal_parts():
    assert [planning.batch_of_a_task(16, parts) for parts in (1, 2, 16)] == [16, 8, 1]
    for wrong in (3, 0, -1, 32):
        with pytest.raises(ValueError, match="divisor of batch_size 16"):
            planning.batch_of_a_task(16, wrong)


def test_precision_is_chosen_by_what_multiplies(monkeypatch):
    for units, chosen in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(planning.machine, "has_matrix_units", lambda units=units: units)
        assert planning.pick_precision("auto", "cpu") == chosen
        assert planning.pick_precision("fp32", "cpu") == "fp32"
    assert planning.pick_precision("bf16", "cpu") == "bf16"
    with pytest.raises(ValueError, match="want 'auto', 'fp32' or 'bf16'"):
        planning.pick_precision("fp16", "cpu")
