"""Ray-traced meshes: geometry, colour, anti-aliasing, objects, and the data made of them."""

import hashlib
import json
import os
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from fresnel import look_at, orbit
from fresnel.data.dataset import DatasetError, MultiViewDataset
from fresnel.host.pool import processes
from fresnel.objects import assets as assets_module
from fresnel.objects import gltf as gltf_files
from fresnel.objects import render_set as rendering
from fresnel.objects import sources, trace
from fresnel.objects.assets import Asset, embedded_assets, find_assets
from fresnel.objects.render_set import render_set
from fresnel.objects.surface import Material, Part, Surface, assemble

PBR = trimesh.visual.material.PBRMaterial
TINY = {"image_size": 8, "views": 1, "samples": 1}
SQUARE = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nf 1/1 2/2 3/3 4/3\n"
PLAIN = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\nf 1 2 3 4\n"
AMBIENT = 0.32
LIGHTS = (((0.55, 0.70, 0.60), 0.58), ((-0.75, 0.20, 0.55), 0.30), ((-0.10, 0.45, -0.90), 0.38))
"""Towards the key, the fill and the rim light, and their strengths."""


def camera(eye=(0.0, 0.0, 3.0), size=32):
    return look_at(torch.tensor([eye]), (0, 0, 0), focal_px=1.2 * size, width=size, height=size)


def light(normal) -> float:
    def unit(vector):
        return np.array(vector) / np.linalg.norm(vector)

    parts = (strength * max(0.0, unit(normal) @ unit(way)) for way, strength in LIGHTS)
    return AMBIENT + sum(parts)


def linear(encoded: float) -> float:
    """IEC 61966-2-1, above its linear foot."""
    return ((encoded + 0.055) / 1.055) ** 2.4


def expected(linear_color, normal=(0, 0, 1)) -> list[float]:
    lit = [value * light(normal) for value in linear_color]
    return [1.055 * v ** (1 / 2.4) - 0.055 if v > 0.0031308 else 12.92 * v for v in lit]


def surface(mesh) -> Surface:
    """A mesh or scene of trimesh's, through glTF."""
    if isinstance(mesh, Surface):
        return mesh
    return gltf_files.read(trimesh.Scene(mesh).export(file_type="glb"), lambda name: None)


def draw(mesh, *args, **options):
    return trace.render(surface(mesh), *args, **options)


def quad(z=0.0, half=0.5, **visual) -> trimesh.Trimesh:
    """A square in the z plane that faces +Z."""
    vertices = [[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]]
    mesh = trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], process=False)
    if visual:
        uv = visual.pop("uv", [[0, 0], [1, 0], [1, 1], [0, 1]])
        mesh.visual = trimesh.visual.TextureVisuals(uv=uv, material=PBR(**visual))
    return mesh


def coloured(**colours) -> trimesh.Trimesh:
    mesh = quad()
    mesh.visual = trimesh.visual.ColorVisuals(mesh, **colours)
    return mesh


def sphere(radius=0.5) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=3, radius=radius)


def obj_file(folder: Path, material: str, shape: str = PLAIN) -> Path:
    (folder / "a.mtl").write_text(f"newmtl m\n{material}\n")
    (folder / "a.obj").write_text(f"mtllib a.mtl\nusemtl m\n{shape}")
    return folder / "a.obj"


def loaded(mesh, folder: Path, **options) -> trimesh.Scene:
    """A mesh, written as GLB and read again."""
    (folder / "mesh.glb").write_bytes(mesh.export(file_type="glb", **options))
    return trace.load(folder / "mesh.glb")


def centre(mesh, **where) -> list[float]:
    views = draw(mesh, camera(**where))
    return views.rgb[0, views.rgb.shape[1] // 2, views.rgb.shape[2] // 2].tolist()


# --- geometry ----------------------------------------------------------------------------------


def test_coverage_and_depth_of_a_sphere_are_the_analytic_ones():
    size, distance, radius = 64, 3.0, 0.5
    views = draw(sphere(radius), camera(size=size), samples=4)
    assert views.rgb.shape == (1, size, size, 3) and views.rgb.dtype == torch.float32
    assert views.alpha.shape == views.depth.shape == (1, size, size, 1)
    silhouette = 1.2 * size * radius / (distance**2 - radius**2) ** 0.5
    assert views.alpha.sum().item() == pytest.approx(np.pi * silhouette**2, rel=0.02)
    assert views.depth[0, size // 2, size // 2, 0].item() == pytest.approx(2.5, abs=0.01)
    assert (torch.cat([views.rgb, views.depth], -1) * (views.alpha == 0) == 0).all()
    # colour is premultiplied by coverage
    edge = (views.alpha > 0) & (views.alpha < 1)
    assert edge.any() and (views.rgb <= views.alpha + 1e-5).all()
    assert (views.rgb / views.alpha.clamp_min(1e-6))[edge.expand_as(views.rgb)].min() > 0.2
    inside = draw(sphere(radius), camera(eye=(0.0, 0.0, 0.1)))
    assert inside.alpha.min() == 1, "a camera inside sees it all around"


@pytest.mark.parametrize("right", [0, 4])
def test_pixels_follow_the_camera_convention(right):
    """A small square up and to the right of the centre appears up and to the right, and the
    principal point moves it as far."""
    mesh, cameras = quad(half=0.1), camera(size=60)
    mesh.apply_translation([0.5, 0.8, 0.0])
    cameras.Ks[:, 0, 2] += right
    ys, xs = torch.nonzero(draw(mesh, cameras).alpha[0, ..., 0], as_tuple=True)
    # x = 30 + 72 * 0.5 / 3 = 42, y = 30 - 72 * 0.8 / 3 = 10.8, in pixels with centres at +0.5.
    assert (xs.float() + 0.5).mean().item() == pytest.approx(42.0 + right, abs=0.3)
    assert (ys.float() + 0.5).mean().item() == pytest.approx(10.8, abs=0.3)


def test_edges_are_anti_aliased_on_a_stratified_grid_and_depth_is_along_the_axis():
    offsets = trace._sample_offsets(4)
    assert sorted(offsets[:, 0].tolist()) == sorted(offsets[:, 1].tolist())
    assert len(set(offsets[:, 0].tolist())) == 4
    # A vertical edge covering half of a pixel's width covers half of its samples.
    size = 30
    mesh = quad(half=0.5 * 3 / (1.2 * size) * 9)  # 9 pixels wide: edges at 10.5 and 19.5
    views = draw(mesh, camera(size=size))
    assert views.alpha[0, 15, 9:12, 0].tolist() == pytest.approx([0, 0.5, 1])
    assert torch.allclose(views.depth[views.depth > 0], torch.tensor(3.0), atol=1e-5)
    fine = draw(mesh, camera(size=size), samples=16).alpha
    assert fine.sum().item() == pytest.approx(81.0, rel=1e-3)
    assert draw(mesh, camera(size=size), samples=1).alpha.unique().tolist() == [0, 1]


def test_many_views_equal_one_by_one_and_chunks_do_not_show(monkeypatch):
    angles = torch.tensor([0.0, 70.0, 200.0]), torch.tensor([0.0, 30.0, -20.0])
    cameras = orbit(*angles, 2.2, pivot=(0, 0, 0), focal_px=24.0, width=20, height=16)
    box = trimesh.creation.box((0.6, 1.0, 0.4))
    together = draw(box, cameras)
    for k in range(3):
        alone = draw(box, cameras[k : k + 1])
        assert torch.equal(together.rgb[k], alone.rgb[0])
        assert torch.equal(together.depth[k], alone.depth[0])
    monkeypatch.setattr(trace, "_RAYS_AT_ONCE", 100)
    assert torch.equal(draw(box, cameras).rgb, together.rgb)


# --- colour ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "eye", "want"),
    [
        (quad(baseColorFactor=[0.2, 0.4, 0.6, 1.0]), 3.0, expected([0.2, 0.4, 0.6])),
        (quad(baseColorFactor=[0.5] * 3 + [1.0]), -3.0, expected([128 / 255] * 3, (0, 0, -1))),
    ],
    ids=["a factor is linear", "two-sided"],
)
def test_colours_are_lit_by_the_stated_lights(mesh, eye, want):
    assert centre(mesh, eye=(0.0, 0.0, eye)) == pytest.approx(want, abs=0.01)


def test_vertex_colours_of_gltf_are_linear(tmp_path):
    scene = loaded(coloured(vertex_colors=[[128, 0, 0, 255]] * 4), tmp_path)
    assert centre(scene) == pytest.approx(expected([128 / 255, 0, 0]), abs=0.01)


def test_textures_are_srgb_with_the_first_row_on_top_and_repeat():
    image = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [128, 128, 128]]], np.uint8)
    big = Image.fromarray(np.kron(image, np.ones((16, 16, 1), np.uint8)))

    def corners(mesh):
        rgb = draw(mesh, camera(size=40)).rgb[0]
        return [rgb[y, x] for y, x in ((16, 16), (16, 24), (24, 16), (24, 24))]

    red, green, blue, grey = corners(quad(baseColorTexture=big))
    assert red[0] > 0.5 and red[1:].max() < 0.01
    assert green[1] > 0.5 and blue[2] > 0.5
    assert grey.tolist() == pytest.approx(expected([linear(128 / 255)] * 3), abs=0.01)
    moved = [[3, -2], [4, -2], [4, -1], [3, -1]]
    for a, b in zip(corners(quad(baseColorTexture=big, uv=moved)), (red, green), strict=False):
        assert torch.allclose(a, b, atol=1e-3)
    tinted = corners(quad(baseColorTexture=big, baseColorFactor=[1.0, 0.0, 0.0, 1.0]))
    assert torch.allclose(tinted[0], red, atol=1e-3) and tinted[1].max() < 0.01


def test_normals_are_the_files_or_smooth_on_a_sphere_and_sharp_on_a_box(tmp_path):
    solid = surface(sphere())
    unit = solid.corners / np.linalg.norm(solid.corners, axis=-1, keepdims=True)
    assert (solid.normals * unit).sum(-1).min() > 0.99
    box = surface(trimesh.creation.box((1, 1, 1)))
    assert np.allclose(np.abs(box.normals).max(-1), 1, atol=1e-5)
    tilted = np.tile([0.6, 0.0, 0.8], (4, 1))
    mesh = trimesh.Trimesh(quad().vertices, quad().faces, vertex_normals=tilted, process=False)
    scene = loaded(trimesh.Scene(mesh), tmp_path, include_normals=True)
    assert np.allclose(surface(scene).normals, [0.6, 0.0, 0.8], atol=1e-5)


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("texture", ["", "map_Kd t.png"])
def test_obj_with_its_material_file(texture, tmp_path):
    """A texture that is not laid out leaves the colour."""
    Image.new("RGB", (2, 2), (0, 0, 255)).save(tmp_path / "t.png")
    scene = trace.load(obj_file(tmp_path, f"Kd 0.5 0 0\n{texture}"))
    assert centre(scene) == pytest.approx(expected([linear(127 / 255), 0, 0]), abs=0.01)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.glb", None, r"none\.glb: no such file"),
        ("text.glb", b"hello", r"text\.glb: not readable as glTF"),
        ("a.png", b"hello", r"a \.png file"),
        ("cut.glb", embedded_assets()[0].source.read_bytes()[:5000], "it is cut off"),
    ],
)
def test_files_that_are_no_meshes_are_refused_by_name(name, content, message, tmp_path):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        trace.load(tmp_path / name)


def test_meshes_without_substance_are_refused():
    corners = np.eye(3)
    for points, faces, message in (
        (corners, [], "no triangle"),
        (corners * np.nan, [[0, 1, 2]], "NaN or infinite"),
        (corners, [[0, 1, 9]], "a face names a vertex"),
        (corners, [[0, 1, -1]], "a face names a vertex"),
    ):
        with pytest.raises(ValueError, match=message):
            assemble([Part(points, np.array(faces, int).reshape(-1, 3), Material())])
    with pytest.raises(ValueError, match="coincide"):
        surface(quad(half=0.0)).normalised()
    with pytest.raises(ValueError, match="square number"):
        draw(quad(), camera(), samples=5)
    with pytest.raises(ValueError, match="batch shape"):
        draw(quad(), camera()[0])


@pytest.mark.parametrize("size", [None, 9000])
def test_a_texture_that_would_run_another_program_or_fill_memory_is_refused(size, tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    (tmp_path / "t.png").write_bytes(eps)
    if size:
        Image.new("L", (size, size)).save(tmp_path / "t.png")
    with pytest.raises(ValueError, match="9000 x 9000" if size else "not a readable image"):
        surface(trace.load(obj_file(tmp_path, "map_Kd t.png", SQUARE)))


def test_what_is_too_large_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(assets_module, "MAX_BYTES", 1000)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.glb", bytes(1 << 25))
    (tmp_path / "b.glb").write_bytes(bytes(1 << 25))
    for asset in (*find_assets(path), Asset("b", tmp_path / "b.glb")):
        tracemalloc.start()
        with pytest.raises(DatasetError, match="more than 1000 bytes"):
            asset.read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 22


# --- objects -----------------------------------------------------------------------------------


def test_the_embedded_objects_are_what_their_list_says():
    folder = Path(trace.__file__).parents[1] / "assets"
    entries = json.loads((folder / "objects.json").read_text())
    assert {entry["file"] for entry in entries} == {path.name for path in folder.glob("*.glb")}
    for entry in entries:
        data = (folder / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert entry["licence"] == "CC0-1.0" and entry["creator"] and entry["source"]
    assert sum((folder / entry["file"]).stat().st_size for entry in entries) <= 3_000_000
    assert "CC0 1.0 Universal" in (folder / "LICENSE-CC0-1.0.txt").read_text()
    training, held_out = embedded_assets("train"), embedded_assets("held_out")
    names = {asset.name for asset in embedded_assets()}
    assert (len(training), len(held_out), len(names)) == (16, 8, 24)
    assert {asset.category for asset in held_out} <= {asset.category for asset in training}
    assert training[0].attribution == "Chair by exL (CC0-1.0)"


def test_a_zip_file_with_a_manifest(tmp_path):
    """Colours are linear, as glTF has them, whatever the entries' sources are called."""
    listed = [
        {"file": f"objects/{name}.glb", "split": split, "source": f"{name}.obj"}
        for name, split in (("a", "train"), ("b", "test"))
    ]
    glb = quad(baseColorFactor=[0.5, 0.5, 0.5, 1.0]).export(file_type="glb")
    path = tmp_path / "objects.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", json.dumps(listed))
        archive.writestr("objects/A.glb", glb)
    assets = find_assets(path)
    assert [(asset.name, asset.split) for asset in assets] == [("a", "train"), ("b", "test")]
    assert centre(trace.load(assets[0])) == pytest.approx(expected([127 / 255] * 3), abs=0.01)
    with pytest.raises(DatasetError, match="no member"):
        trace.load(assets[1])
    (tmp_path / "no.zip").write_text("hello")
    with pytest.raises(DatasetError, match="zip"):
        find_assets(tmp_path / "no.zip")


def test_folders_manifests_and_zips_of_objects_open_as_datasets(tmp_path):
    source = tmp_path / "objects"
    (source / "deep").mkdir(parents=True)
    glb = quad(baseColorFactor=[0.5, 0.1, 0.1, 1.0]).export(file_type="glb")
    (source / "a.glb").write_bytes(glb)
    (source / "deep/b.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    with zipfile.ZipFile(source / "more.zip", "w") as archive:
        archive.writestr("x/c.glb", glb)
    options = {"image_size": 8, "views": 2, "cache": tmp_path / "cache"}
    opened = sources.open(source, **options)
    assert opened.names == ("a__0", "b__0", "c__0") and opened.views_per_object == 2
    assert sources.open(source / "a.glb", **options).names == ("a__0",)
    (source / "deep/a.glb").write_bytes(glb)
    names = [asset.name for asset in find_assets(source)]
    assert names == ["a", "deep/a", "deep/b", "c"], "short where they are unique"
    (source / "deep/a.glb").unlink()
    entry = {"file": "deep/b.obj", "name": "B", "split": "test", "licence": "CC0", "creator": "me"}
    (source / "list.json").write_text(json.dumps({"assets": [entry]}))
    listed = sources.open(source / "list.json", **options)
    assert listed.names == ("b__0",) and listed[0].attribution == "B by me (CC0)"
    assert listed.meta["object_splits"] == {"b": "test"}
    for file, message in (
        ("../secret.glb", "leads out of its folder"),
        ("gone.glb", r"gone\.glb: no such file"),
        ("a.png", "is not one of"),
    ):
        (source / "manifest.json").write_text(json.dumps([{**entry, "file": file}]))
        with pytest.raises(DatasetError, match=message):
            sources.open(source, **options)


# --- data --------------------------------------------------------------------------------------

HELD_OUT = embedded_assets("held_out")[:2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    path = tmp_path_factory.mktemp("objects") / "set"
    return render_set(HELD_OUT, path, image_size=24, inputs_per_object=2)


def azimuths_of(data: MultiViewDataset, index: int) -> np.ndarray:
    paths = sorted((data.path / f"image_{index:04d}").glob("view_*/pose.json"))
    return np.array([json.loads(path.read_text())["azimuth_deg"] for path in paths])


def test_render_set_makes_truth_that_agrees_with_itself(made):
    assert made.names == tuple(f"{a.name}__{k}" for a in HELD_OUT for k in range(2))
    assert made.meta["splits"] == ["held_out"]
    tensors = made.tensors()
    for i in range(len(made)):
        off = azimuths_of(made, i) - np.arange(8) * 45
        assert (np.abs((off + 180) % 360 - 180) < 1e-2).all()
    elevations = tensors.cameras.elevation_deg((0, 0, 0))
    assert elevations.min() >= -30.01 and elevations.max() <= 45.01
    inputs = tensors.inputs.cameras.elevation_deg((0, 0, 0))
    assert inputs.min() >= -0.01 and inputs.max() <= 30.01
    assert torch.allclose(tensors.cameras.centers.norm(dim=-1), torch.tensor(2.2), atol=1e-4)
    assert tensors.cameras.Ks[0, 0, 0, 0].item() == pytest.approx(1.2 * 24)
    assert tensors.depth is not None and tensors.inputs.depth is not None
    covered = tensors.alpha == 255
    assert tensors.depth[covered].min() > 1.3 and tensors.depth[covered].max() < 3.1
    assert (tensors.alpha.float().mean(dim=(2, 3)) > 5).all()
    border = [tensors.alpha[:, :, [0, -1]].flatten(), tensors.alpha[..., [0, -1]].flatten()]
    assert torch.cat(border).max() == 0, "the object stays inside the frame of every view"
    assert made[0].attribution.endswith("(CC0-1.0)")


def test_what_an_object_gets_depends_on_seed_and_name_only(made, tmp_path):
    options = {"image_size": 24, "inputs_per_object": 2}
    alone = render_set(HELD_OUT[1:], tmp_path / "b", **options)
    other = render_set(HELD_OUT[1:], tmp_path / "d", seed=1, **options)
    assert torch.equal(made[2].rgb, alone[0].rgb)
    assert not torch.equal(other[0].cameras.viewmats, alone[0].cameras.viewmats)


def test_stretched_records_show_other_shapes_of_the_same_object(made, tmp_path):
    options = {"image_size": 24, "inputs_per_object": 2, "stretch": 1.6}
    found = render_set(HELD_OUT, tmp_path / "set", **options)
    assert found.names == made.names
    assert found.meta["stretch"] == 1.6 and "stretch" not in made.meta
    assert torch.equal(found[0].rgb, made[0].rgb), "the first is the object itself"
    tensors, same = found.tensors(), made.tensors()
    assert torch.equal(tensors.cameras.viewmats, same.cameras.viewmats)
    for k in (1, 3):
        ours, theirs = (t.alpha[k].float().sum() for t in (tensors, same))
        assert abs(ours / theirs - 1) > 0.03, "another shape"
    depth = tensors.depth[tensors.alpha == 255]
    assert depth.min() > 2.2 - 0.87 and depth.max() < 2.2 + 0.87, "longest side 1 again"


def test_stretching_keeps_normals_perpendicular():
    solid, factors = surface(sphere()), np.array([2.0, 1.0, 0.5])
    stretched = solid.stretched(factors)
    assert np.allclose(stretched.corners, solid.corners * factors, atol=1e-6)
    assert np.allclose(np.linalg.norm(stretched.normals, axis=-1), 1, atol=1e-5)
    gradient = stretched.corners / factors**2  # the normal of an ellipsoid
    gradient /= np.linalg.norm(gradient, axis=-1, keepdims=True)
    assert (np.einsum("fci,fci->fc", stretched.normals, gradient) > 0.999).all()


def test_random_azimuths_stay_in_their_sectors(tmp_path):
    options = {"image_size": 8, "samples": 1, "azimuths": "random"}
    azimuths = azimuths_of(render_set(HELD_OUT[:1], tmp_path / "set", **options), 0) % 360
    assert (np.floor(azimuths / 45) == np.arange(8)).all()
    assert len(set(np.round(azimuths % 45, 3))) == 8


def test_worker_processes_change_nothing(tmp_path, monkeypatch):
    one = render_set(HELD_OUT, tmp_path / "a", workers=1, **TINY)
    pools = []
    monkeypatch.setattr(rendering, "processes", lambda n: pools.append(n) or processes(n))
    monkeypatch.setattr(rendering, "render", None)  # of this process
    two = render_set(HELD_OUT, tmp_path / "b", workers=2, **TINY)
    assert one.content_hash == two.content_hash and pools == [2]


@pytest.fixture
def rendered(monkeypatch) -> list[str]:
    """The objects that were rendered since."""
    names, load = [], rendering.load
    monkeypatch.setattr(rendering, "load", lambda a: names.append(a.name) or load(a))
    return names


@pytest.mark.parametrize("emptied", [False, True], ids=["stopped", "and a file emptied"])
def test_a_stopped_rendering_goes_on_where_it_was(emptied, tmp_path, monkeypatch, rendered):
    """Whole objects are kept, unless a crash of the machine emptied a file of theirs."""
    assets, write = embedded_assets()[:4], rendering.write_object
    names = [asset.name for asset in assets]
    whole = render_set(assets, tmp_path / "whole", workers=1, **TINY)

    def dying(root, index, views):
        record = write(root, index, views)
        if index == 2:
            (root / record.folder / "view_000" / "rgb.png").write_bytes(b"half")
            raise KeyboardInterrupt
        return record

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rendering, "write_object", dying)
        render_set(assets, tmp_path / "set", workers=1, **TINY)
    assert not (tmp_path / "set").exists()
    (folder,) = tmp_path.glob(".set.rendering-*")
    if emptied:
        (folder / "image_0000" / "view_000" / "rgb.png").write_bytes(b"")
    (tmp_path / ".set.rendering-idle" / "image_0000").mkdir(parents=True)  # of other settings
    rendered.clear()
    made = render_set(assets, tmp_path / "set", workers=1, **TINY)
    assert rendered == ([names[0], *names[2:]] if emptied else names[2:])
    assert made.content_hash == whole.content_hash
    made.verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "whole"]
    assert not list(made.path.glob(".*"))


def test_a_full_disk_says_that_the_work_goes_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rendering, "seal", full)
    with pytest.raises(DatasetError, match=r"No space left.* call again"):
        render_set(HELD_OUT[:1], tmp_path / "set", **TINY)


def test_render_set_refuses_what_it_cannot_render(made, tmp_path):
    dots = trimesh.Scene(trimesh.PointCloud([[0, 0, 0.0]])).export(file_type="glb")
    (tmp_path / "points.glb").write_bytes(dots)
    for chosen, settings, message in (
        ([], {}, "no object given"),
        (HELD_OUT[:1] * 2, {}, "share a name"),
        (HELD_OUT, {"views": 0}, "views: got 0, want at least 1"),
        (HELD_OUT, {"azimuths": "odd"}, "azimuths"),
        (HELD_OUT, {"stretch": 0.5}, r"stretch: got 0\.5"),
        ([Asset("ghost", tmp_path / "ghost.glb")], {}, r"ghost\.glb: no such file"),
        ([Asset("dots", tmp_path / "points.glb")], {}, "'dots': .*holds no triangle"),
    ):
        with pytest.raises(ValueError, match=message):
            render_set(chosen, tmp_path / "a", **settings)
    assert not (tmp_path / "a").exists()
    with pytest.raises(DatasetError, match="overwrite=True"):
        render_set(HELD_OUT, made.path, **TINY)


# --- renderings are found again by content -------------------------------------------------------


def picture(path: Path, colour: tuple[int, int, int]) -> None:
    Image.new("RGB", (2, 2), colour).save(path)


def obj(folder: Path) -> Path:
    picture(folder / "my t.png", (0, 0, 255))
    picture(folder / "n.png", (0, 0, 255))
    return obj_file(folder, "Kd 0.5 0 0\nmap_Kd my t.png\nbump -bm 2 n.png", SQUARE)


def gltf(folder: Path) -> Path:
    for name, data in trimesh.Scene(quad()).export(file_type="gltf").items():
        (folder / name).write_bytes(data)
    return (folder / "model.gltf").rename(folder / "a.gltf")


@pytest.mark.parametrize(
    ("make", "changed"),
    [
        *((obj, name) for name in ("a.obj", "a.mtl", "my t.png", "n.png")),
        *((gltf, name) for name in ("a.gltf", "gltf_buffer_0.bin")),
    ],
)
def test_a_change_to_what_is_shown_renders_again(make, changed, tmp_path):
    path, cache = make(tmp_path), tmp_path / "cache"

    def read() -> tuple[Path, Path]:
        opened = sources.open(path, image_size=8, views=1, cache=cache)
        return opened.path, sources.ground_truth(str(path), "train", **TINY, cache=cache).path

    before, file = read(), tmp_path / changed
    (tmp_path / "other.txt").write_text("of no matter")
    assert read() == before
    data, stat = file.read_bytes(), file.stat()
    if changed.endswith(".png"):
        picture(file, (0, 255, 0))
    elif changed.endswith(".bin"):
        file.write_bytes(data[:-4] + b"\0\0\0\0")
    else:
        file.write_bytes(data.replace(b"0", b"0 ", 1) if b"obj" in data else data + b"\n")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # content counts, not time
    assert not {*read()} & {*before}
    file.write_bytes(data)
    assert read() == before


def test_objects_of_one_name_in_two_folders_are_two_truths(tmp_path):
    found = []
    for name, colour in (("x", [1.0, 0, 0, 1.0]), ("y", [0, 1.0, 0, 1.0])):
        folder = tmp_path / name / "objs"
        folder.mkdir(parents=True)
        (folder / "a.glb").write_bytes(quad(baseColorFactor=colour).export(file_type="glb"))
        found.append(sources.ground_truth(str(folder), "train", **TINY, cache=tmp_path))
    assert found[0].path != found[1].path
    assert not torch.equal(found[0][0].input_rgb, found[1][0].input_rgb)


def test_of_several_callers_one_renders_and_the_others_wait(tmp_path, rendered, capsys):
    source, cache = HELD_OUT[0].source, tmp_path / "cache"

    def hash_of(_):
        return sources.open(source, image_size=32, cache=cache).content_hash

    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(hash_of, range(3)))) == 1
    assert len(rendered) == 1 and "another process makes it" in capsys.readouterr().err
    assert len(list(cache.iterdir())) == 1, "one set, and nothing beside it"
