"""The same supervisor started by others: a SkyPilot task, a dstack task."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fresnel.launch.plan import Terms

_HOME = "fresnel-box"


def cluster(run: str) -> str:
    """A name that SkyPilot and dstack take."""
    return f"fresnel-{run.partition('-')[0].lower()}"


def stage(root: Path, files: Sequence[str], folder: Path) -> None:
    """Lay out below `folder`/tree exactly what is planned to be sent."""
    for name in files:
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link((root / name).resolve(), target)
        except OSError:  # another disk
            shutil.copy2(root / name, target)


def sky(terms: Terms, folder: Path, run: str, cloud: str = "", gpu: str = "H100") -> str:
    """A SkyPilot task: `folder` has tree/ and run/. The machine goes down by itself once the
    supervisor, which stays for a fetch, has been over for a few minutes."""
    resources: Mapping[str, Any] = {
        **({"infra": cloud} if cloud else {}),
        "accelerators": f"{gpu}:{terms.gpus}",
        "max_hourly_cost": terms.rate_usd,
        "autostop": {"idle_minutes": 5, "down": True},
        "disk_size": 128,
    }
    place = f"~/{_HOME}"
    mounts = {f"{place}/tree": f"{folder}/tree", f"{place}/runs/{run}": f"{folder}/run"}
    command = f"sh {place}/runs/{run}/box.sh foreground {place} {run}\n"
    return _yaml(name=cluster(run), resources=resources, file_mounts=mounts, run=command)


def dstack(terms: Terms, folder: Path, run: str, gpu: str = "H100") -> str:
    """A dstack task, to be applied by hand (`dstack apply -f FILE`); paths there are below its
    working folder."""
    return _yaml(
        type="task",
        name=cluster(run),
        files=[f"{folder}/tree:{_HOME}/tree", f"{folder}/run:{_HOME}/runs/{run}"],
        commands=[f"sh {_HOME}/runs/{run}/box.sh foreground {_HOME} {run}"],
        resources={"gpu": f"{gpu}:{terms.gpus}", "disk": "128GB.."},
        max_price=terms.rate_usd,
        max_duration=f"{_minutes(terms.limit_s)}m",
        stop_duration=f"{_minutes(terms.kill_s)}m",
    )


def _minutes(seconds: float) -> int:
    return math.ceil(seconds / 60) + 3


def _yaml(**content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=False)
