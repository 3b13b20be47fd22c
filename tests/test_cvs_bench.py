"""What the benchmark of a CVS calls met: opposite figures get the opposite word."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
from test_evaluate import row


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "cvs.py"
    spec = importlib.util.spec_from_file_location("bench_cvs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(bench: ModuleType, factor: float, psnr: float, faces: float) -> dict[str, str]:
    """What is met near the input (0-30), of eight objects whose figures differ a little."""
    one = object.__new__(bench.Bench)
    one.rows = {"one step": [], "render": []}
    for k in range(8):
        for name, gain, db in (("one step", factor, psnr), ("render", 1.0, 0.0)):
            value = gain * (1 + 0.01 * k)
            sums = dict.fromkeys(("luminance", "coverage", "edge_energy"), value)
            made = {"perceptual": value, "psnr": 20 + db + 0.01 * k * db, "ssim": 0.9 + 0.01 * db}
            shown = {"faces": float(k < 8 * faces), "faces_true": 1.0}
            one.rows[name].append(row(f"o{k}__0", "0-30", **sums, **made, **shown))
    return {r["measured"]: r["met"] for r in one.targets_met() if r["azimuth"] in ("0-30", "0-40")}


def test_opposite_figures_get_the_opposite_word(bench: ModuleType) -> None:
    good = words(bench, 0.65, 1.0, 1.0)
    assert [good[x] for x in ("perceptual / render", "ssim - render", "psnr - render")] == 3 * [
        "yes"
    ]
    assert good["luminance_ratio"] == "no" and good["faces"] == "yes"
    bad = words(bench, 1.0, -0.5, 0.5)
    assert [bad[x] for x in ("perceptual / render", "ssim - render", "psnr - render")] == 3 * ["no"]
    assert bad["luminance_ratio"] == "yes" and bad["faces"] == "no"
    assert words(bench, 1.0, -0.2, 0.5)["psnr - render"] == "yes"  # up to 30 degrees: 0.3 dB
    assert bench.verdict("", "", (0.65, 0.6, 0.72), 0, 0.7)["met"] == "mean"
    assert bench.verdict("", "", (math.nan,) * 3, 0, 0.7)["met"] == "no"
