"""Coverage-guided fuzzing of the readers: whatever a file says, they answer or refuse.

    pip install atheris
    python benchmarks/fuzz_readers.py [TARGET ...] [--seconds 60]

Each target is one file of a sound input, mutated; anything but a DatasetError is a finding, which
libFuzzer prints with its trace and keeps as crash-* in the work folder.  What was found is then a
test in tests/test_fuzz_readers.py, which needs no atheris.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Target = tuple[bytes, Callable[[bytes], Any]]
_POSE = [[1.0, 0, 0, 0], [0, 1, 0, 0.5], [0, 0, 1, 3], [0, 0, 0, 1]]


def _pictures(folder: Path) -> None:
    from PIL import Image

    (folder / "images").mkdir()
    for k in range(3):
        Image.new("RGB", (10, 8), (40 * k, 90, 200)).save(folder / f"images/{k}.png")


def _written(path: Path, data: bytes, read: Callable[[], Any]) -> Any:
    path.write_bytes(data)
    return read()


def targets(folder: Path) -> dict[str, Callable[[], Target]]:
    """By name: what makes a sound file and the function that reads a mutated one."""
    from fresnel.data import dataset
    from fresnel.data.formats import captures_in
    from fresnel.objects import trace
    from fresnel.objects.assets import embedded_assets, find_assets
    from fresnel.objects.render_set import render_set

    def transforms() -> Target:
        _pictures(folder)
        frames = [
            {"file_path": f"images/{k}.png", "transform_matrix": _POSE, "k1": 0.01}
            for k in range(3)
        ]
        top = {"camera_model": "OPENCV", "fl_x": 12.0, "camera_angle_x": 0.7, "w": 10, "h": 8}
        top |= {"fresnel": {"pivot": [0, 0, 0], "input": "images/1.png"}}
        path = folder / "transforms.json"
        text = json.dumps({**top, "frames": frames}).encode()
        return text, lambda data: _written(path, data, lambda: captures_in(folder))

    def annotations() -> Target:
        _pictures(folder)
        view = {"R": [[1, 0, 0], [0, 1, 0], [0, 0, 1]], "T": [0, 0, 2], "focal_length": [2, 2]}
        view |= {"principal_point": [0, 0], "intrinsics_format": "ndc_isotropic"}
        frames = [
            {"sequence_name": "s", "viewpoint": view}
            | {"image": {"path": f"cat/images/{k}.png", "size": [8, 10]}, "mask": {"path": ""}}
            for k in range(2)
        ]
        path = folder / "frame_annotations.jgz"
        return json.dumps(frames).encode(), lambda data: _written(
            path, gzip.compress(data), lambda: captures_in(folder)
        )

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
        return (place / name).read_bytes(), lambda data: _written(
            place / name, data, lambda: captures_in(folder)
        )

    def ours() -> Path:
        path = folder / "set"
        if not path.exists():
            asset = embedded_assets()[0]
            render_set([asset], path, views=2, image_size=8, samples=1, workers=1)
        return path

    def of_ours(name: str) -> Target:
        path = ours() / name
        return path.read_bytes(), lambda data: _written(
            path, data, lambda: dataset.open(folder / "set")[0]
        )

    def listed() -> Target:
        (folder / "a.glb").write_bytes(b"glTF")
        path = folder / "list.json"
        entry = {"file": "a.glb", "name": "A", "split": "train", "license": "CC0", "creator": "me"}
        return json.dumps({"assets": [entry]}).encode(), lambda data: _written(
            path, data, lambda: [asset.read() for asset in find_assets(path)]
        )

    def library() -> Target:
        path = folder / "a.sh3f"

        def packed(data: bytes) -> Any:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("PluginFurnitureCatalog.properties", data)
                archive.writestr("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
            return [asset.read() for asset in find_assets(path)]

        return b"id=x\nname#1=A\nmodel#1=/a.obj\nlicense#1=CC0\ncreator#1=me\n", packed

    def mesh() -> Target:
        import trimesh

        from fresnel.objects.trace import surface

        box = trimesh.creation.box()
        box.visual.face_colors = [200, 90, 30, 255]
        path = folder / "box.glb"
        return box.export(file_type="glb"), lambda data: _written(
            path, data, lambda: surface(trace.load(path))
        )

    def picture() -> Target:
        _pictures(folder)
        path = folder / "x.png"
        sound = (folder / "images/1.png").read_bytes()
        return sound, lambda data: _written(path, data, lambda: dataset.load_image(path))

    return {
        "transforms": transforms,
        "annotations": annotations,
        "images.bin": lambda: model("images.bin"),
        "cameras.txt": lambda: model("cameras.txt"),
        "manifest": lambda: of_ours("manifest.json"),
        "pose": lambda: of_ours("image_0000/view_001/pose.json"),
        "list": listed,
        "library": library,
        "mesh": mesh,
        "picture": picture,
    }


def fuzz(name: str, seconds: int, work: Path) -> None:
    """One target, in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["fresnel", "trimesh.exchange"]):
        from fresnel.data.dataset import DatasetError
    (work / "data").mkdir(parents=True)
    (work / "corpus").mkdir()
    sound, read = targets(work / "data")[name]()
    (work / "corpus" / "sound").write_bytes(sound)
    words = {repr(word)[1:-1] for word in _words(sound)}
    (work / "words").write_text("".join(f'"{word}"\n' for word in sorted(words)))
    read(sound)

    def one(data: bytes) -> None:
        try:
            read(data)
        except DatasetError as error:
            assert str(error)
        except ValueError as error:  # meshes refuse with it; `render_set` names the object
            assert name == "mesh" and str(error)

    options = [f"-max_total_time={seconds}", "-max_len=30000", "-rss_limit_mb=4096", "-timeout=20"]
    options += [f"-artifact_prefix={work}/", f"-dict={work}/words", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(work / "corpus")], one)
    atheris.Fuzz()


def _words(sound: bytes) -> set[str]:
    """Keys of a JSON text, and values that are often mishandled."""
    import re

    found = {m.decode() for m in re.findall(rb"[A-Za-z_]{3,20}", sound[:4000])}
    return found | {"NaN", "1e999", "-1", "null", "[]", "{}", "../", "true", "18446744073709551616"}


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
            subprocess.run(["rm", "-rf", str(work)], check=True)
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
