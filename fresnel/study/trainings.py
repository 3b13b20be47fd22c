"""A training as notebooks 02 and 03 declare it: run in this process, or in one for each GPU.

A declaration is JSON, and `task` makes what it declares, here and in the processes that torchrun
starts. What those say, their log, result and errors, comes back as if it had happened here. On
several machines a person starts them with `COMMAND` (docs/gpu-box.md).
"""

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
from tqdm.auto import tqdm

from fresnel.data import dataset
from fresnel.data.dataset import DatasetError, MultiViewDataset, ViewTensors
from fresnel.gate.receipts import GateRefusal, Receipt, require_receipt
from fresnel.host import machine
from fresnel.host.files import scratch, write_atomic
from fresnel.models.cvs import CVS
from fresnel.models.decoder import Decoder
from fresnel.objects import sources
from fresnel.report.params import read_parameters
from fresnel.report.provenance import child_environment
from fresnel.study import arms
from fresnel.study import data as training_data
from fresnel.training import forecast as planning
from fresnel.training import loop, ranks
from fresnel.training.checkpoints import DiskFull
from fresnel.training.cvs_task import pairs_of
from fresnel.training.loop import TrainResult
from fresnel.training.task import NonFiniteLoss, OutOfMemory, ResumeRefused, TrainConfig

COMMAND = """\
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500 \\
        -m fresnel.study.trainings SPEC.json"""
_NETWORKS = ("model", "ema_model")
STOP_S = 40.0
"""How long processes that were told to stop may take: torchrun itself gives them 30 s."""
_SAID_LINES = 15  # of what processes printed, in the message of an error that nobody foresaw


@dataclass(frozen=True)
class Training:
    """What is trained, on what and how, in JSON's types. `batch_size`: samples of a step;
    `validate`: on the source's validation objects, else on what is trained on."""

    dataset_dir: str
    content_hash: str
    run_dir: str
    config: TrainConfig
    device: str
    model: str
    size: str
    batch_size: int
    seed: int
    objects: str = "all"
    domain: str = "objects"
    initial_weights: str = ""
    decoder_weights: str = ""
    loss_mask: str = "alpha_aware"
    parameterisation: str = "consistency"
    objective: str = ""
    augment: bool = True
    any_input: bool = False
    drop_worst_views: float = 0.0
    validate: bool = True
    truth_source: str = "embedded"
    truth_objects: int = 0
    resume: bool = True
    allow_failed_gate: bool = False


def declare(
    parameters: Mapping[str, Any], data: MultiViewDataset, *, device: str, gpus: int = 1
) -> Training:
    """The training that the parameters of 03 (or of 02, with its full run's "steps") ask for."""
    given = {name: parameters[name] for name in _NAMES & parameters.keys()}
    parts = planning.parts_of_a_step(parameters["batch_size"], parameters["accumulate"], gpus)
    named = {"learning_rate": "lr", "compile_step": "compile", "checkpointing": "checkpointing"}
    config = planning.full_config(
        parameters["steps"],
        **{ours: parameters[theirs] for theirs, ours in named.items()},
        **{name: parameters.get(name, 0) for name in ("previews", "keep_every", "seed")},
        accumulate=parts,
        precision=planning.pick_precision(parameters["precision"], device),
    )
    truth = parameters.get("any_input", False) and data.meta.get("generator") != "bootstrap"
    # the same run whoever computes its parts
    folder = training_data.train_dir(parameters["model"], data, {**parameters, "accumulate": parts})
    own = {"config": config, "device": device, "run_dir": str(folder.resolve())}
    own |= {"dataset_dir": str(data.path.resolve()), "content_hash": data.content_hash}
    original = data.meta.get("config", {}).get("pivot") == "world_origin"
    domain = training_data.domain_of(data, parameters.get("domain", ""))
    source = sources.of_domain(parameters.get("truth_source", "embedded"), domain)
    own |= {"any_input": truth, "validate": not original, "domain": domain, "truth_source": source}
    return Training(**given | own)


def write(notebook: Path, given: Mapping[str, Any], path: Path) -> int:
    """Write what 03 with these parameters would train, for processes that others start, on machines
    that share dataset and runs, and say how; 0. What is refused there is refused here.

    Raises ValueError also where this machine can't tell what "auto" is on theirs."""
    known = read_parameters(notebook)
    if "steps" not in known:
        raise ValueError("--spec-only: only 03_full_train has a training to write")
    parameters = {name: found.default for name, found in known.items()} | dict(given)
    if said := [name for name in ("gpus", "device", "precision") if parameters[name] == "auto"]:
        raise ValueError(
            f"--spec-only: {', '.join(said)}: say what it is on all machines together, such as "
            "-p gpus 16 -p device cuda -p precision bf16"
        )
    folder, model = parameters["dataset_dir"], parameters["model"]
    data = dataset.open(folder) if folder else training_data.demo_dataset(model)
    kinds = ["gate", "smoke-cvs"] if folder and model.startswith("cvs") else ["gate"]
    try:
        training_data.receipts(data, kinds, parameters["allow_failed_gate"])
    except GateRefusal as refusal:
        raise ValueError(refusal) from None
    gpus = int(parameters["gpus"])
    training = declare(parameters, data, device=parameters["device"], gpus=gpus)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(training)))
    print(f"{path}: on each machine, here of two with {-(-gpus // 2)} GPUs:", COMMAND, sep="\n")
    print(f"then 03 with these -p, but -p gpus 1 -p accumulate {training.config.accumulate}")
    return 0


def opened(training: Training) -> tuple[MultiViewDataset, ViewTensors, ViewTensors | None]:
    """The records that are trained on, what is in them, and the validation objects."""
    data, source = dataset.open(training.dataset_dir), training.truth_source
    if data.content_hash != training.content_hash:
        raise DatasetError(f"{data.path}: changed since the training was declared. Declare it anew")
    validating = None
    if training.validate:
        truth = training_data.held_out(source, data, training.truth_objects)
        validating = training_data.validation_objects(source, truth)
    part = sources.part(data, training.objects)
    return part, part.tensors(), validating


def task(
    training: Training,
    part: MultiViewDataset,
    views: ViewTensors,
    validating: ViewTensors | None = None,
) -> Any:
    """The task of a training, seeded, on its device, of what is `opened`."""
    same = "loss_mask parameterisation objective augment initial_weights domain seed device"
    given: dict[str, Any] = {name: getattr(training, name) for name in same.split()}
    return arms.make_task(
        *(training.model, training.size, views),
        **given,
        batch_size=training.batch_size // training.config.accumulate,
        validation=validating if training.validate else None,
        ground_truth=training.any_input,
        pairs=pairs_of(part, training.drop_worst_views),
        renderer=arms.renderer(
            training.model, training.device, training.decoder_weights, training.domain
        ),
    )


def fit(
    training: Training,
    *data: Any,
    receipt: Receipt | None,
    gpus: int = 1,
    progress_bar: bool = True,
) -> TrainResult:
    """Train what is declared, here or in a process for each of several GPUs, with this process's
    progress bar, result and errors.

    data: what is `opened`; receipt: the gate's. Other processes open and read them for themselves.

    Raises what `fresnel.training.loop.fit` raises, and ChildError."""
    if gpus > 1:
        return _in_processes(training, gpus)
    return loop.fit(
        task(training, *data),
        config=training.config,
        run_dir=training.run_dir,
        receipt=receipt,
        resume=training.resume,
        allow_failed_gate=training.allow_failed_gate,
        progress_bar=progress_bar,
    )


# --- on several GPUs: the caller's side -------------------------------------------------------


class ChildError(RuntimeError):
    """A training process ended in a way that nobody foresaw; the message has its last words."""


_FORESEEN = {GateRefusal, ResumeRefused, OutOfMemory, NonFiniteLoss, DiskFull, DatasetError}
_FORESEEN |= {ValueError, OSError, KeyboardInterrupt}


def _in_processes(training: Training, gpus: int) -> TrainResult:
    began, run_dir = time.time(), Path(training.run_dir)
    gc.collect()
    if cuda := machine.cuda():
        cuda.empty_cache()  # the processes' share of the first card
    with scratch(run_dir / "processes", folder=True) as folder:
        write_atomic(folder / "training.json", msgspec.json.encode(training))
        words = [*ranks.torchrun(gpus), "-m", __name__, str(folder / "training.json")]
        env = child_environment()
        env.setdefault("OMP_NUM_THREADS", str(max(1, machine.core_count() // gpus)))
        with (
            open(folder / "said", "wb") as said,
            # a group of their own: a Ctrl-C reaches them through us; and a pipe that ends with us
            subprocess.Popen(
                [*words, "--with-caller"],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env=env,
                start_new_session=True,
            ) as child,
        ):
            stopped = False
            try:
                _follow(child, training, gpus, began)
            except KeyboardInterrupt:
                stopped = True
            finally:
                _stop(child)
        result = _result(folder, training, gpus, stopped=stopped)
    known = result.compile_s + result.duration_s + result.paused_s
    return replace(result, around_s=max(0.0, time.time() - began - known))


def _follow(child: Any, training: Training, gpus: int, began: float) -> None:
    """Show the processes' log in a bar until they end."""
    log, size, steps = Path(training.run_dir) / "log.jsonl", -1, training.config.steps
    with tqdm(total=steps, desc=f"train, {machine.cards(training.device, gpus)}") as bar:
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
            with contextlib.suppress(OSError):
                if (now := log.stat()).st_mtime < began - 1 or now.st_size == size:
                    continue
                size = now.st_size
                rows = [row for row in loop.read_log(log) if row["event"] == "train"]
                if rows and rows[-1]["step"] != bar.n:
                    bar.update(rows[-1]["step"] - bar.n)
                    loss, rate = rows[-1]["loss"], rows[-1]["samples_per_s"]
                    bar.set_postfix(loss=f"{loss:.4g}", samples_s=f"{rate:.1f}")


def _stop(child: Any) -> None:
    """Tell processes that still run to stop, which ends in a checkpoint; Ctrl-C kills them."""
    if child.poll() is not None:
        return
    try:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def _result(folder: Path, training: Training, gpus: int, *, stopped: bool) -> TrainResult:
    """What rank 0 says, or the error that tells most; those that nobody foresaw come as texts."""
    # our own processes wrote them, into a folder of this call's
    ends = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("end-*"))]
    for end in ends:
        if type(end) in _FORESEEN:
            raise end
    if stopped:
        raise KeyboardInterrupt("stopped")
    results = [end for end in ends if isinstance(end, TrainResult)]
    if len(ends) < gpus or not results:
        said = (folder / "said").read_text(encoding="utf-8", errors="replace").splitlines()
        why = next((end for end in ends if isinstance(end, str)), "")
        lost = f"{gpus - len(ends)} of {gpus} training processes ended without a word (killed?)"
        raise ChildError("\n".join([why or lost, *said[-_SAID_LINES:]]))
    kind: Any = CVS if training.model in arms.CVS_MODELS else Decoder
    model, average = (
        kind.load(folder / f"{name}.safetensors", training.device) for name in _NETWORKS
    )
    return replace(results[0], model=model, ema_model=average)


# --- on several GPUs: one of the processes ----------------------------------------------------


def main(arguments: list[str]) -> None:
    """One of a run's processes: SPEC.json, and --with-caller where it is to end with its caller."""
    spec, with_caller = Path(arguments[0]), "--with-caller" in arguments
    training = msgspec.json.decode(spec.read_bytes(), type=Training)
    if with_caller:
        threading.Thread(target=_end_with_caller, daemon=True).start()

    def train(group: ranks.Ranks) -> None:
        part, *more = opened(training)
        receipt = require_receipt(part, "gate", training.allow_failed_gate)
        result = fit(training, part, *more, receipt=receipt, progress_bar=not with_caller)
        if with_caller and group.first:
            for name in _NETWORKS:
                getattr(result, name).save(spec.with_name(f"{name}.safetensors"))
        told(group, replace(result, model=None, ema_model=None) if group.first else None)

    def told(group: ranks.Ranks, end: Any) -> None:
        if isinstance(end, BaseException) and type(end) not in _FORESEEN | {ranks.ElsewhereFailed}:
            end = f"{type(end).__name__}: {end}"
        if with_caller:
            write_atomic(spec.with_name(f"end-{group.rank:04d}"), pickle.dumps(end))

    def work(group: ranks.Ranks) -> None:
        try:
            train(group)
        except BaseException as error:
            told(group, error)
            raise

    ranks.main(work, "cuda" if training.device.startswith("cuda") else "cpu")


def _end_with_caller() -> None:
    """The caller holds the other end of this pipe: stop, with a checkpoint, once it is gone."""
    while os.read(0, 1):  # not sys.stdin, whose lock would be held at this process's own end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


_NAMES = {field.name for field in fields(Training)}

if __name__ == "__main__":
    main(sys.argv[1:])
