"""The command line, one parser: `./run_all.sh COMMAND ...`, or `python -m fresnel COMMAND ...`."""

import argparse
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fresnel.arguments import command as _command
from fresnel.arguments import parser as _parser
from fresnel.arguments import path as _path
from fresnel.arguments import seconds as _seconds
from fresnel.host.stopping import stop

_NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 well, 1 the command's own bad news (a cell's
    error, a FAIL of `validate`, a problem in a profile), 2 wrong use, 6 the disk is full, 130
    stopped by the user. One notebook's run has more: `report.run.EXIT_STATUS`."""
    parser = _parser(__doc__)
    arguments, rest = parser.parse_known_args(argv)
    command = arguments.__dict__.pop("command")
    if command is _launch:
        arguments.job = rest
    elif command is _remote and not arguments.remote_run and rest and rest[0][:1] != "-":
        arguments.remote_run = rest.pop(0)  # argparse leaves one behind an option: fetch --wait RUN
    if rest and command is not _launch:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    signal.signal(signal.SIGTERM, stop)  # so that a report is still written
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    try:
        return int(command(arguments))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # bad input, said in one line
        print(f"fresnel: {error}", file=sys.stderr)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        return 6 if full else 2
    except KeyboardInterrupt:
        print("fresnel: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if command is not _validate:  # whose 1 would say that the data failed
            raise
        traceback.print_exc()
        print(f"fresnel: validate broke down ({type(error).__name__}: {error})", file=sys.stderr)
        return 2


_REPORTS = ("--reports", _path, "where reports go (default: reports/)")
_STEPS: Any = (
    _REPORTS,
    ("--only", [], "repeat for more", "STEP"),
    ("--list", True, "show the steps, run none"),
    ("--fresh", True, "compute though nothing has changed"),
)


@_command(
    "run one notebook (NOTEBOOK -p NAME VALUE ...), or a profile of them, into reports",
    *_STEPS,
    ("notebook?", str, "the notebook to run"),
    ("-p --param", [], "a parameter's value (repeat)", ("NAME", "VALUE")),
    ("-f --params-file", _path, "YAML of parameters; -p overrides it"),
    ("--name", "", "the run's name (default: the notebook's)"),
    ("--timeout", float, "most a notebook may take", "SECONDS"),
    ("--cell-timeout", float, "most a cell may take", "SECONDS"),
    ("--spec-only", _path, "of 03: only write what it would train, for torchrun", "FILE"),
    ("--profile", (None, "auto", "cpu", "gpu"), "default: auto"),
    ("--domain", (None, "faces", "objects"), "what a profile is about"),
    epilog="Exit status of one notebook: 0 it finished, whatever its verdict; 1 a cell failed; "
    "2 wrong use; 3 refused by its protocol; 4 its Python died; 5 the page is a plain one; 6 "
    "the disk is full; 124 timed out; 130 stopped. Of a profile: 0, 1 (a crash, an unexpected "
    "verdict, a page that could not be made), 2, 130.",
)
def _run(arguments: argparse.Namespace) -> int:
    # jsonschema, which nbformat imports, builds a grammar of web addresses for a second where it
    # finds this; no notebook's schema has any, and an unchanged report is to be there by then
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    from fresnel.report import run as report
    from fresnel.study import runner

    reports = report.reports_folder(arguments.reports)
    if arguments.notebook:
        if arguments.profile or arguments.only or arguments.list or arguments.domain:
            raise ValueError("give a notebook, or --profile with --domain/--only/--list, not both")
        places = _path(arguments.notebook), _NOTEBOOKS.parent / arguments.notebook
        notebook = next(filter(Path.is_file, places), None)
        if notebook is None:
            raise FileNotFoundError(f"no such notebook: {arguments.notebook}")
        if arguments.spec_only:
            from fresnel.study.trainings import write

            return write(notebook, _parameters(arguments, notebook), arguments.spec_only)
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
        no_page = _told(done.problem, problem)
        return done.exit_status or no_page * report.EXIT_STATUS["no_page"]
    if arguments.param or arguments.params_file or arguments.name or arguments.cell_timeout:
        raise ValueError("-p, -f, --name and --cell-timeout belong to one notebook: name it")
    profile, steps = _steps(arguments, _detect)
    if arguments.list:
        print(*(f"{step.name}\t{step.notebook.name}" for step in steps), sep="\n")
        return 0
    print(f"profile {profile}, {len(arguments.only or steps)} reports", flush=True)
    limits = {"timeout_s": arguments.timeout, "fresh": arguments.fresh}
    problems = runner.run(steps, reports, only=arguments.only, keep_finished=False, **limits)
    print(f"\nindex: {reports / 'index.html'}")
    return _told(*problems)


def _steps(arguments: argparse.Namespace, detect: Callable[[], str]) -> tuple[str, list[Any]]:
    """Name and steps of a study, or of a profile."""
    from fresnel.study import runner

    if "study" in arguments:
        steps = runner.load(arguments.study, runs=arguments.runs, domain=arguments.domain)
        values = dict(text.partition("=")[::2] for text in arguments.set)
        return arguments.study.stem, runner.override(steps, values)
    profile = detect() if arguments.profile in (None, "auto") else arguments.profile
    place = _NOTEBOOKS / "params" / f"profile_{profile}.yaml"
    return profile, runner.load(place, domain=arguments.domain or runner.MAIN_DOMAIN)


def _parameters(arguments: argparse.Namespace, notebook: Path) -> dict[str, Any]:
    from fresnel.report.params import find_parameter, read_parameters
    from fresnel.study.runner import read_yaml

    known = read_parameters(notebook)
    params = (read_yaml(arguments.params_file) or {}) if arguments.params_file else {}
    if not isinstance(params, dict):
        raise ValueError(f"{arguments.params_file}: must hold name: value lines")
    for name, text in arguments.param:
        value = find_parameter(known, name).parse(text)
        if isinstance(value, str) and value and not Path(value).exists() and _path(value).exists():
            value = str(_path(value))  # the caller's, who is elsewhere
        params[name] = value
    return params


@_command(
    "gate a dataset: exit 0 if it passes, 1 if it fails, 2 if it is none",
    ("dataset", _path, "multi-view data in any format, 3D objects"),
    ("--first", 10, "examples to look at first"),
    ("--html", _path, "write the report as a page", "FILE"),
    ("--against", _path, "a test set that must share no object"),
    ("--receipt", True, "write the verdict's receipt"),
    ("--json", True, "print the verdict as JSON"),
    ("--fix", _path, "write a mended copy, gate that", "DIR"),
)
def _validate(arguments: argparse.Namespace) -> int:
    from fresnel import gate
    from fresnel.gate.fix import fix
    from fresnel.objects import sources

    data = sources.open(arguments.dataset)
    other = sources.open(arguments.against) if arguments.against else None
    verdict = gate.validate(data, first=arguments.first, against=other)
    if arguments.receipt:
        gate.issue_receipt(data, verdict)
        print(f"receipt: {gate.receipt_path(data)}", file=sys.stderr)
    if arguments.html:
        from fresnel.report.run import page_of

        page_of(arguments.dataset, arguments.html)
        print(arguments.html, file=sys.stderr)
    said, passed = verdict.to_dict(), verdict.passed
    lines = ["PASS" if passed else "FAIL", verdict.summary]
    lines += [f"  - {reason.message}. {reason.hint}" for reason in verdict.reasons]
    if arguments.fix and not passed:
        said["mended"] = None
        try:
            mended, after = fix(data, arguments.fix, verdict=verdict)
        except ValueError as error:  # nothing in it can be mended: the verdict stands
            lines.append(f"not mended: {error}")
            print(lines[-1], file=sys.stderr)
        else:
            said["mended"] = {"path": str(mended.path), **after.to_dict()}
            passed = after.passed
            lines.append(f"{mended.path}: {after.summary}")
    # with --fix the exit status is the mended copy's: so is the JSON's "exit_status"
    said["exit_status"] = int(not passed)
    print(json.dumps(said, indent=2, default=str) if arguments.json else "\n".join(lines))
    return int(not passed)


@_command(
    "run what is not finished of a study; several processes share the work",
    *_STEPS,
    ("study", _path, "YAML file, e.g. notebooks/params/study.yaml"),
    ("--domain", ("objects", "objects", "faces"), "what it is about (default: objects)"),
    ("--set", [], "of every step whose notebook has it, to rehearse", "NAME=VALUE"),
    ("--runs", "runs", "folder of its data and weights"),
    ("--stop-after", float, "for the next call", "SECONDS"),
    epilog="Call it once for each GPU, with CUDA_VISIBLE_DEVICES; call it again to go on.",
)
def _study(arguments: argparse.Namespace) -> int:
    from fresnel.report import run as report
    from fresnel.study import runner

    (_, steps), reports = _steps(arguments, str), report.reports_folder(arguments.reports)
    for step in steps if arguments.list else ():
        state = "finished" if runner.finished(step, reports) else "to do"
        print(f"{step.name}\t{step.notebook.name}\t{state}")
    if arguments.list:
        return 0
    limits = {"fresh": arguments.fresh, "stop_after_s": arguments.stop_after}
    return _told(*runner.run(steps, reports, only=arguments.only, **limits))


@_command(
    "novel views of the object in one picture, and its Gaussians to turn",
    ("picture", _path, "any size; alpha, a plain background, or extra cutout"),
    ("--out", _path, "folder of the views (default: the picture's name and -views, here)"),
    ("--ply", _path, "write the Gaussians there instead", "FILE"),
    ("--spz", _path, "... and there, compressed", "FILE"),
    ("--domain", ("auto", "auto", "faces", "objects"), "what it shows (auto: a face is a head)"),
    ("--elevation=elevation_deg", float, "above the horizon (default: 15, of faces 5)", "DEG"),
    ("--steps", 1, "network calls a view (default: 1)"),
    ("--views=count", 8, "around the object (default: 8)", "N"),
    ("--size", 512, "pixels of the Gaussians' views (default: 512)"),
    ("--seed", 0, "of the noise (default: 0)"),
    ("--weights", _path, "another CVS than the shipped one"),
    ("--device", ("cpu", "cpu", "cuda"), None),
)
def _views(arguments: argparse.Namespace) -> int:
    from fresnel import views
    from fresnel.host.machine import pick_device

    options = {**vars(arguments), "device": pick_device(arguments.device)}
    picture, out = options.pop("picture"), options.pop("out")
    out = _path(f"{picture.stem}-views") if out is None else out
    print(*views.sentences(views.write_views(picture, out, **options)), sep="\n")
    return 0


@_command(
    "run a notebook, a profile or a study on a machine elsewhere",
    ("--on!", str, "ssh://user@host[:port]/dir, slurm://..., or sky", "WHERE"),
    ("--budget!", float, "at most", "USD"),
    ("--rate!", float, "an hour of it", "USD"),
    ("--gpus", 1, "that a run shares, or a study's processes have each (default: 1)", "N"),
    ("--at-end", "stay", "stay, poweroff or 'COMMAND'"),
    ("--grace", "1800", "for a fetch before that"),
    ("--stall", "1800", "without progress: failed"),
    ("--python", "", "the Python there, used as it is"),
    ("--trust-new", True, "accept an unknown host key, once"),
    ("--sbatch", "", "of Slurm, e.g. '--partition=gpu'"),
    ("--cloud", "", "of SkyPilot, e.g. aws"),
    ("--gpu", "H100", "of SkyPilot (default: H100)"),
    ("--dry-run", True, "say what would be done"),
    usage="./run_all.sh --on WHERE --budget USD --rate USD [...] [what ./run_all.sh takes]",
    allow_abbrev=False,
)
def _launch(arguments: argparse.Namespace) -> int:
    from fresnel.host.machine import project_root
    from fresnel.launch import plan as planning
    from fresnel.launch import runs
    from fresnel.report import run as report
    from fresnel.study import runner

    words, root = arguments.job, project_root()
    is_study = words[:1] == ["study"]
    job = _parser().parse_args(words if is_study else ["run", *words])
    notebook = None if is_study else job.notebook
    if job.reports or job.list:
        raise ValueError("--reports and --list have no place in a remote run")
    terms = planning.Terms(
        *(arguments.budget, arguments.rate, arguments.at_end, _seconds(arguments.grace)),
        *(_seconds(arguments.stall), arguments.gpus, arguments.python),
        *(arguments.sbatch, arguments.cloud, arguments.gpu),
    )
    if is_study:
        there = planning.there(root, "study", os.path.abspath(job.study))
        words = [there if _path(word) == job.study else word for word in words]
    if not notebook:
        name, steps = _steps(job, lambda: "gpu")
        name = name if is_study else f"profile-{job.profile or 'auto'}"
    else:
        source = root / notebook
        name = job.name or source.stem
        params = {"price_per_hour_usd": arguments.rate, **_parameters(job, source)}
        steps = [runner.Step(name, source, params)]
        words = [notebook, "--name", name, *(["--fresh"] if job.fresh else [])]
        limits = {"--timeout": job.timeout, "--cell-timeout": job.cell_timeout}
        words += [word for key, value in limits.items() if value for word in (key, str(value))]
    plan = planning.make(name, runner.chosen(steps, job.only), words, terms, root=root)
    print(*plan.describe(), sep="\n", flush=True)
    if arguments.dry_run:
        return 0
    reports = report.reports_folder()
    run = runs.launch(plan, arguments.on, reports, trust_new=arguments.trust_new)
    print(f"{run}\n  ./run_all.sh remote status {run}\n  ./run_all.sh remote fetch --wait {run}")
    return _told(report.try_index(reports))


@_command(
    "remote runs: status, logs, fetch, resume, stop",
    ("act", (None, "status", "logs", "fetch", "resume", "stop"), None),
    ("remote_run?", str, "or a part of its name", "RUN"),
    ("-f --follow", True, "logs: as they come"),
    ("--wait", True, "fetch: once it is over"),
)
def _remote(arguments: argparse.Namespace) -> int:
    from fresnel.launch import runs
    from fresnel.report import run as report

    reports, run = report.reports_folder(), arguments.remote_run or ""
    if arguments.act == "logs":
        return runs.logs(run, reports, follow=arguments.follow)
    if arguments.act == "status":
        for name in [run] if run else [entry["run"] for entry in runs.entries(reports)]:
            print(runs.describe(runs.status(name, reports)))
    elif arguments.act == "fetch":
        print(runs.fetch(run, reports, wait=arguments.wait))
    elif arguments.act == "resume":
        print(runs.describe(runs.resume(run, reports)))
    else:
        runs.stop(run, reports)
    return _told(report.try_index(reports))


@_command("make every report's page again, and reports/index.html", _REPORTS)
def _pages(arguments: argparse.Namespace) -> int:
    from fresnel.report import run as report

    problems = report.rebuild(arguments.reports)
    print(report.reports_folder(arguments.reports) / "index.html")
    return report.EXIT_STATUS["no_page"] if _told(*problems) else 0


@_command(
    "remove what killed processes left: half-made sets and files, locks that nobody holds",
    _REPORTS,
    ("folder*", _path, "where else to look (default: reports/, runs/, the user's cache)"),
    ("--dry-run", True, "only list it"),
)
def _clean(arguments: argparse.Namespace) -> int:
    from fresnel.host.files import remove
    from fresnel.host.machine import cache_dir, runs_dir
    from fresnel.report import run as report

    reports, total, verb = report.reports_folder(arguments.reports), 0, "removed"
    if arguments.dry_run:
        verb = "would remove"
    else:
        report.try_index(reports)  # runs that were killed get their pages
    for path in report.leftovers([*arguments.folder, reports, runs_dir(), cache_dir()]):
        files = [path, *path.rglob("*")]
        size = sum(file.lstat().st_size for file in files if file.is_file())
        print(f"{verb} {size / 1e6:8.1f} MB  {path}")
        total += size
        if not arguments.dry_run:
            remove(path)
    print(f"{verb} {total / 1e6:.1f} MB in all")
    return 0


_RENDERED: Any = (
    ("--out!", _path, "folder of the dataset"),
    ("--size=image_size", 128, "side of a picture (default: 128)", "PX"),
    ("--views", 8, "views a record (default: 8)"),
    ("--inputs=inputs_per_object", 1, "records an object (default: 1)", "N"),
    ("--samples", 4, "rays a pixel (default: 4)"),
    ("--split", (None, "train", "val", "test"), "only this split"),
    ("--seed", 0, "of the cameras, and of heads (default: 0)"),
    ("--workers", int, "processes (default: one for each core)"),
    ("--overwrite", True, "replace a dataset at --out"),
)


@_command(
    "render Debian's sweethome3d-furniture 1.8-1 as multi-view data",
    ("--apt|", True, "fetch it with apt-get"),
    ("--deb|", _path, "sweethome3d-furniture_1.8-1_all.deb"),
    ("--sh3f|", _path, "folder with its .sh3f files"),
    ("--more", _path, "other 3D objects, to train on beside it (such as zeroad's)", "SOURCE"),
    ("--stretch", 1.0, "of an object's records after the first (default: 1)"),
    *_RENDERED,
)
def _furniture(arguments: argparse.Namespace) -> int:
    from fresnel.objects.furniture import make

    del arguments.apt
    return _rendered(make, **vars(arguments))


@_command(
    "render 3D objects (glTF, OBJ, a folder, zip or manifest of them) as multi-view data",
    ("source", _path, "the objects"),
    ("--stretch", 1.0, "of an object's records after the first (default: 1)"),
    *_RENDERED,
)
def _objects(arguments: argparse.Namespace) -> int:
    from fresnel.objects.sources import render_objects

    return _rendered(render_objects, **vars(arguments))


@_command(
    "make 3D objects of Debian's 0ad-data 0.0.26-1 (a zip that `objects` reads; CC BY-SA 3.0)",
    ("--apt|", True, "fetch it with apt-get, 1.4 GB"),
    ("--deb|", _path, "0ad-data_0.0.26-1_all.deb"),
    ("--public|", _path, "its public.zip"),
    ("--out!", _path, "the zip file"),
    ("--side", 512, "of a skin, at most, pixels (default: 512)"),
    ("--overwrite", True, "replace a file at --out"),
)
def _zeroad(arguments: argparse.Namespace) -> int:
    from fresnel.objects.zeroad import make

    del arguments.apt
    print(f"{make(**vars(arguments))} objects at {arguments.out}")
    return 0


@_command(
    "render human heads as multi-view data; the same people whenever the seed is the same",
    ("--count", 500, "people (default: 500)"),
    ("--first", 0, "number of the first: sets of other numbers share nobody (default: 0)"),
    ("--assets", _path, "folder or zip of MakeHuman's skins, eyes, hair ... (default: our own)"),
    ("--azimuths", ("even", "even", "random"), "of the views"),
    *_RENDERED,
)
def _heads(arguments: argparse.Namespace) -> int:
    from fresnel.heads.make import make

    return _rendered(make, **vars(arguments))


def _rendered(make: Callable, **options: Any) -> int:
    made = make(**options)
    print(f"{len(made)} records x {made.views_per_object} views at {made.path}")
    print(made.content_hash)
    return 0


def _told(*problems: str | None) -> int:
    """Say what is wrong, if anything; 1 then."""
    for problem in filter(None, problems):
        print(f"fresnel: {problem}", file=sys.stderr)
    return int(any(problems))


def _detect() -> str:
    from fresnel.host.machine import accelerators

    if sys.platform == "linux" and not accelerators():
        return "cpu"  # without the seconds that torch takes to say so
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"
