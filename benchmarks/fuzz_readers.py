"""Coverage-guided fuzzing of the readers: whatever a file says, they answer or refuse.

    pip install atheris
    python benchmarks/fuzz_readers.py [TARGET ...] [--seconds 60]

Each target is one file of a sound input, mutated; anything but a DatasetError is a finding, which
libFuzzer prints with its trace and keeps as crash-* in the work folder.  What was found is then a
test in tests/test_fuzz_readers.py, which needs no atheris.
"""

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Target = tuple[bytes, Callable[[bytes], Any]]
_MESHES = (("box", "glb"), ("model", "gltf"), ("box", "obj"), ("box", "mtl"))
_POSE = [[1.0, 0, 0, 0], [0, 1, 0, 0.5], [0, 0, 1, 3], [0, 0, 0, 1]]


def _pictures(folder: Path) -> None:
    from PIL import Image

    (folder / "images").mkdir()
    for k in range(3):
        Image.new("RGB", (10, 8), (40 * k, 90, 200)).save(folder / f"images/{k}.png")


def _target(
    path: Path, sound: bytes, read: Callable[[], Any], pack: Callable[[bytes], bytes] = bytes
) -> Target:
    """A sound file, and what writes a mutated one in its place and reads it."""

    def written(data: bytes) -> Any:
        path.write_bytes(pack(data))
        return read()

    return sound, written


def targets(folder: Path) -> dict[str, Callable[[], Target]]:
    """By name: what makes a sound file and the function that reads a mutated one."""
    import torch

    from fresnel.data import dataset
    from fresnel.data.formats import captures_in
    from fresnel.objects import trace
    from fresnel.objects.assets import embedded_assets, find_assets
    from fresnel.objects.render_set import render_set
    from fresnel.scene.gaussians import Gaussians

    def transforms() -> Target:
        _pictures(folder)
        frames = [
            {"file_path": f"images/{k}.png", "transform_matrix": _POSE, "k1": 0.01}
            for k in range(3)
        ]
        top = {"camera_model": "OPENCV", "fl_x": 12.0, "camera_angle_x": 0.7, "w": 10, "h": 8}
        text = json.dumps({**top, "frames": frames}).encode()
        return _target(folder / "transforms.json", text, lambda: captures_in(folder))

    def annotations() -> Target:
        _pictures(folder)
        view = {"R": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "T": [0, 0, 2], "focal_length": [2, 2]}
        view |= {"principal_point": [0, 0], "intrinsics_format": "ndc_isotropic"}
        frames = [
            {"sequence_name": "s", "viewpoint": view}
            | {"image": {"path": f"cat/images/{k}.png", "size": [8, 10]}, "mask": {"path": ""}}
            for k in range(2)
        ]
        path, sound = folder / "frame_annotations.jgz", json.dumps(frames).encode()
        return _target(path, sound, lambda: captures_in(folder), gzip.compress)

    def model(name: str) -> Target:
        import numpy as np
        import pycolmap

        _pictures(folder)
        place = folder / "sparse/0"
        place.mkdir(parents=True)
        made = pycolmap.Reconstruction()
        camera = pycolmap.Camera(
            camera_id=1, model="PINHOLE", width=10, height=8, params=[9, 9, 5, 4]
        )
        made.add_camera_with_trivial_rig(camera)
        for k in range(3):
            image = pycolmap.Image(name=f"{k}.png", camera_id=1, image_id=k + 1)
            pose = pycolmap.Rigid3d(np.hstack([np.eye(3), [[k], [0.0], [3.0]]]))
            made.add_image_with_trivial_frame(image, pose)
        (made.write_binary if name.endswith(".bin") else made.write_text)(str(place))
        return _target(place / name, (place / name).read_bytes(), lambda: captures_in(folder))

    def of_ours(name: str) -> Target:
        how = {"views": 2, "image_size": 8, "samples": 1, "workers": 1}
        path = render_set(embedded_assets()[:1], folder / "set", **how).path / name
        return _target(path, path.read_bytes(), lambda: dataset.open(folder / "set")[0])

    def listed() -> Target:
        (folder / "a.glb").write_bytes(b"glTF")
        path = folder / "list.json"
        entry = {"file": "a.glb", "name": "A", "split": "train", "license": "CC0", "creator": "me"}
        sound = json.dumps({"assets": [entry]}).encode()
        return _target(path, sound, lambda: [asset.read() for asset in find_assets(path)])

    def library() -> Target:
        path = folder / "a.sh3f"

        def packed(data: bytes) -> Any:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("PluginFurnitureCatalog.properties", data)
                archive.writestr("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
            return [asset.read() for asset in find_assets(path)]

        return b"id=x\nname#1=A\nmodel#1=/a.obj\nlicense#1=CC0\ncreator#1=me\n", packed

    def mesh(name: str) -> Target:
        import trimesh

        _pictures(folder)
        box = trimesh.creation.box()
        box.visual.vertex_colors = [200, 90, 30, 255]
        files = {**box.export(file_type="gltf"), "box.glb": box.export(file_type="glb")}
        files["box.mtl"] = (
            b"newmtl m\nKd 1 0 0\nKe 0 1 0\nd 0.5\nmap_Kd -s 1 2 -clamp on images/1.png\n"
        )
        text = box.export(file_type="obj", include_normals=True)
        files["box.obj"] = f"mtllib box.mtl\nusemtl m\n{text}\nf -1 -2/1 -3 -4\n".encode()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        shown = folder / name.replace(".mtl", ".obj")
        return _target(folder / name, files[name], lambda: trace.load(shown))

    def splats(name: str) -> Target:
        path, rows = folder / name, torch.rand(4, 4)
        Gaussians(rows[:, :3], rows, rows[:, 1:], rows[:, 0], torch.rand(4, 4, 3)).save(path)
        return _target(path, path.read_bytes(), lambda: Gaussians.load(path))

    def spelled() -> Target:
        names = [*"xyz", "opacity", *(f"scale_{k}" for k in range(3))]
        names += [*(f"rot_{k}" for k in range(4)), "red", "green", "blue"]
        lines = ["ply", "format ascii 1.0", "element vertex 2"]
        lines += [f"property float {name}" for name in names]
        lines += ["element chunk 1", "property list uchar int a", "end_header"]
        lines += [" ".join("0.5" for _ in names)] * 2 + ["3 1 2 3", ""]
        path = folder / "text.ply"
        return _target(path, "\n".join(lines).encode(), lambda: Gaussians.load(path))

    def picture() -> Target:
        _pictures(folder)
        path = folder / "x.png"
        sound = (folder / "images/1.png").read_bytes()
        return _target(path, sound, lambda: dataset.load_image(path))

    return {
        "transforms": transforms,
        "annotations": annotations,
        "images.bin": lambda: model("images.bin"),
        "cameras.txt": lambda: model("cameras.txt"),
        "images.txt": lambda: model("images.txt"),
        "manifest": lambda: of_ours("manifest.json"),
        "pose": lambda: of_ours("image_0000/view_001/pose.json"),
        "list": listed,
        "library": library,
        **{f"mesh {end}": partial(mesh, f"{stem}.{end}") for stem, end in _MESHES},
        **{f"splats {end}": partial(splats, f"a.{end}") for end in ("ply", "spz")},
        "splats in text": spelled,
        "picture": picture,
    }


def fuzz(name: str, seconds: int, work: Path) -> None:
    """One target, in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["fresnel"]):
        from fresnel.data.dataset import DatasetError
    (work / "data").mkdir(parents=True)
    (work / "corpus").mkdir()
    sound, read = targets(work / "data")[name]()
    (work / "corpus" / "sound").write_bytes(sound)
    words = {match.decode() for match in re.findall(rb"[A-Za-z_]{3,20}", sound[:4000])}
    words |= {"NaN", "1e999", "-1", "null", "[]", "{}", "../", "true", "18446744073709551616"}
    (work / "words").write_text("".join(f'"{word}"\n' for word in sorted(words)))
    warnings.simplefilter("ignore")
    read(sound)

    def one(data: bytes) -> None:
        try:
            read(data)
        except DatasetError as error:
            assert str(error)
        except ValueError as error:  # the readers of Gaussians refuse with it
            assert name.startswith("splats") and str(error)

    options = [f"-max_total_time={seconds}", "-max_len=30000", "-rss_limit_mb=2048", "-timeout=20"]
    options += [f"-artifact_prefix={work}/", f"-dict={work}/words", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(work / "corpus")], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        fuzz(arguments.targets[0], arguments.seconds, arguments.inside)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.targets or targets(Path(folder)):
            work = Path(tempfile.gettempdir()) / f"fuzz-{name}"
            shutil.rmtree(work, ignore_errors=True)
            command = [sys.executable, __file__, name, "--seconds", str(arguments.seconds)]
            done = subprocess.run(
                [*command, "--inside", str(work)], stderr=subprocess.PIPE, text=True, check=False
            )
            runs = [line for line in done.stderr.splitlines() if "number_of_executed" in line]
            print(f"{name}: {runs[0].split()[-1] if runs else '?'} inputs, ", end="")
            print("sound" if done.returncode == 0 else f"FOUND something, see {work}", flush=True)
            if done.returncode:
                failed.append(name)
                print(done.stderr[-3000:], file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
