"""The four notebooks through papermill, at the smallest size that still means something."""

import ast
import json
from pathlib import Path

import nbformat
import pytest

from fresnel.report import run as report
from fresnel.report.params import check_parameters, read_parameters
from fresnel.report.record import RunRecord
from fresnel.study import runner
from fresnel.training import forecast as planning

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def run(name, folder, step=None, **params):
    notebook = next(path for path in NOTEBOOKS if path.stem == name)
    done = report.run(notebook, params, step or name, folder, progress=False)
    assert not done.crashed, done.record.error
    html = done.report.read_text()
    assert done.record.summary and "<h2" in html
    return done.record, done.directory


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def original(reports):
    folder = reports / "data-original"
    record, directory = run(
        "01_validate_data", reports, "01-original", preset="original", images=4, examples=4,
        image_size=32, dataset_dir=str(folder), on_fail="continue",
    )  # fmt: skip
    return record, directory, folder


@pytest.fixture(scope="module")
def corrected(reports):
    folder = reports / "data-corrected"
    record, directory = run(
        "01_validate_data", reports, "01-corrected", images=16, image_size=32,
        dataset_dir=str(folder),
    )  # fmt: skip
    return record, directory, folder


def test_the_original_is_refused_for_its_pivot(original):
    record, directory, _ = original
    assert record.verdict == "FAIL"
    assert record.metrics["gate_codes"][0] == "pivot_offset"
    assert "views_dark" not in record.metrics["gate_codes"], "emptiness is not exposure"
    assert record.metrics["empty_views"] > 0.5
    assert {"views.png", "thumbnail.png", "results.json", "report.html"} <= {
        path.name for path in directory.iterdir()
    }


def test_the_corrected_set_passes(corrected):
    record, _, folder = corrected
    assert record.verdict == "PASS", record.summary
    assert json.loads((folder / "receipts" / "gate.json").read_text())["passed"] is True
    assert 0.5 < record.metrics["coverage_ratio"] < 1.5


def test_training_is_refused_without_the_smoke_verdict(corrected, reports):
    record, _ = run(
        "03_full_train", reports, "03-refused", dataset_dir=str(corrected[2]), steps=2
    )  # fmt: skip
    assert record.verdict == "REFUSED" and "smoke-cvs" in record.summary


def test_the_control_is_refused_unless_overridden(original, reports):
    record, _ = run("02_smoke_train", reports, "02-refused", dataset_dir=str(original[2]))
    assert record.verdict == "REFUSED" and "gate" in record.summary


def test_smoke_then_full_then_analysis(original, corrected, reports):
    small = {"size": "tiny", "batch_size": 4, "overfit_steps": 4, "max_steps": 6}
    control, _ = run(
        "02_smoke_train", reports, "02-control", dataset_dir=str(original[2]),
        allow_failed_gate=True, loss_mask="depth_laplacian", parameterisation="original",
        augment=False, full_steps=6, truth_objects=2, **small,
    )  # fmt: skip
    assert control.verdict == "NO-GO"
    assert any("empty" in reason for reason in control.reasons)
    smoke, _ = run(
        "02_smoke_train", reports, "02-corrected", dataset_dir=str(corrected[2]), **small
    )
    assert smoke.metrics["forecast"]["duration_s"] > 0
    assert set(smoke.metrics["forecast"]["parts"]) == set(planning.PARTS)
    assert smoke.metrics["target_luminance"] > 0.5

    control, _ = run(
        "03_full_train", reports, "03-control", dataset_dir=str(original[2]), size="tiny",
        batch_size=4, steps=6, truth_objects=2, allow_failed_gate=True,
        loss_mask="depth_laplacian", parameterisation="original", augment=False,
    )  # fmt: skip
    assert control.metrics["gate_overridden"] is True
    assert set(control.metrics["forecast_error"]) == {"duration_s", "peak_memory_bytes"}
    # Six steps can't earn a GO; what this test needs is that the full run works on healthy data.
    trained, directory = run(
        "03_full_train", reports, "03-corrected", dataset_dir=str(corrected[2]), size="tiny",
        batch_size=4, steps=6, truth_objects=2, allow_failed_gate=smoke.verdict != "GO",
        export_to=str(reports / "cvs.safetensors"), accumulate=2,
    )  # fmt: skip
    assert "forecast_error" not in trained.metrics, "02 spoke of other settings"
    for record in (smoke, trained):
        assert {"samples_per_s", "peak_memory_bytes", "compile_s", "paused_s"} <= set(
            record.metrics
        )
        assert record.metrics["samples_per_s"] > 0 and record.metrics["peak_memory_bytes"] > 1e6
    names = set(trained.metrics["summaries"])
    assert names == {"cvs", "copy_input", "mean_image", "black_image", "decoder render"}
    assert (reports / "cvs.safetensors").is_file() and (directory / "held_out.png").is_file()

    story, directory = run(
        "04_analyze_negative_results", reports, "04", reports_dir=str(reports),
        attribution_objects=2, attribution_size=32,
    )  # fmt: skip
    assert story.verdict == "DONE" and story.metrics["missing_runs"] == []
    assert len(story.metrics["claims"]) == 10
    path = story.metrics["attribution"]["light"]["factors"]["path"]
    assert path["share"] > 0.5, "the camera path explains most of the darkness"
    page = (directory / "report.html").read_text()
    for text in ("pivot_offset", "@software", "stops it after", "fresnel.gate.verdict.validate"):
        assert text in page


def test_an_arm_with_its_own_decoder_objects_and_render(reports):
    """What a study's parameters change: see notebooks/params/study.yaml."""
    weights = reports / "decoder.safetensors"
    decoder, _ = run(
        "03_full_train", reports, "03-decoder-A", model="decoder", size="tiny", batch_size=2,
        steps=2, truth_objects=2, objects="A", export_to=str(weights),
    )  # fmt: skip
    assert {"samples_per_s", "peak_memory_bytes", "compile_s", "paused_s"} <= set(decoder.metrics)
    made, _ = run(
        "01_validate_data", reports, "01-B", images=16, examples=4, image_size=32, objects="B",
        decoder_weights=str(weights), dataset_dir=str(reports / "data-B"), on_fail="continue",
    )  # fmt: skip
    assert made.provenance["datasets"][0]["objects"] == 16
    arm, _ = run(
        "03_full_train", reports, "03-refine", model="cvs-refine", size="tiny", batch_size=4,
        steps=2, truth_objects=2, objects="A", drop_worst_views=0.25, compare_steps="2",
        decoder_weights=str(weights), parameterisation="regression",
    )  # fmt: skip
    assert {"cvs-refine", "cvs, 2 steps", "decoder render"} < set(arm.metrics["summaries"])
    assert arm.metrics["pairs"] % 6 == 0 and arm.metrics["pairs"] < 16 * 6, "a quarter left out"
    assert len(arm.metrics["psnr_by_object"]["cvs-refine"]["all"]) == 2
    assert any("LPIPS" in note for note in arm.notes)


def test_decoder_training(reports):
    record, _ = run(
        "03_full_train", reports, "03-decoder", model="decoder", size="tiny", batch_size=2,
        steps=3, truth_objects=2,
    )  # fmt: skip
    assert set(record.metrics["summaries"]) == {
        "decoder", "copy_input", "mean_image", "black_image",
    }  # fmt: skip


def test_analysis_of_nothing_leaves_every_claim_open(tmp_path):
    record, _ = run(
        "04_analyze_negative_results", tmp_path, "04", reports_dir=str(tmp_path),
        attribution_source="",
    )  # fmt: skip
    decided = {claim for claim, verdict in record.metrics["claims"].items() if verdict != "open"}
    assert len(record.metrics["claims"]) == 10
    assert decided == {"Quality-aware loss masking is implemented properly."}, "its formula says"
    assert len(record.metrics["missing_runs"]) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_house_rules(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) <= 16
    # a parameters cell has a line for each parameter
    parameters = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert all(cell.source.count("\n") < 25 for cell in code if cell not in parameters)
    assert not any(cell.outputs or cell.execution_count for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for cell in code:
        tree = ast.parse(cell.source)
        defined = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef, ast.Lambda)
        assert not any(isinstance(node, defined) for node in ast.walk(tree))
    for node in ast.parse(tagged[0].source).body:
        assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.UnaryOp)


def test_profiles_name_real_parameters():
    for profile in sorted((NOTEBOOKS[0].parent / "params").glob("profile_*.yaml")):
        for step in runner.load(profile):
            check_parameters(read_parameters(step.notebook), step.params)
            assert step.expect in {"PASS", "FAIL", "GO", "NO-GO", "DONE", None}


def test_records_validate(original, corrected):
    for _, directory, _ in (original, corrected):
        record = RunRecord.read(directory)
        keys = {"notebook", "status", "verdict", "params", "metrics", "provenance", "stages"}
        assert keys <= set(record.to_dict())
