"""Each part of the forecast, and the set-up that 02 and 03 share."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from fresnel.report.record import Stage
from fresnel.training import forecast as planning


def history(*rates: float, every: int = 5) -> list[dict[str, float]]:
    return [{"step": every * (k + 1), "samples_per_s": rate} for k, rate in enumerate(rates)]


def result(**changes: Any) -> Any:
    """Of a training: four rows, 100 samples a second in the first half, 50 in the second."""
    known = {
        "history": history(100, 100, 50, 50), "model": nn.Linear(1, 1), "samples_per_s": 10.0,
        "compile_s": 7.0, "duration_s": 3.0, "paused_s": 0.6, "around_s": 2.1,
        "peak_memory_bytes": 2 * 10**6,
    }  # fmt: skip
    return SimpleNamespace(**known | changes)


ACTS = {
    "compile": 2.0, "validation": 0.5, "preview": 0.3, "checkpoint": 0.1,
    "evaluate_first": 4.0, "evaluate_record": 1.0,
}  # fmt: skip


def plan(stages: Any = (), previews: int = 0, keep_every: int = 0) -> dict[str, Any]:
    """Of a run of 1,000 steps, ten samples each."""
    return planning.full_run(
        ACTS, result(), stages,
        planning.full_config(1000, previews=previews, keep_every=keep_every),
        batch_size=10, records=8, around_s=2.1, start_s=3.0, price_per_hour_usd=3600.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "recorded", "step_s", "once_s"),
    [
        # ten samples a step: 0.1 s each in the first half, 0.2 s in the second, after a slow start
        ((10, 100, 100, 100, 50, 50, 50, 50), False, 0.15, 5 * (1.0 - 0.1)),
        ((100,), False, 0.1, 0.0),
        # where steps are recorded, the fastest row of either half tells
        ((10, 20, 100, 5, 6, 50), True, 0.15, 5 * (0.9 + 0.4 + 1.8 + (10 / 6 - 0.2))),
        ((10, 20, 100, 5, 6, 50), False, (0.5 + 10 / 6) / 2, 0.0),  # a short run's median
    ],
)
def test_pace_counts_what_happens_once_apart_from_the_steps(
    rates: Any, recorded: bool, step_s: float, once_s: float
) -> None:
    found = planning.pace(history(*rates), 10, recorded=recorded)
    assert found == pytest.approx((step_s, once_s))


def test_a_forecast_is_the_sum_of_its_parts() -> None:
    stages = [
        Stage("open the data", 1.0, 0),
        Stage("check the receipt", 0.5, 0),
        Stage("draw the loss", 0.25, 0),
        Stage("import the compiler", 3.0, 0),
        Stage("overfit one batch", 99.0, 0),
    ]
    found = plan(stages)
    assert found["parts"] == pytest.approx({
        "start": 3.0,
        "data": 1.5,
        # what a cache holds is not compiled, but loaded again: twice what it takes in this process
        "compile": 3.0 + 4.0,
        "steps": 150.0,
        "pauses": 1.5 + 11 * 0.6 + 100 * 0.2,  # set-up, eleven stops, a hundred rows of the log
        "pictures": 0.25 + 4.0,  # another stage is not repeated
        "evaluation": 11.0,
    })  # fmt: skip
    assert found["duration_s"] == found["cost_usd"] == pytest.approx(sum(found["parts"].values()))
    assert found["samples"] == 10_000 and found["peak_memory_bytes"] == 2 * 10**6


def test_pictures_and_snapshots_asked_for_are_forecast_and_made() -> None:
    pauses = plan()["parts"]["pauses"]
    assert plan(previews=4)["parts"]["pauses"] - pauses == pytest.approx(5 * 0.3)
    assert plan(keep_every=250)["parts"]["pauses"] - pauses == pytest.approx(4 * 0.1)
    assert planning.full_config(100, previews=4).preview_every == 25


def test_what_a_run_took_stands_beside_its_forecast(tmp_path) -> None:
    stages = [Stage("open the data", 1.0, 0), Stage("train", 10.0, 0)]
    spent = planning.spent(stages, result(), start_s=2.0, price_per_hour_usd=1.0)
    assert spent["parts"]["pauses"] == pytest.approx(2.7) and spent["duration_s"] == 15.7
    forecast = {**spent, "duration_s": 10.0}
    metrics = planning.compared(forecast, spent)
    errors = {"duration_s": pytest.approx(0.57), "peak_memory_bytes": pytest.approx(0)}
    assert metrics["forecast_error"] == errors
    assert "forecast_error" not in planning.compared(None, spent)
    rows = {row.pop("part"): row for row in planning.table(forecast, spent)}
    assert rows["in all, s"] == {"forecast": "10.0", "actual": "15.7"}
    assert rows["opening the data and checking their receipts, s"]["actual"] == "1.0"
    assert rows["peak memory of the training, MB"]["actual"] == "2.0"
    assert len(rows) == len(planning.PARTS) + 3 and "actual" not in planning.table(forecast)[0]


def test_a_forecast_is_kept_for_its_very_settings(tmp_path) -> None:
    data, config = SimpleNamespace(path=tmp_path), planning.full_config(20, precision="bf16")
    settings = planning.settings_of(config, model="cvs", batch_size=16)
    forecast = {"parts": dict.fromkeys(planning.PARTS, 1.0), "duration_s": 7.0}
    assert planning.kept(data, settings) is None
    planning.keep(data, settings, forecast)
    assert planning.kept(data, settings) == {**forecast, "settings": settings}
    other = planning.settings_of(planning.full_config(21, precision="bf16"), model="cvs")
    assert planning.kept(data, other) is None, "another run's forecast is not this one's"
    (path,) = (tmp_path / "receipts").iterdir()
    for damaged in (path.read_text()[:20], "", "[]", "null", '{"parts": {}}', '{"parts": 3}'):
        path.write_text(damaged)
        assert planning.kept(data, settings) is None
    linked = SimpleNamespace(path=tmp_path / "linked")
    linked.path.mkdir()
    (linked.path / "receipts").symlink_to(tmp_path / "receipts")
    with pytest.raises(ValueError, match="leads out of its folder"):
        planning.keep(linked, settings, forecast)


def test_a_batch_is_computed_in_equal_parts() -> None:
    assert [planning.parts_of_a_step(16, parts) for parts in (1, 2, 16)] == [1, 2, 16]
    assert [planning.parts_of_a_step(16, *p) for p in ((1, 4), (8, 4), (4, 3))] == [4, 8, 4]
    for wrong in (3, 0, -1, 32):
        with pytest.raises(ValueError, match="divisor of batch_size 16"):
            planning.parts_of_a_step(16, wrong)
    for accumulate, gpus in ((1, 3), (2, 32)):
        with pytest.raises(ValueError, match=f"gpus: got {gpus}, want .* a divisor of 16"):
            planning.parts_of_a_step(16, accumulate, gpus)


def test_precision_is_chosen_by_what_multiplies(monkeypatch) -> None:
    for units, chosen in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(planning.machine, "has_matrix_units", lambda units=units: units)
        assert planning.pick_precision("auto", "cpu") == chosen
        assert planning.pick_precision("fp32", "cpu") == "fp32"
    assert planning.pick_precision("bf16", "cpu") == "bf16"
    with pytest.raises(ValueError, match="want 'auto', 'fp32' or 'bf16'"):
        planning.pick_precision("fp16", "cpu")
