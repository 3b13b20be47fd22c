"""fresnel: one image to 3D Gaussians to validated novel views to a view-synthesis model.

The public API; each name is imported when it is first asked for, and the module that it lives in
explains it:

    Gaussians, Cameras, orbit, look_at    the 3D type, and the cameras that look at it (scene)
    render, Views                         Gaussians seen by cameras (a room that can be called)
    open_data                             multi-view data of any format, or 3D objects (objects)
    Decoder, bootstrap                    image -> Gaussians; `bootstrap.bootstrap`: data on disk
    validate, issue_receipt               is the data fit to train on, and the proof of it (gate)
    CVS, fit                              one network call, one novel view; training
    evaluate, psnr, ssim                  figures on held-out objects (evaluation)
    write_views                           one picture -> views and Gaussians in files (views)
    preview                               what Gaussians, views ... look like in a notebook (show)
    run                                   a notebook -> a report (report)
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fresnel.scene.cameras import Cameras, look_at, orbit
    from fresnel.scene.gaussians import Gaussians

try:
    __version__ = version("fresnel")
except PackageNotFoundError:  # imported from a checkout that was not installed
    __version__ = "0.2.0"

_PLACES = {
    "Gaussians": "scene.gaussians",
    "Cameras": "scene.cameras",
    "orbit": "scene.cameras",
    "look_at": "scene.cameras",
    "Views": "render",
    "open_data": "objects.sources:open",
    "Decoder": "models.decoder",
    "validate": "gate.verdict",
    "issue_receipt": "gate.verdict",
    "CVS": "models.cvs",
    "fit": "training.loop",
    "evaluate": "evaluation.metrics",
    "preview": "show.previews",
    "psnr": "evaluation.metrics",
    "ssim": "evaluation.metrics",
    "write_views": "views",
    "run": "report.run",
}
__all__ = ["Cameras", "Gaussians", "__version__", "look_at", "orbit"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch takes seconds, and a report that is at hand needs none."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(f"fresnel.{module}"), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
