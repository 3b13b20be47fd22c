"""The command line, one parser: `./run_all.sh COMMAND ...`, or `python -m fresnel COMMAND ...`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 well, 1 the command's own bad news (a cell's
    error, a FAIL of `validate`, a problem in a profile), 2 wrong use, 6 the disk is full, 130
    stopped by the user. One notebook's run has more: `report.run.EXIT_STATUS`."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _end)  # so that a report is still written
    try:
        return int(arguments.command(arguments))
    except (ValueError, OSError) as error:  # bad input, said in one line
        print(f"fresnel: {error}", file=sys.stderr)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        return 6 if full else 2
    except KeyboardInterrupt:
        print("fresnel: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fresnel", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str, **more: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, **more)
        made.set_defaults(command=function)
        return made

    def reports(made: argparse.ArgumentParser) -> None:
        made.add_argument("--reports", type=_path, help="where reports go (default: reports/)")

    run = command(
        "run",
        _run,
        "run one notebook (NOTEBOOK -p NAME VALUE ...), or a profile of them, into reports",
        epilog="Exit status of one notebook: 0 it finished, whatever its verdict; 1 a cell failed; "
        "2 wrong use; 3 refused by its protocol; 4 its Python died; 5 the page is a plain one; 6 "
        "the disk is full; 124 timed out; 130 stopped. Of a profile: 0, 1 (a crash, an unexpected "
        "verdict, a page that could not be made), 2, 130.",
    )
    run.add_argument("notebook", nargs="?", help="the notebook to run")
    run.add_argument("-p", "--param", nargs=2, action="append", default=[],
                     metavar=("NAME", "VALUE"), help="a parameter's value (repeat)")  # fmt: skip
    run.add_argument("-f", "--params-file", type=_path, help="YAML of parameters; -p overrides it")
    run.add_argument("--name", default="", help="the run's name (default: the notebook's)")
    run.add_argument("--timeout", type=float, metavar="SECONDS", help="most a notebook may take")
    run.add_argument("--cell-timeout", type=float, metavar="SECONDS", help="most a cell may take")
    run.add_argument("--fresh", action="store_true", help="compute it though nothing has changed")
    run.add_argument("--profile", choices=["auto", "cpu", "gpu"], help="default: auto")
    run.add_argument("--only", action="append", default=[], metavar="STEP", help="of the profile")
    run.add_argument("--list", action="store_true", help="show the profile's steps, run none")
    reports(run)

    validate = command(
        "validate", _validate, "gate a dataset: exit 0 if it passes, 1 if it fails, 2 if it is none"
    )
    validate.add_argument("dataset", type=_path, help="multi-view data in any format, 3D objects")
    validate.add_argument("--first", type=int, default=10, help="examples to look at first")
    validate.add_argument("--html", metavar="FILE", type=_path, help="write the report as a page")
    validate.add_argument("--against", type=_path, help="a test set that must share no object")
    validate.add_argument("--receipt", action="store_true", help="write the verdict's receipt")
    validate.add_argument("--json", action="store_true", help="print the verdict as JSON")
    validate.add_argument("--fix", metavar="DIR", type=_path, help="write a mended copy, gate that")

    study = command(
        "study",
        _study,
        "run what is not finished of a study; several processes share the work",
        epilog="Call it once for each GPU, with CUDA_VISIBLE_DEVICES; call it again to go on.",
    )
    study.add_argument("study", type=_path, help="YAML file, e.g. notebooks/params/study.yaml")
    study.add_argument("--only", action="append", default=[], metavar="STEP")
    study.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                       help="of every step whose notebook has it, to rehearse")  # fmt: skip
    study.add_argument("--runs", default="runs", help="folder of its data and weights")
    study.add_argument("--list", action="store_true", help="show the steps, run none")
    study.add_argument("--fresh", action="store_true", help="compute finished steps again")
    study.add_argument("--stop-after", type=float, metavar="SECONDS", help="for the next call")
    reports(study)

    views = command("views", _views, "novel views of the object in one picture, and its Gaussians")
    views.add_argument("picture", type=_path, help="any size; alpha, or a plain background")
    views.add_argument("--out", type=_path, required=True, help="folder of the views")
    views.add_argument("--ply", type=_path, metavar="FILE", help="write the Gaussians there")
    views.add_argument("--spz", type=_path, metavar="FILE", help="... and there, compressed")
    views.add_argument("--elevation", type=float, default=15.0, metavar="DEG",
                       help="of the camera above the horizon (default: 15)")  # fmt: skip
    views.add_argument("--steps", type=int, default=1, help="network calls a view (default: 1)")
    views.add_argument("--views", type=int, default=8, help="around the object (default: 8)")
    views.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    views.add_argument("--weights", type=_path, help="another CVS than the shipped one")
    views.add_argument("--device", choices=["cpu", "cuda"], default="cpu")

    reports(command("pages", _pages, "make every report's page again, and reports/index.html"))

    furniture = command(
        "furniture", _furniture, "render Debian's sweethome3d-furniture 1.8-1 as multi-view data"
    )
    source = furniture.add_mutually_exclusive_group(required=True)
    source.add_argument("--apt", action="store_true", help="fetch the package with apt-get")
    source.add_argument("--deb", type=_path, help="sweethome3d-furniture_1.8-1_all.deb")
    source.add_argument("--sh3f", type=_path, help="folder with its .sh3f files")
    furniture.add_argument("--out", type=_path, required=True, help="folder of the dataset")
    furniture.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    furniture.add_argument("--views", type=int, default=8, help="views a record (default: 8)")
    furniture.add_argument("--inputs", type=int, default=1, help="records an object (default: 1)")
    furniture.add_argument("--stretch", type=float, default=1.0,
                           help="of an object's records after the first (default: 1)")  # fmt: skip
    furniture.add_argument("--samples", type=int, default=4, help="rays a pixel (default: 4)")
    furniture.add_argument("--split", choices=["train", "val", "test"], help="only this split")
    furniture.add_argument("--seed", type=int, default=0, help="of the cameras (default: 0)")
    furniture.add_argument("--workers", type=int, help="processes (default: one for each core)")
    furniture.add_argument("--overwrite", action="store_true", help="replace a dataset at --out")
    return parser


def _path(text: str) -> Path:
    """A path on the command line: run_all.sh works in the project, and says where its caller is."""
    return Path(os.environ.get("FRESNEL_CALLER", ".")) / text


def _run(arguments: argparse.Namespace) -> int:
    # jsonschema, which nbformat imports, builds a grammar of web addresses for a second where it
    # finds this; no notebook's schema has any, and an unchanged report is to be there by then
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    from fresnel.report import run as report
    from fresnel.study import runner

    if arguments.notebook:
        if arguments.profile or arguments.only or arguments.list:
            raise ValueError("give a notebook, or --profile with --only/--list, not both")
        notebook = _path(arguments.notebook)
        if not notebook.is_file():  # notebooks/01_validate_data.ipynb, from wherever
            notebook = _NOTEBOOKS.parent / arguments.notebook
        if not notebook.is_file():
            raise FileNotFoundError(f"no such notebook: {arguments.notebook}")
        try:
            done = report.run(
                *(notebook, _parameters(arguments, notebook), arguments.name, arguments.reports),
                fresh=arguments.fresh,
                timeout_s=arguments.timeout,
                cell_timeout_s=arguments.cell_timeout,
            )
        finally:
            problem = report.try_index(report.reports_folder(arguments.reports))
        print(report.describe(done))
        for text in filter(None, (done.problem, problem)):
            print(f"fresnel: {text}", file=sys.stderr)
        return done.exit_status or (report.EXIT_STATUS["no_page"] if problem else 0)
    if arguments.param or arguments.params_file or arguments.name or arguments.cell_timeout:
        raise ValueError("-p, -f, --name and --cell-timeout belong to one notebook: name it")
    profile = arguments.profile or "auto"
    profile = _detect() if profile == "auto" else profile
    steps = runner.load(_NOTEBOOKS / "params" / f"profile_{profile}.yaml")
    if arguments.list:
        print(*(f"{step.name}\t{step.notebook.name}" for step in steps), sep="\n")
        return 0
    print(f"profile {profile}, {len(arguments.only or steps)} reports", flush=True)
    problems = runner.run(
        *(steps, arguments.reports),
        only=arguments.only,
        fresh=arguments.fresh,
        keep_finished=False,
        timeout_s=arguments.timeout,
    )
    print(f"\nindex: {report.reports_folder(arguments.reports) / 'index.html'}")
    return _told(problems)


def _parameters(arguments: argparse.Namespace, notebook: Path) -> dict[str, Any]:
    from fresnel.report.params import ParameterError, find_parameter, read_parameters
    from fresnel.study.runner import read_yaml

    known = read_parameters(notebook)
    params: dict[str, Any] = {}
    if arguments.params_file:
        content = read_yaml(arguments.params_file) or {}
        if not isinstance(content, dict):
            raise ParameterError(f"{arguments.params_file}: must hold name: value lines")
        params.update(content)
    for name, text in arguments.param:
        value = find_parameter(known, name).parse(text)
        if isinstance(value, str) and value and not Path(value).exists() and _path(value).exists():
            value = str(_path(value))  # the caller's, who is elsewhere
        params[name] = value
    return params


def _validate(arguments: argparse.Namespace) -> int:
    try:
        return _gated(arguments)
    except (ValueError, OSError):
        raise
    except Exception as error:  # 1 would say that the data failed
        traceback.print_exc()
        print(f"fresnel: validate broke down ({type(error).__name__}: {error})", file=sys.stderr)
        return 2


def _gated(arguments: argparse.Namespace) -> int:
    from fresnel import gate
    from fresnel.gate.fix import fix
    from fresnel.objects import sources

    data = sources.open(arguments.dataset)
    other = sources.open(arguments.against) if arguments.against else None
    verdict = gate.validate(data, first=arguments.first, against=other)
    if arguments.receipt:
        gate.issue_receipt(data, verdict)
    if arguments.html:
        _page(arguments.dataset, arguments.html)
    said = verdict.to_dict()
    status = int(not verdict.passed)
    lines = [("PASS" if verdict.passed else "FAIL"), verdict.summary]
    lines += [f"  - {reason.message}. {reason.hint}" for reason in verdict.reasons]
    if arguments.fix and not verdict.passed:
        said["mended"] = None
        try:
            mended, after = fix(data, arguments.fix, verdict=verdict)
        except ValueError as error:  # nothing in it can be mended: the verdict stands
            lines.append(f"not mended: {error}")
            print(f"not mended: {error}", file=sys.stderr)
        else:
            said["mended"] = {"path": str(mended.path), **after.to_dict()}
            status = int(not after.passed)
            lines.append(f"{mended.path}: {after.summary}")
    # with --fix the exit status is the mended copy's: so is the JSON's "exit_status"
    said["exit_status"] = status
    print(json.dumps(said, indent=2, default=str) if arguments.json else "\n".join(lines))
    return status


def _page(dataset: Path, target: Path) -> None:
    """The report of notebook 01 on a set as it is, at `target`."""
    from fresnel.report import run as report

    with tempfile.TemporaryDirectory() as folder:
        notebook = _NOTEBOOKS / "01_validate_data.ipynb"
        params = {"preset": "none", "source": str(dataset.resolve())}
        done = report.run(notebook, params, "validate", folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(done.report, target)
        if done.crashed or done.problem:
            raise ValueError(done.record.error or done.problem)
    print(target, file=sys.stderr)


def _study(arguments: argparse.Namespace) -> int:
    from fresnel.report import run as report
    from fresnel.study import runner

    steps = runner.load(arguments.study, runs=arguments.runs)
    steps = runner.override(steps, dict(text.partition("=")[::2] for text in arguments.set))
    if arguments.list:
        reports = report.reports_folder(arguments.reports)
        for step in steps:
            state = "finished" if runner.finished(step, reports) else "to do"
            print(f"{step.name}\t{step.notebook.name}\t{state}")
        return 0
    return _told(
        runner.run(
            *(steps, arguments.reports),
            only=arguments.only,
            fresh=arguments.fresh,
            stop_after_s=arguments.stop_after,
        )
    )


def _views(arguments: argparse.Namespace) -> int:
    from fresnel import views
    from fresnel.host.machine import pick_device

    names = ("weights", "steps", "seed", "ply", "spz")
    made = views.write_views(
        *(arguments.picture, arguments.out),
        elevation_deg=arguments.elevation,
        count=arguments.views,
        device=pick_device(arguments.device),
        **{name: getattr(arguments, name) for name in names},
    )
    for sentence in made["assumed"]:
        print(f"assumed: {sentence}")
    for file in made["gaussians"]["files"]:
        print(f"{file}: {made['gaussians']['count']} Gaussians")
    print(f"{len(made['files'])} views in {made['duration_s']:.1f} s")
    print(arguments.out / "contact_sheet.png")
    return 0


def _pages(arguments: argparse.Namespace) -> int:
    from fresnel.report import run as report

    problems = report.rebuild(arguments.reports)
    print(report.reports_folder(arguments.reports) / "index.html")
    return report.EXIT_STATUS["no_page"] if _told(problems) else 0


def _furniture(arguments: argparse.Namespace) -> int:
    from fresnel.objects import furniture

    names = ("deb", "sh3f", "split", "views", "samples", "stretch", "seed", "workers", "overwrite")
    made = furniture.make(
        arguments.out,
        image_size=arguments.size,
        inputs_per_object=arguments.inputs,
        **{name: getattr(arguments, name) for name in names},
    )
    print(f"{len(made)} records x {made.views_per_object} views at {made.path}")
    print(made.content_hash)
    return 0


def _told(problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"fresnel: {problem}", file=sys.stderr)
    return int(bool(problems))


def _detect() -> str:
    from fresnel.host.machine import accelerators

    if sys.platform == "linux" and not accelerators():
        return "cpu"  # without the seconds that torch takes to say so
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _end(*_: object) -> None:
    raise KeyboardInterrupt
