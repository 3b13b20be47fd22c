"""The notebooks through papermill, at the smallest size that still means something; and the
rules that decide in 02 and 03, which stand in cells of their own, on opposite data."""

import ast
import json
import math
import re
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from boxes import views_of
from conftest import NOTEBOOKS as PLACE
from conftest import run_notebook
from PIL import Image
from torch import Tensor

from fresnel.data import dataset
from fresnel.evaluation import metrics as evaluate
from fresnel.evaluation import noise
from fresnel.gate import receipts
from fresnel.models.cvs import CVS, CVSConfig
from fresnel.models.decoder import load_shipped
from fresnel.objects import sources
from fresnel.render import Views
from fresnel.report import record
from fresnel.report.index import verdict_today
from fresnel.report.params import check_parameters, read_parameters
from fresnel.report.record import VERDICTS
from fresnel.study import data as training_data
from fresnel.study import results, runner
from fresnel.training import forecast as planning

NOTEBOOKS = sorted(PLACE.glob("*.ipynb"))
pytestmark = pytest.mark.xdist_group("notebooks")
SMALL = {"size": "tiny", "batch_size": 4, "truth_objects": 2}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def corrected(reports):
    place = str(reports / "data-corrected")
    params = {"images": 4, "image_size": 32, "dataset_dir": place}
    return run_notebook("01_validate_data", reports / "runs/01", **params)


@pytest.fixture(scope="module")
def trained(corrected, reports):
    """02 and 03 on the healthy set, each seconds long."""
    data = {"dataset_dir": str(reports / "data-corrected"), **SMALL}
    short = {"overfit_steps": 4, "max_steps": 6, "full_steps": 6}
    blind = CVS(CVSConfig.preset("tiny")).save(reports / "blind.safetensors")
    short["initial_weights"] = str(blind)
    smoked = run_notebook("02_smoke_train", reports / "runs/02", **short, **data)
    # Six steps can't earn a GO; what this needs is that the full run works on healthy data.
    full = run_notebook(
        "03_full_train", reports / "runs/03", steps=6, allow_failed_gate=True, keep_every=3,
        previews=2, export_to=str(reports / "weights.safetensors"), **data,
    )  # fmt: skip
    return smoked, full


def test_the_corrected_set_passes(corrected, reports):
    record, shown, _ = corrected
    assert record.verdict == "PASS", record.summary
    receipt = json.loads((reports / "data-corrected/receipts/gate.json").read_text())
    assert receipt["passed"] is True
    assert 0.5 < record.metrics["coverage_ratio"] < 1.5
    assert "PASS: PASS" not in shown and not record.summary.startswith("PASS")
    assert record.metrics["credits"][0]["licence"] == "CC0-1.0"


def test_training_is_refused_without_its_receipts(tmp_path):
    records = [views_of(i, size=16, views=2) for i in range(2)]
    data = dataset.write(tmp_path / "set", records, meta={})
    for given, missing in ((["gate"], "gate"), (["gate", "smoke-cvs"], "smoke-cvs")):
        recorder = record.start("x", {}, tmp_path / missing)
        with pytest.raises(training_data.Refused, match=missing):
            training_data.require(recorder, data, given, allow_failed=False)
        assert recorder.record.verdict == "REFUSED" and missing in recorder.record.summary
        assert list(recorder.record.provenance["inputs"]), "until the receipt is there"
        receipts.write_receipt(data, "gate", True, "fine")


def test_a_smoke_test_forecasts(trained):
    smoked, shown, _ = trained[0]
    assert smoked.metrics["forecast"]["duration_s"] > 0
    assert set(smoked.metrics["forecast"]["parts"]) == set(planning.PARTS)
    assert smoked.metrics["target_luminance"] > 0.5
    # it goes on from a network that ignores its input, and the report says what that means
    assert sum("the network ignores its input" in reason for reason in smoked.reasons) == 2
    assert smoked.verdict == "NO-GO" and "best linear denoiser" in shown and "cvs, 4 steps" in shown
    assert smoked.metrics["noise_left"]["left"][2] == pytest.approx(0.5, abs=0.05)
    assert ": target" in shown and ": truth" not in shown, "a decoder made the targets"


def test_a_full_run_keeps_its_promises(trained, reports):
    record, said, _ = trained[1]
    assert set(record.metrics["forecast_error"]) == {"duration_s", "peak_memory_bytes"}
    for metrics in (run[0].metrics for run in trained):
        assert {"samples_per_s", "compile_s", "paused_s"} <= set(metrics)
        assert metrics["samples_per_s"] > 0 and metrics["peak_memory_bytes"] > 1e6
    names = {"cvs", "copy_input", "mean_image", "black_image", "decoder render"}
    assert set(record.metrics["summaries"]) == {*names, "cvs, 2 steps", "cvs, 4 steps"}
    assert record.metrics["noise_left"]["left"][2] == pytest.approx(0.5, abs=0.05)
    assert "best linear denoiser" in said
    assert (reports / "weights.safetensors").is_file() and (
        reports / "runs/03/held_out.png"
    ).is_file()
    assert "step 0" in said and "step 6" in said, "pictures made during the training"
    kept = [Path(path) for name, path in record.artifacts.items() if "weights at step" in name]
    assert [path.name for path in kept] == ["step_000003.safetensors", "step_000006.safetensors"]
    validating = re.search(r"validation: (.+)", said)[1].split(", ")
    judging = re.search(r"held-out objects: (.+)", said)[1].split(", ")
    assert len(validating) == 4 and len(judging) == 2 and not {*validating} & {*judging}


def test_the_original_is_refused_for_its_pivot_and_trained_on_as_a_control(reports):
    """With what a study's parameters change besides: see notebooks/params/study.yaml."""
    place, weights = reports / "data-original", reports / "decoder.safetensors"
    record, _, _ = run_notebook(
        "01_validate_data", reports / "runs/01-original", preset="original", images=3, examples=3,
        image_size=32, dataset_dir=str(place), on_fail="continue", objects="A",
    )  # fmt: skip
    assert record.verdict == "FAIL" and record.metrics["gate_codes"][0] == "pivot_offset"
    assert "views_dark" not in record.metrics["gate_codes"], "emptiness is not exposure"
    assert record.metrics["empty_views"] > 0.5
    made = {"views.png", "thumbnail.png", "results.json"}
    assert made <= {path.name for path in (reports / "runs/01-original").iterdir()}
    data = dataset.open(place)
    receipts.write_receipt(data, "smoke-cvs", False, "no go")
    load_shipped("pixel").save(weights)
    arm, _, _ = run_notebook(
        "03_full_train", reports / "runs/03-refine", model="cvs-refine", size="tiny", batch_size=4,
        steps=2, truth_objects=2, objects="A", drop_worst_views=0.25, compare_steps="2",
        decoder_weights=str(weights), parameterisation="regression", accumulate=2,
        dataset_dir=str(place), allow_failed_gate=True, loss_mask="depth_laplacian", augment=False,
    )  # fmt: skip
    assert arm.metrics["gate_overridden"] is True and arm.verdict == "NOT BETTER"
    assert any("ignores its input" in reason for reason in arm.reasons)
    assert {"cvs-refine", "cvs, 2 steps", "decoder render"} < set(arm.metrics["summaries"])
    assert arm.metrics["pairs"] == 0.75 * len(data) * data.views_per_object, "a quarter left out"
    assert len(arm.metrics["psnr_by_object"]["cvs-refine"]["all"]) == 2
    assert any("lpips" in note for note in arm.notes)
    assert arm.metrics["summaries"]["decoder render"][-1]["edge_energy_ratio"] > 0
    assert "forecast_error" not in arm.metrics, "02 spoke of other settings"


def test_validation_objects_never_judge(tmp_path):
    records = [views_of(i, size=16, views=2) for i in range(3)]
    names = [record.name.split("__")[0] for record in records]
    splits = dict(zip(names, ("train", "val", "test"), strict=True))
    data = dataset.write(tmp_path / "all", records, meta={"object_splits": splits})
    held_out = data.subset([2])
    found = training_data.validation_objects(str(data.path), held_out)
    assert found is not None and found.names == (data.names[1],)
    alone = dataset.write(tmp_path / "alone", records, meta={})
    assert training_data.validation_objects(str(alone.path), alone) is None


def decide(notebook, **given):
    """What the notebook's rule makes of these measurements."""
    (path,) = (path for path in NOTEBOOKS if path.stem == notebook)
    cells = nbformat.read(path, as_version=4).cells
    (rule,) = (cell.source for cell in cells if "rule" in cell.metadata.get("tags", []))
    given = {"math": math, "noise": noise, "shares": {}} | given
    exec(rule, given)
    return given


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"target_coverage": 0.39}, "area of the targets"),
        ({"target_luminance": 0.39}, "light of the targets"),
        ({"loss_fall": 1.49}, "loss"),
        ({"luminance_ratio": 0.79}, "light of the outputs"),
        ({"luminance_ratio": 1.26}, "light of the outputs"),
        ({"coverage_ratio": 0.74}, "area of the outputs"),
        ({"coverage_ratio": 1.34}, "area of the outputs"),
        ({"coverage_ratio": math.nan}, "area of the outputs"),
    ],
)
def test_the_smoke_tests_rule(change, reason, shares=MappingProxyType({})):
    fine = {"loss_fall": 1.5, "luminance_ratio": 0.8, "coverage_ratio": 1.33}
    fine |= {"target_coverage": 0.4, "target_luminance": 0.4} | change
    ratios = {name: fine.pop(name) for name in ("luminance_ratio", "coverage_ratio")}
    fall = fine.pop("loss_fall")
    given = {"shares": shares, "initial_weights": "x"}
    made = decide("02_smoke_train", **given, targets=fine, loss_fall=fall, overall=ratios)
    assert made["go"] == (reason is None)
    assert [reason in text for text in made["reasons"]] == ([True] if reason else [])


class Sees(CVS):
    """A network that leaves of the noise what it is told, or what one leaves that is blind."""

    def __init__(self, share: float | None) -> None:
        super().__init__(CVSConfig.preset("tiny"))
        self.share = share

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        if self.share is None:  # as F is 0 before training, the output is c_skip x
            return super().forward(x, sigma, cond)
        return self.share * x


@pytest.mark.parametrize(("share", "reason"), [(None, "ignores its input"), (0.2, None)])
def test_a_network_that_ignores_its_noisy_input_is_no_go_with_the_cause(share, reason, tmp_path):
    records = [views_of(i, size=16, views=4) for i in range(3)]
    truth = dataset.write(tmp_path / "truth", records, meta={}).tensors()
    found = results.noise_shares(Sees(share), truth, 0)
    if share is None:
        assert found["left"] == pytest.approx(found["ignoring"], abs=0.001)
        assert found["left"][1:3] == pytest.approx([0.899, 0.502], abs=0.001)
        found["left"][2] = found["linear"][2]  # one level is enough
    else:
        assert found["left"] == pytest.approx([0.2] * 5, abs=1e-4)
    assert found["linear"] == sorted(found["linear"], reverse=True)
    test_the_smoke_tests_rule({}, reason, found)
    fine = {"luminance_ratio": 1.0, "coverage_ratio": 1.0, "psnr": 21.5, "ssim": 0.9}
    overall = {"cvs": fine, "copy_input": fine | {"psnr": 20.0, "ssim": 0.8}}
    judged = decide("03_full_train", overall=overall, model="cvs", shares=found)
    assert judged["word"] == ("PASS" if reason is None else "NOT BETTER"), "nor does 03 pass it"
    assert len(judged["reasons"]) == (reason is not None)
    kept = {"summaries": {name: [one] for name, one in overall.items()}, "noise_left": found}
    assert verdict_today({"model": "cvs"}, kept, "PASS") == judged["word"]
    assert results.noise_shares(load_shipped(), truth, 0) == {}, "a decoder promises nothing"


def test_the_rule_of_03_on_truth_copy_grey_and_black(tmp_path):
    """A uniform grey of the right mean light and area fails, as it is worse than a copy."""
    records = [views_of(i, size=32, views=4) for i in range(3)]
    truth = dataset.write(tmp_path / "truth", records, meta={}).tensors()
    rgb, alpha = truth.rgb.float() / 255, truth.alpha.float()[..., None] / 255

    def picks(inputs, cameras, colour, cover):
        rows = [truth.names.index(name) for name in inputs.names]
        return Views(colour[rows], cover[rows], torch.zeros_like(cover[rows]))

    mean = alpha.mean(dim=(2, 3), keepdim=True).expand_as(alpha)
    linear = evaluate.luminance(rgb).mean(dim=(2, 3))[..., None, None, None]
    grey = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    made = {
        "truth": lambda i, c: picks(i, c, rgb, alpha),
        "grey": lambda i, c: picks(i, c, grey.expand_as(rgb), mean),
        **evaluate.baselines(truth),
    }
    overall = {
        name: evaluate.summarise(evaluate.evaluate(predict, truth, progress=False))[-1]
        for name, predict in made.items()
    }
    assert overall["truth"]["luminance_ratio"] == pytest.approx(1)
    decided = {name: decide("03_full_train", overall=overall, model=name) for name in made}
    assert {name: found["word"] for name, found in decided.items()} == {
        "truth": "PASS", "grey": "NOT BETTER", "copy_input": "NOT BETTER", "mean_image": "FAIL",
        "black_image": "FAIL",
    }  # fmt: skip
    reasons = decided["grey"]["reasons"]
    assert len(reasons) == 2 and "PSNR above a copy" in reasons[0], "light and area are right"


@pytest.mark.parametrize(
    ("figure", "value", "word"),
    [
        ("luminance_ratio", 0.79, "FAIL"), ("luminance_ratio", 1.26, "FAIL"),
        ("coverage_ratio", 0.74, "FAIL"), ("coverage_ratio", 1.34, "FAIL"),
        ("coverage_ratio", math.nan, "FAIL"), ("psnr", 20.0, "NOT BETTER"), ("psnr", 21.2, "PASS"),
        ("psnr", 21.1, "NOT BETTER"), ("ssim", 0.8, "NOT BETTER"), ("ssim", 0.895, "PASS"),
        ("ssim", 0.88, "NOT BETTER"), ("perceptual", 8.0, "NOT BETTER"),
        ("perceptual", 7.0, "PASS"), ("coarse_edge_energy_ratio", 0.35, "NOT BETTER"),
        ("coarse_edge_energy_ratio", 0.5, "PASS"), ("checkerboard_ratio", 1.6, "NOT BETTER"),
        ("checkerboard_ratio", 1.4, "PASS"), ("blocks_ratio", 1.3, "NOT BETTER"),
        ("blocks_ratio", 1.1, "PASS"),
    ],
)  # fmt: skip
def test_the_bands_of_03(figure, value, word):
    """Light and area decide first; then the copy, and the decoder's render with its tolerances."""
    fine = {"luminance_ratio": 1.25, "coverage_ratio": 0.75, "psnr": 21.5, "ssim": 0.9}
    rivals = {
        "copy_input": {"psnr": 20.0, "ssim": 0.8, "perceptual": 9.0},
        "decoder render": {"psnr": 21.45, "ssim": 0.9, "perceptual": 7.0}
        | {"coarse_edge_energy_ratio": 0.5, "checkerboard_ratio": 0.1},
    }
    seen = {"perceptual": 6.0, "coarse_edge_energy_ratio": 0.45, "checkerboard_ratio": 1.0}
    seen |= {"blocks_ratio": 1.0}
    overall = {"cvs": fine | seen | {figure: value}, **rivals}
    made = decide("03_full_train", overall=overall, model="cvs")
    assert made["word"] == word and bool(made["reasons"]) == (word != "PASS")
    if word == "FAIL":
        return
    alone = {name: overall[name] for name in ("cvs", "copy_input")}
    made = decide("03_full_train", overall=alone, model="cvs")
    beaten = value > rivals["copy_input"].get(figure, -1) or figure in seen
    unrivalled = figure in ("checkerboard_ratio", "blocks_ratio")
    beaten = beaten and (not unrivalled or word == "PASS")
    assert made["word"] == ("PASS" if beaten else "NOT BETTER"), "a decoder has the copy alone"


def test_what_a_smoke_test_measures():
    fall = [{"step": 1, "loss": 0.4}, {"step": 2, "loss": 0.1}, {"step": 3}]
    assert results.loss_fall(fall) == pytest.approx(4)
    assert results.loss_fall(fall, first=0.2) == pytest.approx(2)
    twenty = [{"loss": loss} for loss in [4.0] * 2 + [1.0] * 16 + [0.5] * 2]
    assert results.loss_fall(twenty) == pytest.approx(8), "means of a tenth at either end"
    views = SimpleNamespace(
        rgb=torch.zeros(2, 4, 8, 8, 3, dtype=torch.uint8),
        alpha=torch.full((2, 4, 8, 8), 51, dtype=torch.uint8),
        inputs=SimpleNamespace(
            rgb=torch.full((2, 16, 16, 3), 255, dtype=torch.uint8),
            alpha=torch.full((2, 16, 16), 102, dtype=torch.uint8),
        ),
    )
    views.rgb[:, :2] = 255  # half of the views
    assert results.light_of_targets(views) == pytest.approx(
        {"target_luminance": 0.5, "target_coverage": 0.5}
    )
    assert results.steps_per_epoch(views, 3) == 2


def test_analysis_of_the_runs(trained, reports):
    own = {"reports_dir": str(reports), "attribution_objects": 2, "attribution_size": 32}
    story, _, _ = run_notebook("04_analyze_negative_results", reports / "runs/04", **own)
    assert story.verdict == "DONE" and story.metrics["claims"]


def test_the_playground_has_its_pictures_without_anybody_to_move_a_slider(reports, tmp_path):
    """Of a picture of one's own, a person, and an object whose mesh is at hand."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 20:44] = (200, 120, 40, 255)
    Image.fromarray(rgba).save(tmp_path / "mine.png")
    params = {"subject": str(tmp_path / "mine.png"), "size": 64, "frames": 3, "records": 3}
    record, page, _ = run_notebook("00_playground", tmp_path / "runs/00", **params)
    assert record.verdict == "DONE" and (tmp_path / "runs/00/thumbnail.png").is_file()
    # six arguments of the first act, fault and strength, the pivot
    assert page.count('class="fresnel-steps"') == 9
    for words in ("head 0 from +40 degrees", "mine from -180 degrees", "PSNR against the truth"):
        assert words in page, words
    assert page.count("Gaussians(") == 1 and "fresnel-viewer" in page
    light = [record.metrics["light_by_pivot"][str(pivot)] for pivot in (0.0, 0.5, 1.0)]
    assert light[0] < 0.2 < light[1] < light[2] and 0.5 < light[2] < 1.2
    assert re.search(r"fault: pivot_offset. FAIL", page) and re.search(r"fault: none. PASS", page)
    assert record.metrics["decoder_128_ms"] > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_house_rules(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    parameters = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert len(parameters) == 1  # it has a line for each parameter
    assert all(cell.source.count("\n") < 25 for cell in code if cell not in parameters)
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code if path.stem != "00_playground" else ():  # its sliders call functions
        defined = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef, ast.Lambda)
        assert not any(isinstance(node, defined) for node in ast.walk(ast.parse(cell.source)))
    for node in ast.parse(parameters[0].source).body:
        assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.UnaryOp)


def test_profiles_name_real_parameters():
    for profile in sorted((NOTEBOOKS[0].parent / "params").glob("profile_*.yaml")):
        places = []
        for domain in sources.EMBEDDED:
            for step in (steps := runner.load(profile, domain=domain)):
                check_parameters(read_parameters(step.notebook), step.params)
                assert step.expect in {*VERDICTS, None}
                assert step.params["domain"] == domain
            places.append({step.params.get("dataset_dir") for step in steps} - {None})
        assert places[0] and not places[0] & places[1], "neither replaces the other's data"
        assert all(step.params["domain"] == "faces" for step in runner.load(profile))
