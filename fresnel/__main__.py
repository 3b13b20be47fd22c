"""The command line: `python -m fresnel run | study | validate | views | pages | ...`."""

from __future__ import annotations

import argparse
import errno
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 well, 1 the command's own bad news (a cell's
    error, a FAIL of `validate`, a problem in a profile), 2 wrong use, 6 the disk is full, 130
    stopped by the user. One notebook's run has more: `report.EXIT_STATUS`."""
    argv = sys.argv[1:] if argv is None else list(argv)
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


def _add_furniture(commands: Any) -> None:
    parser = commands.add_parser(
        "furniture",
        help="render Debian's sweethome3d-furniture 1.8-1 (554 objects) as multi-view data",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--apt", action="store_true", help="fetch the package with apt-get")
    source.add_argument("--deb", type=Path, help="sweethome3d-furniture_1.8-1_all.deb")
    source.add_argument("--sh3f", type=Path, help="folder with its .sh3f files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--size", type=int, default=128, help="pixels (default: 128)")
    parser.add_argument("--views", type=int, default=8, help="views a record (default: 8)")
    parser.add_argument("--inputs", type=int, default=1, help="records an object (default: 1)")
    parser.add_argument(
        "--stretch", type=float, default=1.0,
        help="records after an object's first show it stretched by up to this (default: 1)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=4, help="rays a pixel (default: 4)")
    parser.add_argument("--split", choices=["train", "val", "test"], help="only this split")
    parser.add_argument("--seed", type=int, default=0, help="of the cameras (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset at --out")
    parser.set_defaults(command=_furniture)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fresnel", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_furniture(commands)
    run = commands.add_parser(
        "run",
        help="run one notebook, or a profile of them, into reports",
        description="Run one notebook (NOTEBOOK -p name value ...), or all of a profile.",
        epilog="Exit status of one notebook: 0 it finished, whatever its verdict; 1 a cell failed; "
        "2 wrong use; 3 refused by its protocol; 4 its Python died; 5 the page is a plain one; 6 "
        "the disk is full; 124 timed out; 130 stopped. Of a profile: 0, 1 (a crash, an unexpected "
        "verdict, a page that could not be made), 2, 130.",
    )
    run.add_argument("notebook", nargs="?", help="the notebook to run")
    run.add_argument(
        "-p",
        "--param",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter of the notebook (repeat for more)",
    )
    run.add_argument("-f", "--params-file", help="YAML file of parameters; -p overrides it")
    run.add_argument("--name", default="", help="the run's name (default: the notebook's)")
    run.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="most that a notebook may take"
    )
    run.add_argument(
        "--cell-timeout", type=float, metavar="SECONDS", help="most that one of its cells may take"
    )
    run.add_argument(
        "--fresh", action="store_true", help="compute it even if nothing has changed, from step 1"
    )
    run.add_argument(
        "--profile", nargs="?", const="auto", choices=["auto", "cpu", "gpu"], help="default: auto"
    )
    run.add_argument("--only", action="append", default=[], metavar="STEP", help="of the profile")
    run.add_argument("--list", action="store_true", help="show the profile's steps, run none")
    run.add_argument("--reports", type=Path, help="where reports go (default: reports/)")
    run.set_defaults(command=_run)

    validate = commands.add_parser(
        "validate", help="gate a dataset: exit 0 if it passes, 1 if it fails, 2 if it is none"
    )
    validate.add_argument("dataset", help="the dataset's folder, ours or the original's layout")
    validate.add_argument("--first", type=int, default=10, help="examples to look at first")
    validate.add_argument("--html", metavar="FILE", type=Path, help="write the verdict as a page")
    validate.add_argument("--against", metavar="DIR", help="a test set that must share no object")
    validate.add_argument("--receipt", action="store_true", help="write the verdict's receipt")
    validate.add_argument("--json", action="store_true", help="print the verdict as JSON")
    validate.add_argument("--fix", metavar="DIR", help="write a mended copy there, and gate that")
    validate.set_defaults(command=_validate)

    study = commands.add_parser(
        "study",
        help="run the arms and seeds of a study; several processes share the work",
        description="Run what is not finished of a study (notebooks/params/study.yaml). Call it "
        "once for each GPU, with CUDA_VISIBLE_DEVICES; call it again to go on.",
    )
    study.add_argument("study", help="YAML file")
    study.add_argument("--only", action="append", default=[], metavar="STEP")
    study.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a parameter of every step whose notebook has it, to rehearse a study (repeat)",
    )  # fmt: skip
    study.add_argument("--runs", default="runs", help="folder of its data and weights")
    study.add_argument("--list", action="store_true", help="show the steps, run none")
    study.add_argument("--fresh", action="store_true", help="compute finished steps again")
    study.add_argument("--stop-after", type=float, metavar="SECONDS", help="for the next call")
    study.add_argument("--reports", type=Path, help="where reports go (default: reports/)")
    study.set_defaults(command=_study)

    views = commands.add_parser(
        "views",
        help="novel views of the object in one picture, and its Gaussians",
        description="One picture (any size; alpha, or a plain background) -> novel views by CVS "
        "in OUT/azimuth_000.png ..., a contact sheet, and the decoder's Gaussians.",
    )
    views.add_argument("picture", help="PNG, JPEG, WebP, BMP, TIFF or GIF")
    views.add_argument("--out", type=Path, required=True, help="folder of the views")
    views.add_argument("--ply", type=Path, metavar="FILE", help="write the Gaussians there")
    views.add_argument("--spz", type=Path, metavar="FILE", help="... and there, compressed")
    views.add_argument(
        "--elevation", type=float, default=15.0, metavar="DEG",
        help="how far above the horizon the camera stood (default: 15)",
    )  # fmt: skip
    views.add_argument("--steps", type=int, default=1, help="network calls a view (default: 1)")
    views.add_argument("--views", type=int, default=8, help="around the object (default: 8)")
    views.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    views.add_argument("--weights", type=Path, help="another CVS checkpoint than the shipped one")
    views.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    views.set_defaults(command=_views)

    index = commands.add_parser("index", help="rebuild reports/index.html")
    index.add_argument("--reports", type=Path, help="default: reports/")
    index.add_argument("--rebuild", action="store_true", help="make every report's page again too")
    index.set_defaults(command=_index)

    again = commands.add_parser(
        "pages", help="make every report's page again from its executed notebook, and the index"
    )
    again.add_argument("--reports", type=Path, help="default: reports/")
    again.set_defaults(command=_index, rebuild=True)

    html = commands.add_parser("html", help="make the report of an executed notebook again")
    html.add_argument("executed", nargs="+", help="executed.ipynb, results.json beside it")
    html.set_defaults(command=_html)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # jsonschema, which nbformat imports, builds a grammar of web addresses for a second where it
    # finds this; no notebook's schema has any, and an unchanged report is to be there by then
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    from fresnel.host.machine import project_root
    from fresnel.report import run as report
    from fresnel.study import runner

    if arguments.notebook:
        if arguments.profile or arguments.only or arguments.list:
            raise ValueError("give a notebook, or --profile with --only/--list, not both")
        params = _parameters(arguments)
        try:
            done = report.run(
                *(arguments.notebook, params, arguments.name, arguments.reports),
                fresh=arguments.fresh,
                timeout_s=arguments.timeout,
                cell_timeout_s=arguments.cell_timeout,
            )
        except KeyboardInterrupt:
            report.try_index(report.reports_folder(arguments.reports))
            raise
        problem = report.try_index(report.reports_folder(arguments.reports))
        print(report.describe(done))
        for text in filter(None, (done.problem, problem)):
            print(f"fresnel: {text}", file=sys.stderr)
        return done.exit_status or (report.EXIT_STATUS["no_page"] if problem else 0)
    if arguments.param or arguments.params_file or arguments.name or arguments.cell_timeout:
        raise ValueError("-p, -f, --name and --cell-timeout belong to one notebook: name it")
    profile = arguments.profile or "auto"
    if profile == "auto":
        profile = _detect()
    steps = runner.load(project_root() / "notebooks" / "params" / f"profile_{profile}.yaml")
    if arguments.list:
        for step in steps:
            print(f"{step.name}\t{step.notebook.name}")
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
    for problem in problems:
        print(f"fresnel: {problem}", file=sys.stderr)
    return int(bool(problems))


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    from fresnel.report.params import ParameterError, find_parameter, read_parameters
    from fresnel.study.runner import read_yaml

    known = read_parameters(arguments.notebook)
    params: dict[str, Any] = {}
    if arguments.params_file:
        content = read_yaml(Path(arguments.params_file)) or {}
        if not isinstance(content, dict):
            raise ParameterError(f"{arguments.params_file}: must hold name: value lines")
        params.update(content)
    for name, text in arguments.param:
        params[name] = find_parameter(known, name).parse(text)
    return params


def _validate(arguments: argparse.Namespace) -> int:
    try:
        return _gated(arguments)
    except (ValueError, OSError):
        raise
    except Exception as error:  # 1 would say that the data failed
        print(f"fresnel: validate broke down ({type(error).__name__}: {error})", file=sys.stderr)
        return 2


def _gated(arguments: argparse.Namespace) -> int:
    from fresnel.gate import verdict as gate
    from fresnel.objects import sources

    data = sources.open(arguments.dataset)
    other = sources.open(arguments.against) if arguments.against else None
    verdict = gate.validate(data, first=arguments.first, against=other)
    if arguments.receipt:
        gate.issue_receipt(data, verdict)
    if arguments.html:
        from fresnel.report import gate_page

        print(gate_page.write(arguments.html, data, verdict), file=sys.stderr)
    if arguments.json:
        print(json.dumps(verdict.to_dict(), indent=2, default=str))
    else:
        print("PASS" if verdict.passed else "FAIL")
        print(verdict.summary)
        for reason in verdict.reasons:
            print(f"  - {reason.message}. {reason.hint}")
    if arguments.fix and not verdict.passed:
        try:
            mended, verdict = gate.fix(data, arguments.fix, verdict=verdict)
        except ValueError as error:  # the verdict stands
            print(f"not mended: {error}", file=sys.stderr)
            return 1
        print(f"{mended.path}: {verdict.summary}", file=sys.stderr if arguments.json else None)
    return int(not verdict.passed)


def _study(arguments: argparse.Namespace) -> int:
    from fresnel.report import run as report
    from fresnel.study import runner

    steps = runner.load(arguments.study, runs=arguments.runs)
    values = dict(text.partition("=")[::2] for text in arguments.set)
    steps = runner.override(steps, values)
    if arguments.list:
        reports = report.reports_folder(arguments.reports)
        for step in steps:
            state = "finished" if runner.finished(step, reports) else "to do"
            print(f"{step.name}\t{step.notebook.name}\t{state}")
        return 0
    problems = runner.run(
        steps,
        arguments.reports,
        only=arguments.only,
        fresh=arguments.fresh,
        stop_after_s=arguments.stop_after,
    )
    for problem in problems:
        print(f"fresnel: {problem}", file=sys.stderr)
    return int(bool(problems))


def _views(arguments: argparse.Namespace) -> int:
    from fresnel import views as sampling

    made = sampling.write_views(
        arguments.picture,
        arguments.out,
        weights=arguments.weights,
        elevation_deg=arguments.elevation,
        steps=arguments.steps,
        count=arguments.views,
        seed=arguments.seed,
        ply=arguments.ply,
        spz=arguments.spz,
        device=arguments.device,
    )
    for sentence in made["assumed"]:
        print(f"assumed: {sentence}")
    for file in made["gaussians"]["files"]:
        print(f"{file}: {made['gaussians']['count']} Gaussians")
    print(f"{len(made['files'])} views in {made['duration_s']:.1f} s")
    print(arguments.out / "contact_sheet.png")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from fresnel.report import run as report

    problems = report.rebuild(arguments.reports) if arguments.rebuild else []
    print(report.index(arguments.reports))
    for problem in problems:
        print(f"fresnel: {problem}", file=sys.stderr)
    return report.EXIT_STATUS["no_page"] if problems else 0


def _html(arguments: argparse.Namespace) -> int:
    from fresnel.report import page as pages

    for executed in arguments.executed:
        print(pages.to_html(executed, Path(executed).parent / "report.html"))
    return 0


def _detect() -> str:
    from fresnel.host.machine import accelerators

    if sys.platform == "linux" and not accelerators():
        return "cpu"  # without the seconds that torch takes to say so
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _end(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
