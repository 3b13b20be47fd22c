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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 well, 1 the command's own bad news (a cell's
    error, a FAIL of `validate`, a problem in a profile), 2 wrong use, 6 the disk is full, 130
    stopped by the user. One notebook's run has more: `report.run.EXIT_STATUS`."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is _launch:
        arguments.job = rest
    elif _is_run(arguments, rest):
        (arguments.remote_run,) = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
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
    reports, steps = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    reports.add_argument("--reports", type=_path, help="where reports go (default: reports/)")
    steps.add_argument(
        "--only", action="append", default=[], metavar="STEP", help="repeat for more"
    )
    steps.add_argument("--list", action="store_true", help="show the steps, run none")
    steps.add_argument("--fresh", action="store_true", help="compute though nothing has changed")

    def command(function: Any, text: str, *parents: Any, **more: Any) -> Any:
        options: dict[str, Any] = {"help": text, "description": text, "parents": parents, **more}
        made = commands.add_parser(function.__name__.strip("_"), **options)
        made.set_defaults(command=function)
        return made.add_argument

    add = command(
        _run,
        "run one notebook (NOTEBOOK -p NAME VALUE ...), or a profile of them, into reports",
        *(reports, steps),
        epilog="Exit status of one notebook: 0 it finished, whatever its verdict; 1 a cell failed; "
        "2 wrong use; 3 refused by its protocol; 4 its Python died; 5 the page is a plain one; 6 "
        "the disk is full; 124 timed out; 130 stopped. Of a profile: 0, 1 (a crash, an unexpected "
        "verdict, a page that could not be made), 2, 130.",
    )
    add("notebook", nargs="?", help="the notebook to run")
    pair = ("NAME", "VALUE")
    add(
        "-p",
        "--param",
        nargs=2,
        action="append",
        default=[],
        metavar=pair,
        help="a parameter's value (repeat)",
    )
    add("-f", "--params-file", type=_path, help="YAML of parameters; -p overrides it")
    add("--name", default="", help="the run's name (default: the notebook's)")
    add("--timeout", type=float, metavar="SECONDS", help="most a notebook may take")
    add("--cell-timeout", type=float, metavar="SECONDS", help="most a cell may take")
    add("--profile", choices=["auto", "cpu", "gpu"], help="default: auto")

    add = command(_validate, "gate a dataset: exit 0 if it passes, 1 if it fails, 2 if it is none")
    add("dataset", type=_path, help="multi-view data in any format, 3D objects")
    add("--first", type=int, default=10, help="examples to look at first")
    add("--html", metavar="FILE", type=_path, help="write the report as a page")
    add("--against", type=_path, help="a test set that must share no object")
    add("--receipt", action="store_true", help="write the verdict's receipt")
    add("--json", action="store_true", help="print the verdict as JSON")
    add("--fix", metavar="DIR", type=_path, help="write a mended copy, gate that")

    add = command(
        _study,
        "run what is not finished of a study; several processes share the work",
        *(reports, steps),
        epilog="Call it once for each GPU, with CUDA_VISIBLE_DEVICES; call it again to go on.",
    )
    add("study", type=_path, help="YAML file, e.g. notebooks/params/study.yaml")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of every step whose notebook has it, to rehearse",
    )
    add("--runs", default="runs", help="folder of its data and weights")
    add("--stop-after", type=float, metavar="SECONDS", help="for the next call")

    add = command(_views, "novel views of the object in one picture, and its Gaussians")
    add("picture", type=_path, help="any size; alpha, or a plain background")
    add("--out", type=_path, required=True, help="folder of the views")
    add("--ply", type=_path, metavar="FILE", help="write the Gaussians there")
    add("--spz", type=_path, metavar="FILE", help="... and there, compressed")
    add(
        "--elevation",
        dest="elevation_deg",
        metavar="DEG",
        type=float,
        default=15.0,
        help="of the camera above the horizon (default: 15)",
    )
    add("--steps", type=int, default=1, help="network calls a view (default: 1)")
    add(
        "--views",
        dest="count",
        metavar="N",
        type=int,
        default=8,
        help="around the object (default: 8)",
    )
    add("--seed", type=int, default=0, help="of the noise (default: 0)")
    add("--weights", type=_path, help="another CVS than the shipped one")
    add("--device", choices=["cpu", "cuda"], default="cpu")

    add = command(
        _launch,
        "run a notebook, a profile or a study on a machine elsewhere",
        usage="./run_all.sh --on WHERE --budget USD --rate USD [...] [what ./run_all.sh takes]",
        allow_abbrev=False,
    )
    add(
        "--on",
        required=True,
        metavar="WHERE",
        help="ssh://user@host[:port]/dir, slurm://..., or sky",
    )
    add("--budget", type=float, required=True, metavar="USD", help="at most")
    add("--rate", type=float, required=True, metavar="USD", help="an hour of it")
    add("--gpus", type=int, default=1, metavar="N", help="of a study (default: 1)")
    add("--at-end", default="stay", help="stay, poweroff or 'COMMAND'")
    add("--grace", type=_seconds, default=1800.0, help="for a fetch before that")
    add("--stall", type=_seconds, default=1800.0, help="without progress: failed")
    add("--python", default="", help="the Python there, used as it is")
    add("--trust-new", action="store_true", help="accept an unknown host key, once")
    add("--sbatch", default="", help="of Slurm, e.g. '--partition=gpu'")
    add("--cloud", default="", help="of SkyPilot, e.g. aws")
    add("--gpu", default="H100", help="of SkyPilot (default: H100)")
    add("--dry-run", action="store_true", help="say what would be done")

    add = command(_remote, "remote runs: status, logs, fetch, resume, stop")
    add("act", choices=["status", "logs", "fetch", "resume", "stop"])
    add("remote_run", metavar="RUN", nargs="?", help="or a part of its name")
    add("-f", "--follow", action="store_true", help="logs: as they come")
    add("--wait", action="store_true", help="fetch: once it is over")

    command(_pages, "make every report's page again, and reports/index.html", reports)

    add = command(_furniture, "render Debian's sweethome3d-furniture 1.8-1 as multi-view data")
    source = commands.choices["furniture"].add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--apt", action="store_const", const=None, dest="deb", help="fetch it with apt-get"
    )
    source.add_argument("--deb", type=_path, help="sweethome3d-furniture_1.8-1_all.deb")
    source.add_argument("--sh3f", type=_path, help="folder with its .sh3f files")
    add("--out", type=_path, required=True, help="folder of the dataset")
    add(
        "--size",
        dest="image_size",
        metavar="PX",
        type=int,
        default=128,
        help="side of a picture (default: 128)",
    )
    add("--views", type=int, default=8, help="views a record (default: 8)")
    add(
        "--inputs",
        dest="inputs_per_object",
        metavar="N",
        type=int,
        default=1,
        help="records an object (default: 1)",
    )
    add(
        "--stretch",
        type=float,
        default=1.0,
        help="of an object's records after the first (default: 1)",
    )
    add("--samples", type=int, default=4, help="rays a pixel (default: 4)")
    add("--split", choices=["train", "val", "test"], help="only this split")
    add("--seed", type=int, default=0, help="of the cameras (default: 0)")
    add("--workers", type=int, help="processes (default: one for each core)")
    add("--overwrite", action="store_true", help="replace a dataset at --out")
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

    reports = report.reports_folder(arguments.reports)
    if arguments.notebook:
        if arguments.profile or arguments.only or arguments.list:
            raise ValueError("give a notebook, or --profile with --only/--list, not both")
        places = _path(arguments.notebook), _NOTEBOOKS.parent / arguments.notebook
        notebook = next(filter(Path.is_file, places), None)
        if notebook is None:
            raise FileNotFoundError(f"no such notebook: {arguments.notebook}")
        try:
            done = report.run(
                *(notebook, _parameters(arguments, notebook), arguments.name, reports),
                fresh=arguments.fresh,
                timeout_s=arguments.timeout,
                cell_timeout_s=arguments.cell_timeout,
            )
        finally:
            problem = report.try_index(reports)
        print(report.describe(done))
        no_page = _told(filter(None, (done.problem, problem)))
        return done.exit_status or no_page * report.EXIT_STATUS["no_page"]
    if arguments.param or arguments.params_file or arguments.name or arguments.cell_timeout:
        raise ValueError("-p, -f, --name and --cell-timeout belong to one notebook: name it")
    profile = _detect() if arguments.profile in (None, "auto") else arguments.profile
    steps = runner.load(_NOTEBOOKS / "params" / f"profile_{profile}.yaml")
    if arguments.list:
        print(*(f"{step.name}\t{step.notebook.name}" for step in steps), sep="\n")
        return 0
    print(f"profile {profile}, {len(arguments.only or steps)} reports", flush=True)
    problems = runner.run(
        *(steps, reports),
        only=arguments.only,
        fresh=arguments.fresh,
        keep_finished=False,
        timeout_s=arguments.timeout,
    )
    print(f"\nindex: {reports / 'index.html'}")
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
        return _gate(arguments)
    except (ValueError, OSError):
        raise
    except Exception as error:  # 1 would say that the data failed
        traceback.print_exc()
        print(f"fresnel: validate broke down ({type(error).__name__}: {error})", file=sys.stderr)
        return 2


def _gate(arguments: argparse.Namespace) -> int:
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
    said, passed = verdict.to_dict(), verdict.passed
    lines = ["PASS" if passed else "FAIL", verdict.summary]
    lines += [f"  - {reason.message}. {reason.hint}" for reason in verdict.reasons]
    if arguments.fix and not passed:
        said["mended"] = None
        try:
            mended, after = fix(data, arguments.fix, verdict=verdict)
        except ValueError as error:  # nothing in it can be mended: the verdict stands
            lines.append(f"not mended: {error}")
            print(f"not mended: {error}", file=sys.stderr)
        else:
            said["mended"] = {"path": str(mended.path), **after.to_dict()}
            passed = after.passed
            lines.append(f"{mended.path}: {after.summary}")
    # with --fix the exit status is the mended copy's: so is the JSON's "exit_status"
    said["exit_status"] = int(not passed)
    print(json.dumps(said, indent=2, default=str) if arguments.json else "\n".join(lines))
    return int(not passed)


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


def _launch(arguments: argparse.Namespace) -> int:
    from fresnel.host.machine import project_root
    from fresnel.launch import plan as planning
    from fresnel.launch import runs
    from fresnel.report import run as report
    from fresnel.study import runner

    words = arguments.job
    job = _parser().parse_args(words if words[:1] == ["study"] else ["run", *words])
    if job.reports or job.list:
        raise ValueError("--reports and --list have no place in a remote run")
    terms = planning.Terms(
        *(arguments.budget, arguments.rate, arguments.at_end, arguments.grace, arguments.stall),
        *(arguments.gpus, arguments.python),
    )
    root = project_root()
    is_study, notebook = job.command is _study, getattr(job, "notebook", None)
    if is_study:
        there = planning.there(root, "study", os.path.abspath(job.study))
        words = [there if _path(word) == job.study else word for word in words]
        name, steps = job.study.stem, runner.load(job.study, runs=job.runs)
        steps = runner.override(steps, dict(text.partition("=")[::2] for text in job.set))
    elif notebook:
        source = root / notebook
        name = job.name or source.stem
        params = _parameters(job, source)
        params.setdefault("price_per_hour_usd", arguments.rate)
        steps = [runner.Step(name, source, params)]
        words = [notebook, "--name", name, *(["--fresh"] if job.fresh else [])]
        limits = {"--timeout": job.timeout, "--cell-timeout": job.cell_timeout}
        words += [word for key, value in limits.items() if value for word in (key, str(value))]
    else:
        name = f"profile-{job.profile or 'auto'}"
        profile = "gpu" if job.profile in (None, "auto") else job.profile
        steps = runner.load(_NOTEBOOKS / "params" / f"profile_{profile}.yaml")
    if job.only:
        steps = [step for step in steps if step.name in job.only]
    plan = planning.make(
        *(name, steps, words, terms), root=root, single=bool(notebook), study=is_study
    )
    print(*plan.describe(), sep="\n", flush=True)
    if arguments.dry_run:
        return 0
    run = runs.launch(
        *(plan, arguments.on, report.reports_folder()), trust_new=arguments.trust_new,
        options=arguments.sbatch, cloud=arguments.cloud, gpu=arguments.gpu,
    )  # fmt: skip
    print(f"{run}\n  ./run_all.sh remote status {run}\n  ./run_all.sh remote fetch --wait {run}")
    return _told(filter(None, [report.try_index(report.reports_folder())]))


def _remote(arguments: argparse.Namespace) -> int:
    from fresnel.launch import runs
    from fresnel.report import run as report

    reports, run = report.reports_folder(), arguments.remote_run or ""
    if arguments.act == "logs":
        return runs.logs(run, reports, follow=arguments.follow)
    if arguments.act == "status":
        names = [run] if run else [entry["run"] for entry in runs.entries(reports)]
        for name in names:
            print(runs.describe(runs.status(name, reports)))
    elif arguments.act == "fetch":
        print(runs.fetch(run, reports, wait=arguments.wait))
    elif arguments.act == "resume":
        print(runs.describe(runs.resume(run, reports)))
    else:
        runs.stop(run, reports)
    return _told(filter(None, [report.try_index(reports)]))


def _is_run(arguments: argparse.Namespace, rest: Sequence[str]) -> bool:
    """Whether argparse left a RUN behind an option (`fetch --wait RUN`)."""
    named = arguments.command is _remote and not arguments.remote_run
    return named and len(rest) == 1 and not rest[0].startswith("-")


def _seconds(text: str) -> float:
    """Of "90", "90s", "30m" or "2h"."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    return float(text[:-1]) * unit if unit else float(text)


def _views(arguments: argparse.Namespace) -> int:
    from fresnel import views
    from fresnel.host.machine import pick_device

    options = _options(arguments)
    options["device"] = pick_device(arguments.device)
    made = views.write_views(options.pop("picture"), options.pop("out"), **options)
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

    options = _options(arguments)
    made = furniture.make(options.pop("out"), **options)
    print(f"{len(made)} records x {made.views_per_object} views at {made.path}")
    print(made.content_hash)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name != "command"}


def _told(problems: Iterable[str]) -> int:
    lines = [f"fresnel: {problem}" for problem in problems]
    print(*lines, sep="\n", end="\n" * bool(lines), file=sys.stderr)
    return int(bool(lines))


def _detect() -> str:
    from fresnel.host.machine import accelerators

    if sys.platform == "linux" and not accelerators():
        return "cpu"  # without the seconds that torch takes to say so
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _end(*_: object) -> None:
    raise KeyboardInterrupt
