"""One chain from bytes to weights: nothing on the way can be exchanged without a word."""

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from boxes import views_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_captures import FORMATS, co3d
from test_captures import truth as truth
from test_dataset import write_original
from test_train import CONFIG, Line, certify, fit
from test_weights import TINY

from fresnel import gate
from fresnel.bootstrap import CORRECTED, bootstrap
from fresnel.data import dataset
from fresnel.data.dataset import DatasetError
from fresnel.gate import receipts
from fresnel.host.files import write_atomic
from fresnel.models.cvs import CVS, CVSConfig
from fresnel.models.decoder import Decoder, predictor
from fresnel.objects import sources
from fresnel.objects.assets import find_assets
from fresnel.objects.render_set import fingerprint
from fresnel.report import html
from fresnel.report.index import index
from fresnel.report.record import RunRecord
from fresnel.study.results import export
from fresnel.training import checkpoints

LAYOUTS: dict[str, Callable[[Path, Any], Any]] = {
    "ours": FORMATS["ours"],
    "transforms": FORMATS["transforms"],
    "colmap text": FORMATS["colmap text"],
    "colmap binary": FORMATS["colmap binary"],
    "co3d": co3d,
    "original": lambda folder, truth: write_original(folder / "o", 1) and folder / "o",
}
UNREAD = {"points3D.txt", "points3D.bin", "rigs.bin", "frames.bin"}
UNREAD |= {"input_features.npy", "input_depth.npy"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No checkout here: what is kept outside of data is kept in the cache."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fresnel/receipts"


def opens_as(root: Path) -> str:
    """The content hash, or that it is refused."""
    try:
        return dataset.open(root).content_hash
    except DatasetError:
        return "refused"


@pytest.mark.parametrize("layout", [*LAYOUTS, "set of captures"])
def test_every_file_that_is_read_is_bound(
    layout: str, truth: Any, tmp_path: Path, elsewhere: Path
) -> None:
    root = tmp_path / "data"
    if layout == "set of captures":
        for name in ("transforms", "colmap text"):
            LAYOUTS[name](root / name, truth)
    else:
        root.mkdir()
        root = LAYOUTS[layout](root, truth)
    before = sorted(root.rglob("*"))
    data = dataset.open(root)
    receipt = gate.write_receipt(data, "gate", True, "fine")
    assert gate.require_receipt(dataset.open(root)) == receipt
    if layout == "ours":
        shutil.rmtree(root / "receipts")
    assert sorted(root.rglob("*")) == before, "no file of ours in other people's folders"
    assert (layout == "ours") != elsewhere.is_dir()
    for path in (path for path in before if path.is_file() and path.name not in UNREAD):
        sound = path.read_bytes()
        path.write_bytes(sound + b" ")
        # of ours the manifest's claims are compared where bytes are read
        assert opens_as(root) != data.content_hash or layout == "ours"
        if path.name != "manifest.json":
            with pytest.raises(gate.GateRefusal):
                gate.require_receipt(data, receipt=receipt)
        path.write_bytes(sound)
    assert gate.require_receipt(data, receipt=receipt) == receipt


def test_every_word_of_a_manifest_is_bound_or_not_read(tmp_path: Path) -> None:
    meta = {"object_splits": {"a": "train"}, "elevation_is_assumed": False, "config": {"pivot": 1}}
    made = dataset.write(tmp_path / "set", [views_of(0, size=16, views=2)], meta=meta)
    path = made.path / "manifest.json"
    sound = json.loads(path.read_text())

    def places(value: Any, way: tuple[Any, ...] = ()) -> Any:
        rows = value if isinstance(value, list) else ()
        for key, each in value.items() if isinstance(value, dict) else enumerate(rows):
            yield (*way, key)
            yield from places(each, (*way, key))

    for *way, last in places(sound):
        manifest = json.loads(path.read_text())
        inner = manifest
        for step in way:
            inner = inner[step]
        inner[last] = "another"
        path.write_text(json.dumps(manifest))
        with pytest.raises(DatasetError):
            dataset.open(made.path)
        path.write_text(json.dumps(sound))
    path.write_text(json.dumps(sound | {"layout": "captures", "is_subset": False, "parts": []}))
    assert dataset.open(made.path) == made


@pytest.mark.parametrize("layout", ["transforms", "colmap text", "co3d"])
def test_a_description_is_hashed_as_it_was_parsed(
    layout: str, truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanged between parsing and hashing, and back again: the poses' own bytes count."""
    root = LAYOUTS[layout](tmp_path, truth)
    good, prepare = dataset.open(root), dataset.captured.prepare

    def exchange(*arguments: Any) -> Any:
        for path in root.rglob("*"):
            if path.suffix in (".json", ".txt", ".jgz"):
                path.write_bytes(path.read_bytes() + b"\n")
        return prepare(*arguments)

    monkeypatch.setattr(dataset.captured, "prepare", exchange)
    raced = dataset.open(root)
    assert raced.content_hash == good.content_hash
    with pytest.raises(DatasetError):
        raced.verify()


def test_openings_of_one_capture_have_a_receipt_each(truth: Any, tmp_path: Path) -> None:
    root = LAYOUTS["transforms"](tmp_path, truth)
    ways = [{}, {"image_size": 16}, {"views": 3}]
    for way in ways:
        gate.write_receipt(dataset.open(root, **way), "gate", True, str(way))
    for way in ways:
        assert gate.require_receipt(dataset.open(root, **way)).summary == str(way)


def test_a_folder_that_cannot_be_written_keeps_its_receipts_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    data = dataset.write(tmp_path / "set", [views_of(0, size=16, views=2)], meta={})
    shutil.copytree(data.path, tmp_path / "before")

    def write(path: Path, text: str) -> None:
        if path.is_relative_to(data.path):
            raise OSError(30, "Read-only file system")
        write_atomic(path, text)

    monkeypatch.setattr(receipts, "write_atomic", write)
    receipt = gate.write_receipt(data, "gate", True, "fine")
    assert gate.receipt_path(data).is_relative_to(elsewhere)
    assert gate.require_receipt(data) == receipt and not (data.path / "receipts").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(OSError, match=r"gate\.json of .*can't be written, tried .*XDG_CACHE_HOME"):
        gate.write_receipt(data, "gate", True, "fine")


STAINS: dict[str, Callable[[receipts.Receipt], receipts.Receipt]] = {
    "by gate 1": lambda r: replace(r, gate_version=1),
    "failed": lambda r: replace(r, passed=False),
    "calibrated ones: max_up_tilt_deg 50": lambda r: replace(
        r, thresholds=r.thresholds | {"max_up_tilt_deg": 50.0}
    ),
    "calibrated ones: healthy_rate None": lambda r: replace(r, thresholds={}),
    "saw 1 records of 2": lambda r: replace(r, records_seen=1),
    "saw 1 records of 1, this data has 2": lambda r: replace(r, records_seen=1, records_total=1),
    "was overridden: because": lambda r: replace(r, reasons=("because",)),
    "overridden": lambda r: replace(r, overridden=True),
}


@pytest.mark.parametrize("said", STAINS)
def test_what_is_no_clean_pass_of_the_whole_ends_as_overridden(said: str, tmp_path: Path) -> None:
    records = [views_of(k, size=16, views=2) for k in range(2)]
    data = dataset.write(tmp_path / "set", records, meta={})
    receipt = STAINS[said](gate.write_receipt(data, "gate", True, "fine"))
    for view in (data, data.tensors()):
        with pytest.raises(gate.GateRefusal, match=said):
            gate.require_receipt(view, receipt=receipt)
        assert gate.require_receipt(view, receipt=receipt, allow_failed=True).overridden


def test_overridden_stays_on_all_that_follows(tmp_path: Path) -> None:
    task: Any = Line()
    receipt = certify(tmp_path, passed=False)
    options: Any = {"config": CONFIG, "progress_bar": False, "run_dir": tmp_path / "run"}
    result = fit(task, receipt=receipt, allow_failed_gate=True, **options)
    assert result.gate_overridden and result.ema_model.gate_overridden
    assert checkpoints.read(tmp_path / "run/checkpoints/latest.safetensors")[1]["gate_overridden"]
    # what starts from such weights, on sound data
    task = Line()
    task.model.gate_overridden = True
    resumed: Any = {**options, "run_dir": tmp_path / "other"}
    assert fit(task, receipt=certify(tmp_path), **resumed).gate_overridden
    with pytest.raises(ValueError, match="gate_overridden was True, now False"):
        fit(Line(), receipt=certify(tmp_path), **resumed)

    network = CVS(CVSConfig.preset("tiny"))
    network.gate_overridden = True
    run = RunRecord("03", "finished", "PASS", provenance={"datasets": []})
    path = export(network, tmp_path / "cvs.safetensors", run)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fresnel"])
    assert header["gate_overridden"] is True
    start = CVS(CVSConfig.preset("tiny"))
    start.start_from(CVS.load(path))
    assert start.gate_overridden and not CVS(CVSConfig.preset("tiny")).gate_overridden
    del header["gate_overridden"]  # of before the stamp: what was asked for tells
    save_file(load_file(path), path, {"fresnel": json.dumps(header)})
    assert not CVS.load(path).gate_overridden
    header["params"] = {"allow_failed_gate": True}
    save_file(load_file(path), path, {"fresnel": json.dumps(header)})
    assert CVS.load(path).gate_overridden

    decoder = Decoder(TINY)
    decoder.gate_overridden = True
    decoder = Decoder.load(decoder.save(tmp_path / "decoder.safetensors"))
    assert vars(predictor(decoder))["gate_overridden"] is True
    seen = dataset.write(tmp_path / "seen", [views_of(0, size=32, views=2)], meta={})
    config = replace(CORRECTED, views_per_image=2, image_size=32)
    for taint in (True, False):
        decoder.gate_overridden = taint
        made = bootstrap(seen.inputs(), decoder, config, tmp_path / f"made-{taint}")
        about = {"dataset_hash": made.content_hash, "examples_seen": 1, "examples_total": 1}
        verdict = gate.Verdict(True, (), "fine", thresholds=asdict(gate.GateConfig()), **about)
        assert gate.issue_receipt(made, verdict).overridden is taint
    stamped = run.replace(metrics={"gate_overridden": True})
    assert stamped.badge == "PASS, overridden" and html.TONES[stamped.badge] == "warn"
    (tmp_path / "reports/runs/one").mkdir(parents=True)
    stamped.write(tmp_path / "reports/runs/one")
    assert "PASS, overridden</span>" in index(tmp_path / "reports").read_text()


def test_a_smoke_run_stays_unthresholded(tmp_path: Path) -> None:
    data = dataset.write(tmp_path / "set", [views_of(0, size=16, views=2)], meta={})
    gate.write_receipt(data, "smoke-cvs", True, "go")
    assert gate.require_receipt(data, "smoke-cvs").passed


EDITS: dict[str, Callable[[Any], Any]] = {
    "in place": lambda data: data.rgb[1, 0, 0].add_(1) is None or data,
    "by numpy": lambda data: data.inputs.alpha.numpy().fill(7) or data,
    "a camera": lambda data: data.cameras.viewmats[0, 1, 2].mul_(2) is None or data,
    "replaced": lambda data: replace(data, depth=2 * data.depth),
    "exchanged": lambda data: replace(data, rgb=data.rgb.flip(0)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_data_edited_in_memory_are_refused(edit: str, tmp_path: Path) -> None:
    two = [views_of(index, size=16, views=2) for index in range(2)]
    data = dataset.write(tmp_path / "set", two, meta={})
    receipt = gate.write_receipt(data, "gate", True, "fine")
    for sound in (data.tensors(), data.tensors(8)[[1]], data.tensors().to("cpu")):
        assert gate.require_receipt(sound, receipt=receipt) == receipt
    for whole in (EDITS[edit](data.tensors()), EDITS[edit](data.tensors())[[1, 0]]):
        with pytest.raises(gate.GateRefusal, match="edited in memory"):
            gate.require_receipt(whole, receipt=receipt, allow_failed=True)


MESHES = {
    "escaped uri": ("m.gltf", '{"images": [{"uri": "t\\u0065x.png"}]}', "tex.png"),
    "materials in capitals": ("m.mtl", "newmtl a\nMAP_KD tex.png\n", "tex.png"),
    "a comment behind": ("m.mtl", "newmtl a\nmap_Kd my tex.png # mine\n", "my tex.png"),
    "a buffer": ("m.gltf", '{"buffers": [{"uri": "m.bin", "byteLength": 3}]}', "m.bin"),
    "an archive": ("readme.txt", "", "objects.zip"),
}


def zipped(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m.obj", "mtllib m.mtl\n")
        archive.writestr("tex.png", content)


@pytest.mark.parametrize("how", MESHES)
def test_every_texture_is_in_a_renderings_key(how: str, tmp_path: Path) -> None:
    name, text, texture = MESHES[how]
    folder = tmp_path / "objects"
    folder.mkdir()
    (folder / name).write_text(text)
    if name.endswith(".mtl"):
        (folder / "m.obj").write_text("mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    write = zipped if how == "an archive" else Path.write_bytes
    write(folder / texture, b"one")
    before = fingerprint(find_assets(folder))
    write(folder / texture, b"two")
    assert fingerprint(find_assets(folder)) != before


def test_every_member_of_a_zip_is_bound(tmp_path: Path) -> None:
    """Another mesh, material, texture or author in an archive of objects: another dataset, without
    a receipt; the first one's stands when the archive is as it was."""

    def picture(colour: str) -> bytes:
        Image.new("RGB", (2, 2), colour).save(tmp_path / "picture.png")
        return (tmp_path / "picture.png").read_bytes()

    listed = [{"file": "m.obj", "split": "train", "creator": "Ann"}]
    square = "mtllib m.mtl\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\n"
    members = {
        "manifest.json": (json.dumps(listed), json.dumps(listed).replace("Ann", "Bea")),
        "m.obj": (f"{square}f 1/1 2/2 3/3\n", f"{square}v 1 1 1\nf 1/1 2/2 4/3\n"),
        "m.mtl": ("newmtl m\nmap_Kd tex.png\n", "newmtl m\nKd 0 1 0\n"),
        "tex.png": (picture("red"), picture("blue")),
    }

    def opened(other: str = "") -> Any:
        with zipfile.ZipFile(tmp_path / "objects.zip", "w") as archive:
            for name, contents in members.items():
                # the time would be another after two seconds
                archive.writestr(zipfile.ZipInfo(name), contents[name == other])
        options = {"image_size": 16, "views": 1, "cache": tmp_path / "cache"}
        return sources.open(tmp_path / "objects.zip", **options)

    receipt = gate.write_receipt(opened(), "gate", True, "fine")
    for name in members:
        other = opened(name)
        assert other.content_hash != receipt.dataset_hash, name
        with pytest.raises(gate.GateRefusal, match="no gate receipt"):
            gate.require_receipt(other)
        with pytest.raises(gate.GateRefusal, match="of other data"):
            gate.require_receipt(other, receipt=receipt)
    assert gate.require_receipt(opened()) == receipt


@pytest.mark.parametrize(
    "change",
    [{"config": {"patch": 0}}, {"facts": {"render_size": 10**9}}, {"facts": {"render_size": "x"}}],
    ids=str,
)
def test_a_checkpoint_builds_nothing_beyond_bounds(change: dict[str, Any], tmp_path: Path) -> None:
    path = Decoder(TINY).save(tmp_path / "d.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fresnel"])
    for key, value in change.items():
        header[key] |= value
    save_file(load_file(path), path, {"fresnel": json.dumps(header)})
    with pytest.raises(ValueError, match=r"d\.safetensors: "):
        Decoder.load(path)
