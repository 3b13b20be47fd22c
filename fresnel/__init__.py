"""fresnel: one image to 3D Gaussians to validated novel views to a view-synthesis model.

The public API, each name in the module that explains it:

    Gaussians, Cameras            the 3D type and the cameras that look at it
    render, Views                 fresnel.render: float64 reference, CPU, gsplat
    Decoder, bootstrap            image -> Gaussians -> multi-view dataset
    dataset, gate                 on-disk data, and the verdict on whether to train on it
    CVS, fit, evaluate            one network call, one novel view; training; held-out figures
"""

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fresnel.scene.cameras import Cameras, look_at, orbit
    from fresnel.scene.gaussians import Gaussians

try:
    __version__ = version("fresnel")
except PackageNotFoundError:  # imported from a checkout that was not installed
    __version__ = "0.1.0"

__all__ = ["Cameras", "Gaussians", "__version__", "look_at", "orbit"]

if os.environ.get("FRESNEL_TRACE"):  # the runner asks the kernel, and the kernel its workers
    from fresnel.report.touched import trace_files

    trace_files(os.environ["FRESNEL_TRACE"])


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, and a report that is at hand needs none."""
    modules = {"Cameras": "scene.cameras", "look_at": "scene.cameras", "orbit": "scene.cameras"}
    modules |= {"Gaussians": "scene.gaussians"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fresnel.{modules[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
