"""The loop: same bits when resumed, refusals, what is written. Steps: what each of them does."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fresnel.gate import receipts
from fresnel.training import checkpoints, loop, step
from fresnel.training.loop import fit
from fresnel.training.step import MATRIX_RATE, Muon, Stepper, orthogonal
from fresnel.training.task import NonFiniteLoss, OutOfMemory, ResumeRefused, TrainConfig

HASH = "sha256:" + "0" * 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.2), nn.Conv2d(4, 1, 3, padding=1)
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.layers(x)


class Line:
    """Learn to double an image: takes milliseconds. `at`: step -> what happens in its batch."""

    def __init__(self, batch_size: int = 4, at: dict[int, Any] | None = None) -> None:
        torch.manual_seed(0)
        self.model, self.batch_size, self.at = Net(), batch_size, at or {}
        self.data = SimpleNamespace(content_hash=HASH, names=("ball", "cube"))
        self.config: dict[str, Any] = {"aim": "double"}
        self.hot = {"network": Net.forward, "loss": nn.functional.mse_loss}
        self.batches = list[int]()
        self.scores: list[float] = []

    def phase(self, progress: float) -> None:
        return None

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Any]:
        x = torch.randn(self.batch_size, 1, 8, 8, generator=generator)
        self.batches.append(step)
        self.at.get(step, lambda x: None)(x)
        return {"x": x, "label": "noise"}

    def loss(self, batch, *, progress, generator, ema) -> dict[str, Tensor]:
        x = batch["x"]
        noise = torch.randn(x.shape, generator=generator)
        error = self.hot["loss"](self.hot["network"](self.model, x), 2 * x)
        return {"loss": error + 1e-3 * noise.mean(), "error": error}

    def validation(self, model) -> dict[str, float]:
        assert not model.training
        if self.scores:
            return {"loss": self.scores.pop(0)}
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"loss": (model(x) - 2 * x).square().mean().item()}

    def preview(self, model, generator) -> np.ndarray:
        return np.full((4, 4, 3), 128, dtype=np.uint8)


def certify(
    folder: Path, passed: bool = True, content_hash: str = HASH, records: int = 0
) -> receipts.Receipt:
    folder.mkdir(exist_ok=True)
    data = SimpleNamespace(path=folder, content_hash=content_hash)
    reasons = () if passed else ("empty: most views hold nothing",)
    return receipts.write_receipt(
        data, "gate", passed, "a sentence", reasons, records=(records,) * 2
    )


CONFIG = TrainConfig(
    steps=10, lr=1e-2, warmup_steps=2, log_every=2, validate_every=5, snapshot_every=5
)


def changed(**options: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **options)


def run(tmp_path: Path, name: str = "run", task: Any = None, **options) -> loop.TrainResult:
    options = {"config": CONFIG, "progress_bar": False, "receipt": certify(tmp_path), **options}
    return fit(task or Line(), run_dir=tmp_path / name, **options)


def interrupt(_: Any = None) -> None:
    signal.raise_signal(signal.SIGINT)


def stopped(tmp_path: Path, name: str = "run", *, after: int = 5, **options: Any) -> None:
    """A run that Ctrl-C ended after so many steps."""
    said = rf"stopped at step {after} of 10; a checkpoint is in .*{name}/checkpoints: .*to resume"
    with pytest.raises(KeyboardInterrupt, match=said):
        run(tmp_path, name, Line(at={after - 1: interrupt}), **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> loop.TrainResult:
    """A run that nothing disturbed."""
    return run(tmp_path_factory.mktemp("whole"))


def weights(result: loop.TrainResult) -> dict[str, Tensor]:
    both = {"model": result.model, "ema": result.ema_model}
    return {f"{w}.{name}": x for w, net in both.items() for name, x in net.state_dict().items()}


def assert_same_bits(a: Any, b: Any) -> None:
    a, b = (weights(x) if isinstance(x, loop.TrainResult) else x for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def checkpoint(folder: Path, name: str = "latest") -> Path:
    return folder / "checkpoints" / f"{name}.safetensors"


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_of_two_calls_in_one_folder_the_second_waits(tmp_path: Path) -> None:
    started = threading.Event()
    slow = Line(at={0: lambda _: started.set(), 1: lambda _: time.sleep(0.2)})
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, tmp_path, task=slow)
        assert started.wait(60)
        second = Line()
        result = run(tmp_path, task=second)
    assert second.batches == [], "the first trained all of it, and nobody wrote in between"
    assert_same_bits(first.result(), result)


def test_five_and_five_steps_are_ten_bit_for_bit(tmp_path: Path, whole) -> None:
    before = signal.getsignal(signal.SIGINT)
    stopped(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    task = Line()
    halves = run(tmp_path, task=task)
    assert task.batches == [5, 6, 7, 8, 9]
    assert_same_bits(whole, halves)
    (ours, ours_said), (theirs, theirs_said) = (
        checkpoints.read(checkpoint(result.run_dir)) for result in (whole, halves)
    )
    assert_same_bits(ours, theirs)
    assert ours_said == theirs_said
    assert [v["loss"] for v in whole.validations] == [v["loss"] for v in halves.validations]
    assert whole.history[-1]["loss"] == halves.history[-1]["loss"]
    other = run(tmp_path, "other", config=changed(seed=1))
    assert not torch.equal(whole.model.layers[0].weight, other.model.layers[0].weight)


def test_a_finished_run_is_returned_without_training(tmp_path: Path, whole) -> None:
    state = torch.get_rng_state()
    first, task = run(tmp_path), Line()
    assert torch.equal(torch.get_rng_state(), state), "the caller's draws are left alone"
    assert not torch.are_deterministic_algorithms_enabled()
    again = run(tmp_path, task=task)
    assert task.batches == [] and again.steps == 10 and again.duration_s == 0.0
    assert again.samples_per_s == again.history[-1]["samples_per_s"], "the log's rate"
    assert_same_bits(first, again)
    fresh = Line()
    run(tmp_path, task=fresh, resume=False)
    assert fresh.batches == list(range(10))
    assert [row["resumed"] for row in log_of(first.run_dir) if "resumed" in row] == [False]


def test_another_configuration_is_refused_naming_the_keys(tmp_path: Path) -> None:
    stopped(tmp_path)
    task = Line(batch_size=2)
    task.config = {"aim": "halve"}
    with pytest.raises(ResumeRefused) as refused:
        run(tmp_path, task=task, config=changed(lr=0.5))
    for difference in (
        "task.aim was 'double', now 'halve'",
        "task.batch_size was 4, now 2",
        "train.lr was 0.01, now 0.5",
    ):
        assert difference in str(refused.value)
    assert "seed" not in str(refused.value)
    other = Line()
    other.data = SimpleNamespace(content_hash=HASH, names=("ball", "cone"))
    with pytest.raises(ResumeRefused, match=r"records: 1 gone \['cube'\], 1 new \['cone'\]"):
        run(tmp_path, task=other)


KILLED = """
    import pkgutil, sys, time
    from pathlib import Path
    import fresnel.training
    for module in pkgutil.iter_modules(fresnel.training.__path__):
        __import__(f"fresnel.training.{{module.name}}")
    print(*(name for name in sys.modules if name.startswith("fresnel.")), flush=True)
    sys.path.insert(0, {tests!r})
    import test_train as t
    def wait(_):
        print("ready", flush=True)
        time.sleep(60)
    t.run(Path({folder!r}), "killed", t.Line(at={{7: wait}}), config=t.changed(snapshot_every=3))
"""


def test_kill_at_any_moment_then_resume(tmp_path: Path) -> None:
    """The process that is killed also says what training loads: no format reader, no report."""
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        loaded = [name.split(".")[1:] for name in child.stdout.readline().decode().split()]
        assert child.stdout.readline() == b"ready\n"
        child.kill()
    assert ["training", "forecast"] in loaded
    rooms = {"objects", "show", "report", "views", "study", "analysis", "cli", "faults"}
    readers = {"captures", "dataset", "formats"}
    data = {name[1] for name in loaded if name[0] == "data" and name[1:]}
    assert not rooms & {name[0] for name in loaded} and not readers & data
    # What a kill in the middle of a write leaves behind: half a file and half a line.
    folder = tmp_path / "killed"
    half = folder / "checkpoints" / ".latest.safetensors.tmp-0f2a"
    half.write_bytes(b"half a checkpoint")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    task, config = Line(), changed(snapshot_every=3)
    resumed = run(tmp_path, "killed", task, config=config)
    assert task.batches == [6, 7, 8, 9] and not half.exists()
    assert_same_bits(run(tmp_path, "whole", config=config), resumed)
    steps = [row["step"] for row in resumed.history]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("damage", [b"not a checkpoint at all", None])
def test_damaged_latest_falls_back_to_the_one_before(
    tmp_path: Path, whole, damage: bytes | None
) -> None:
    stopped(tmp_path, after=6)
    path = checkpoint(tmp_path / "run")
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    task = Line()
    with pytest.warns(UserWarning, match="latest.safetensors: damaged"):
        resumed = run(tmp_path, task=task)
    assert task.batches == [5, 6, 7, 8, 9]
    assert_same_bits(whole, resumed)
    for name in ("latest", "previous"):
        checkpoint(tmp_path / "run", name).write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="resume=False"):
        run(tmp_path)


def test_a_kill_between_two_renames_leaves_nothing_stale(tmp_path: Path, monkeypatch) -> None:
    """Whichever rename of a checkpoint is the last: `best` and `step_N` come out as without it."""
    config, replace, left = changed(keep_every=5), os.replace, 999

    def counted(source, target):
        nonlocal left
        left -= "checkpoints" in str(target)
        if left < 0:
            raise KeyboardInterrupt("killed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", counted)
    names = ("best", "step_000005", "step_000010", "latest")
    folder = run(tmp_path, "whole", config=config).run_dir
    wanted, renames = [checkpoints.read(checkpoint(folder, name)) for name in names], 999 - left
    assert renames > 8
    for last in range(renames):
        left, name = last, f"killed-{last}"
        with pytest.raises(KeyboardInterrupt, match="killed"):
            run(tmp_path, name, config=config)
        left = 999
        run(tmp_path, name, config=config)
        for which, (tensors, metadata) in zip(names, wanted, strict=True):
            found = checkpoints.read(checkpoint(tmp_path / name, which))
            assert found[1] == metadata, (last, which)
            assert_same_bits(found[0], tensors)


def test_accumulated_micro_batches_give_the_gradient_of_the_whole() -> None:
    images, found = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for parts in (1, 4):
        task, chunks = Line(batch_size=8 // parts), iter(images.chunk(parts))
        task.model.layers[1].p = 0.0
        task.batch = lambda step, generator, chunks=chunks: {"x": next(chunks)}
        stepper = Stepper(task, changed(accumulate=parts))
        stepper.train(0)
        found.append([stepper.take_terms()["error"], *(p.grad for p in stepper.parameters)])
    for whole, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(in_parts, whole, atol=2e-3, rtol=1e-3)
    draws = [step.step_seed(0, 3, micro) for micro in range(3)]
    assert len(set(draws)) == 3 and draws[0] == step.step_seed(0, 3)


def test_kernels_move_as_torchs_muon_moves_matrices_and_the_rest_as_adamw() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(*shape, generator=generator))

    ours = [draw(6, 4, 3, 3), draw(40, 6), draw(6, 4, 3, 3), draw(7)]
    theirs = [torch.nn.Parameter(p.detach().clone().reshape(len(p), -1)) for p in ours[:3]]
    flat = torch.nn.Parameter(ours[3].detach().clone())
    groups = [{"params": ours[:3], "lr": 0.02, "matrices": True}]
    groups.append({"params": ours[3:], "lr": 0.01, "matrices": False})
    plain = {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    muon = Muon(groups, **plain)
    known = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW([flat], lr=0.01, **plain)
    for _ in range(3):
        for p, same in zip(ours, [*theirs, flat], strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            same.grad = p.grad.reshape(same.shape).clone()
        before = ours[0].detach().clone()
        for optimizer in (muon, known, adam):
            optimizer.step()
    for p, same in zip(ours[:3], theirs, strict=True):  # torch's works in bfloat16
        torch.testing.assert_close(p.flatten(1), same, atol=1e-3, rtol=1e-2)
    assert torch.equal(ours[3], flat)
    moved = (ours[0] - before * (1 - 0.02 * 0.1)).flatten(1).detach()
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 0.02, rel=0.15)
    values = torch.linalg.svdvals(moved) / (0.2 * 0.02 * 36**0.5)
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25, "all directions alike"


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)])
def test_what_a_gradient_hardly_shows_moves_as_far_as_the_rest(shape: tuple[int, int]) -> None:
    u, _, v = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(1)), False
    )
    steep = u @ torch.diag(torch.tensor([1.0, 0.3, 0.1, 0.05, 0.02])) @ v
    values = torch.linalg.svdvals(orthogonal(torch.stack([steep, 1e4 * steep, 0 * steep])))
    assert float(values[:2].min()) > 0.6 and float(values[:2].max()) < 1.25
    assert not values[2].any(), "nothing moves without a gradient"


def test_a_step_whose_update_is_recorded_is_the_step() -> None:
    """Its gradients stay in one place, zeroed; and the update is called with nothing."""
    weights, places = [], set[int]()
    for recorded in (False, True):
        stepper = Stepper(Line(), changed(grad_clip=0.1))
        if recorded:
            stepper.mover = SimpleNamespace(run=lambda kind, work: work())
        for number in range(4):
            stepper.train(number)
            places |= {p.grad.data_ptr() for p in stepper.parameters} if recorded else set()
        weights.append([p.detach().clone() for p in stepper.parameters])
        weights[-1].append(torch.tensor(list(stepper.take_terms().values())))
    assert len(places) == len(stepper.parameters)
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_have_a_rate_of_their_own(optimizer: str) -> None:
    from test_cvs import model, views

    from fresnel.training.cvs_task import CVSTask

    stepper = Stepper(CVSTask(model(), views(), batch_size=2), changed(optimizer=optimizer))
    shares = {(g["matrices"], g["share"]) for g in stepper.optimizer.param_groups}
    assert shares == ({(True, MATRIX_RATE)} if optimizer == "muon" else set()) | {(False, 1.0)}
    held = [p for group in stepper.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(stepper.parameters) == len(set(held))


def test_the_average_has_the_stated_width_and_forgets_the_start() -> None:
    """Weights that are 1 in one place at each step leave the window's profile in the average."""
    # EDM2 gives these exponents for its standard widths
    assert step.ema_exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert step.ema_exponent(0.1) == pytest.approx(6.94, abs=0.01)
    n, task = 1000, Line()
    task.model = nn.Linear(n, 1, bias=False, dtype=torch.float64)
    for width in (0.05, 0.1):
        stepper = Stepper(task, TrainConfig(ema_std=width))
        for k in range(n):
            task.model.weight.data.zero_()[0, k] = 1.0
            stepper.update_ema(k + 1)
        profile = stepper.ema.weight[0].numpy()
        assert profile.sum() == pytest.approx(1.0)  # nothing is left of the initial weights
        t = np.arange(1, n + 1) / n
        mean = (profile * t).sum()
        assert np.sqrt((profile * (t - mean) ** 2).sum()) == pytest.approx(width, rel=0.01)


@pytest.mark.parametrize(("precision", "clip"), [("fp32", 0.1), ("bf16", 1e9)])
def test_a_step_works_in_its_precision_and_clips_its_gradients(precision: str, clip: float) -> None:
    task, kinds = Line(), set()
    task.model.layers[2].register_forward_hook(lambda _m, _x, out: kinds.add(out.dtype))
    stepper = Stepper(task, changed(precision=precision, grad_clip=clip))
    stepper.train(0)
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in stepper.parameters)
    norm = nn.utils.get_total_norm([p.grad for p in stepper.parameters]).item()
    before = stepper.take_terms()["grad_norm"]
    assert before > 0.2 and norm == pytest.approx(min(clip, before), rel=1e-4)


def test_checkpointing_computes_activations_twice_and_the_same_gradients() -> None:
    from test_cvs import model, views

    from fresnel.training.cvs_task import CVSTask

    gradients, calls = [], list[int]()
    for checkpointing in (0, 1):
        task = CVSTask(model(), views(), batch_size=2)
        inner = task.model.unet.middle_in.conv1
        inner.register_forward_hook(lambda *_, which=checkpointing: calls.append(which))
        stepper = Stepper(task, TrainConfig(steps=2, checkpointing=bool(checkpointing)))
        stepper.train(0)
        gradients.append([p.grad.clone() for p in stepper.parameters])
    assert calls == [0, 1, 1]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_learning_rate_warms_up_and_cools_down(tmp_path: Path) -> None:
    config = changed(log_every=1, warmup_steps=4, cooldown_share=0.5)
    rates = [row["lr"] for row in run(tmp_path, config=config).history]
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates == pytest.approx([0.01 * value for value in expected])
    stepper = Stepper(Line(), config)
    stepper.train(8)
    rates = [group["lr"] / group["share"] for group in stepper.optimizer.param_groups]
    assert rates == pytest.approx([0.004] * len(rates)), "the one used"


@pytest.mark.parametrize("works", [True, False])
def test_what_is_compiled_learns_the_same_and_what_cannot_be_runs_as_it_was(
    tmp_path: Path, monkeypatch, works: bool
) -> None:
    seen: list[int] = []

    def backend(graph, inputs):  # needs no C++ compiler
        seen.append(len(inputs))
        if not works:
            raise TypeError("Expected a number but got Add:")
        return graph

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **o: compile_with(f, backend=backend, **o))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    torch.compiler.reset()
    plain = run(tmp_path, "plain", config=changed(steps=4))
    task = Line()
    result = run(tmp_path, "compiled", task, config=changed(steps=4, compile=True))
    assert len(seen) >= 2 and result.compile_s > 0
    assert task.hot["network"] is not Net.forward
    assert result.ema_model.calls == 4, "trying left no trace"
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(result)[name], value, atol=1e-6, rtol=1e-5)


def test_compiled_code_is_kept_where_the_next_run_finds_it(tmp_path: Path, monkeypatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    stepper, ours = Stepper(Line(), CONFIG), str(tmp_path / "fresnel" / "inductor")
    for before, wanted in ((default_cache_dir(), ours), ("mine", "mine")):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        stepper.compile()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == wanted


def _disk_full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_background_writer_keeps_what_it_was_given_and_reports_failures(
    tmp_path: Path, monkeypatch
) -> None:
    tensor = torch.zeros(3)
    write, begin = checkpoints.serialised, threading.Event()
    monkeypatch.setattr(checkpoints, "serialised", lambda *a: (begin.wait(60), write(*a))[1])
    with checkpoints.Writer(background=True) as writer:
        writer.save(tmp_path, {"x": tensor}, {"step": 1}, ["best"])
        tensor += 1  # training goes on
        begin.set()
        writer.wait()
        assert checkpoints.read(tmp_path / "best.safetensors")[0]["x"].sum() == 0
        writer.save(tmp_path, {"x": tensor}, {"step": 2})
        writer.wait()
        monkeypatch.setattr(os, "fsync", _disk_full)
        writer.save(tmp_path, {"x": tensor}, {"step": 3})
        with pytest.raises(checkpoints.DiskFull, match="free some space and run again to resume"):
            writer.wait()
    assert checkpoints.read(tmp_path / "latest.safetensors")[1]["step"] == 2


def test_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch) -> None:
    stopped(tmp_path)
    before = checkpoint(tmp_path / "run").read_bytes()
    with monkeypatch.context() as patch:
        full = Line(at={9: lambda _: patch.setattr(os, "fsync", _disk_full)})
        with pytest.raises(checkpoints.DiskFull):
            run(tmp_path, task=full)
    assert checkpoint(tmp_path / "run").read_bytes() == before
    assert run(tmp_path).steps == 10


@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_loss_stops_the_run_and_keeps_the_batch(tmp_path: Path, accumulate: int) -> None:
    task = Line(at={7: lambda x: x[0, 0, 0].fill_(torch.nan)})
    with pytest.raises(NonFiniteLoss, match="step 7: not finite: loss, error") as failed:
        run(tmp_path, task=task, config=changed(accumulate=accumulate))
    assert failed.value.step == 7
    batch = load_file(failed.value.path)
    assert batch["x"].isnan().sum() == 8 and batch["x"].shape == (4, 1, 8, 8)
    tensors, metadata = checkpoints.read(checkpoint(tmp_path / "run"))
    assert metadata["step"] == 5 and all(t.isfinite().all() for t in tensors.values())


def test_a_loss_that_is_not_finite_counts_whatever_its_gradient(tmp_path: Path) -> None:
    task = Line()
    task.hot["loss"] = lambda ours, truth: (ours - truth).square().mean() + torch.inf
    with pytest.raises(NonFiniteLoss, match="step 0: not finite: loss, error"):
        run(tmp_path, task=task)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError()])
def test_out_of_memory_says_what_to_lower(tmp_path: Path, error: BaseException) -> None:
    def fail(_: Tensor) -> None:
        raise error

    with pytest.raises(OutOfMemory, match="step 1 with batch_size 4 on cpu: lower batch"):
        run(tmp_path, task=Line(at={1: fail}))


def test_no_training_without_a_passing_receipt_of_the_tasks_own_data(tmp_path: Path) -> None:
    failed, other = certify(tmp_path, passed=False), certify(tmp_path, content_hash="sha256:1")
    task = Line()
    for receipt, reason in ((None, "got None"), (failed, "empty"), (other, "other data")):
        with pytest.raises(receipts.GateRefusal, match=reason):
            run(tmp_path, task=task, receipt=receipt)
    with pytest.raises(receipts.GateRefusal, match="other data"):
        run(tmp_path, task=task, receipt=other, allow_failed_gate=True)
    assert task.batches == [] and not (tmp_path / "run").exists()


def test_an_overridden_gate_is_stamped_on_everything(tmp_path: Path) -> None:
    result = run(tmp_path, receipt=certify(tmp_path, passed=False), allow_failed_gate=True)
    assert result.gate_overridden
    for name in ("latest", "best", "previous"):
        metadata = checkpoints.read(checkpoint(result.run_dir, name))[1]
        assert metadata["gate_overridden"] is True
    rows = log_of(result.run_dir)
    assert rows and all(row["gate_overridden"] for row in rows)
    assert not run(tmp_path, "passed", allow_failed_gate=True).gate_overridden


def test_log_previews_and_snapshots(tmp_path: Path, whole) -> None:
    result = run(tmp_path, config=changed(keep_every=4, preview_every=6))
    pictures = {step: f"step_{step:06d}.png" for step in (0, 6, 10)}
    assert {step: path.name for step, path in result.previews.items()} == pictures
    assert list(result.snapshots) == [4, 8]
    names = {"latest", "previous", "best", "step_000004", "step_000008"}
    assert {p.stem for p in (result.run_dir / "checkpoints").iterdir()} == names
    rows = log_of(result.run_dir)
    assert [r["step"] for r in rows if r["event"] == "validation"] == [0, 5, 10]
    trained = [r for r in rows if r["event"] == "train"]
    assert trained == result.history and [r["step"] for r in trained] == [2, 4, 5, 6, 8, 10]
    assert {"loss", "error", "grad_norm", "lr", "samples_per_s"} <= trained[0].keys()
    assert result.samples_per_s > 0 and result.peak_memory_bytes > 0
    assert min(result.duration_s, result.paused_s, result.around_s) > 0
    assert checkpoints.read(result.snapshots[4])[1]["step"] == 4
    places = {".lock", "log.jsonl", "checkpoints", "previews"}
    assert {path.name for path in result.run_dir.iterdir()} == places
    assert whole.previews == {}


def test_the_average_follows_the_weights_and_copies_buffers(whole) -> None:
    assert whole.ema_model.calls == whole.model.calls == 10
    nets = (whole.ema_model, whole.model, Line().model)
    ours, theirs, start = (net.layers[0].weight for net in nets)
    assert 0 < (ours - theirs).abs().max() < (start - theirs).abs().max()
    assert not any(p.requires_grad for p in whole.ema_model.parameters())


def test_best_checkpoint_is_the_one_with_the_lowest_validation_loss(tmp_path: Path) -> None:
    task = Line()
    task.scores = [3.0, 1.0, 2.0]
    result = run(tmp_path, task=task)
    tensors, metadata = checkpoints.read(checkpoint(result.run_dir, "best"))
    assert (metadata["step"], metadata["best_step"], metadata["best_loss"]) == (5, 5, 1.0)
    assert not torch.equal(tensors["ema.layers.0.weight"], result.ema_model.layers[0].weight)
    assert checkpoints.read(checkpoint(result.run_dir))[1]["best_step"] == 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": 0}, "steps: got 0, want at least 1"),
        ({"snapshot_every": -1}, "snapshot_every: got -1, want at least 0"),
        ({"lr": float("nan")}, "lr: got nan, want a finite value > 0"),
        ({"precision": "fp16"}, "precision: got 'fp16', want 'fp32' or 'bf16'"),
        ({"ema_std": 0.5}, "ema_std: got 0.5"),
        ({"cooldown_share": 2.0}, "cooldown_share: got 2.0"),
    ],
)
def test_nonsense_configurations_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**bad)
