from __future__ import annotations

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

from fresnel.gate import verdict as gate
from fresnel.training import checkpoints
from fresnel.training import host as surroundings
from fresnel.training import loop as train
from fresnel.training.loop import TrainConfig, fit, step_seed

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
    """Learn to double an image: a task that takes milliseconds."""

    name = "line"

    def __init__(self, batch_size: int = 4, poison_step: int | None = None) -> None:
        torch.manual_seed(0)
        self.model, self.batch_size = Net(), batch_size
        self.poison_step, self.batches = poison_step, []

    def batch(self, step: int, generator: torch.Generator) -> dict[str, Any]:
        x = torch.randn(self.batch_size, 1, 8, 8, generator=generator)
        if step == self.poison_step:
            x[0, 0, 0, 0] = torch.nan
        self.batches.append(step)
        return {"x": x, "label": "noise"}

    def loss(self, batch, *, progress, generator, ema) -> dict[str, Tensor]:
        x = batch["x"]
        noise = torch.randn(x.shape, generator=generator)
        error = (self.model(x) - 2 * x).square().mean()
        return {"loss": error + 1e-3 * noise.mean(), "error": error}

    def validation(self, model) -> dict[str, float]:
        assert not model.training
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"loss": (model(x) - 2 * x).square().mean().item()}

    def preview(self, model, generator) -> np.ndarray:
        return np.full((4, 4, 3), 128, dtype=np.uint8)


def dataset(path: Path, passed: bool | None = True) -> Any:
    made = SimpleNamespace(path=path, content_hash=HASH, verify=lambda: None)
    if passed is not None:
        reasons = () if passed else ("empty: most views hold nothing",)
        gate.write_receipt(made, "gate", passed, "a sentence", reasons)
    return made


CONFIG = TrainConfig(
    steps=10, lr=1e-2, warmup_steps=2, log_every=2, validate_every=5, snapshot_every=5
)


def run(tmp_path: Path, name: str = "run", task: Any = None, **options) -> train.TrainResult:
    options = {"config": CONFIG, "progress_bar": False, **options}
    return fit(task or Line(), dataset(tmp_path), run_dir=tmp_path / name, **options)


def weights(result: train.TrainResult) -> dict[str, Tensor]:
    return {
        f"{which}.{name}": value
        for which, model in (("model", result.model), ("ema", result.ema_model))
        for name, value in model.state_dict().items()
    }


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def latest(tmp_path: Path, name: str = "run") -> Path:
    return tmp_path / name / "checkpoints" / "latest.safetensors"


def test_of_two_calls_in_one_folder_the_second_waits(tmp_path: Path) -> None:
    class Slow(Line):
        def batch(self, step: int, generator: torch.Generator) -> dict[str, Any]:
            started.set()
            time.sleep(0.02)
            return super().batch(step, generator)

    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run, tmp_path, task=Slow())
        assert started.wait(60)
        second = Line()
        result = run(tmp_path, task=second)
    assert second.batches == [], "the first trained all of it, and nobody wrote in between"
    assert_same_bits(weights(first.result()), weights(result))
    assert result.duration_s == 0.0 and result.samples_per_s > 0.0, "the log's rate"
    rates = [row["samples_per_s"] for row in result.history]
    assert min(rates) <= result.samples_per_s <= max(rates)


# --- determinism and resume -----------------------------------------------------------------


def test_five_and_five_steps_are_ten_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path, "whole")
    half = run(tmp_path, "halves", stop_at_step=5)
    assert half.steps == 5
    task = Line()
    halves = run(tmp_path, "halves", task)
    assert task.batches == [5, 6, 7, 8, 9]
    assert_same_bits(weights(whole), weights(halves))
    assert_same_bits(load_file(latest(tmp_path, "whole")), load_file(latest(tmp_path, "halves")))
    assert whole.best_loss == halves.best_loss and whole.best_step == halves.best_step
    assert [v["loss"] for v in whole.validations] == [v["loss"] for v in halves.validations]
    assert whole.history[-1]["loss"] == halves.history[-1]["loss"]


def test_cvs_resumes_bit_for_bit_too(tmp_path: Path) -> None:
    from test_cvs import views

    from fresnel.models.cvs import CVS, CVSConfig
    from fresnel.training.cvs_task import CVSTask

    def task() -> CVSTask:
        torch.manual_seed(0)
        net = CVS(CVSConfig.preset("tiny", dropout=0.1, denoising_share=0.3))
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return CVSTask(net, views(), batch_size=2, mirror=True)

    whole = run(tmp_path, "whole", task())
    run(tmp_path, "halves", task(), stop_at_step=5)
    assert_same_bits(weights(whole), weights(run(tmp_path, "halves", task())))


def test_same_seed_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first, again = run(tmp_path, "a"), run(tmp_path, "b")
    assert_same_bits(weights(first), weights(again))
    other = run(tmp_path, "c", config=dataclasses.replace(CONFIG, seed=1))
    assert not torch.equal(first.model.layers[0].weight, other.model.layers[0].weight)


def test_a_finished_run_is_returned_without_training(tmp_path: Path) -> None:
    first, task = run(tmp_path), Line()
    again = run(tmp_path, task=task)
    assert task.batches == [] and again.steps == 10
    assert_same_bits(weights(first), weights(again))
    fresh = Line()
    run(tmp_path, task=fresh, resume=False)
    assert fresh.batches == list(range(10))


def test_global_random_state_and_determinism_flag_are_left_alone(tmp_path: Path) -> None:
    task, state = Line(), torch.get_rng_state()
    run(tmp_path, task=task)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_configuration_is_refused_naming_the_keys(tmp_path: Path) -> None:
    run(tmp_path, stop_at_step=5)
    with pytest.raises(train.ResumeRefused) as refused:
        run(tmp_path, task=Line(batch_size=2), config=dataclasses.replace(CONFIG, lr=0.5))
    assert "task.batch_size was 4, now 2" in str(refused.value)
    assert "train.lr was 0.01, now 0.5" in str(refused.value)
    assert "seed" not in str(refused.value)


KILLED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_train as t
    class Slow(t.Line):
        def batch(self, step, generator):
            if step == 7:
                print("ready", flush=True)
                time.sleep(60)
            return super().batch(step, generator)
    t.run(Path({folder!r}), "killed", Slow(), config={config})
"""


def test_kill_at_any_moment_then_resume(tmp_path: Path) -> None:
    config = "t.dataclasses.replace(t.CONFIG, snapshot_every=3)"
    script = textwrap.dedent(KILLED).format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), config=config
    )
    root = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.kill()
    # What a kill in the middle of a write leaves behind: half a file and half a line.
    (tmp_path / "killed/checkpoints/latest.tmp").write_bytes(b"half a checkpoint")
    with open(tmp_path / "killed/log.jsonl", "a") as file:
        file.write('{"event": "train", "st')
    task = Line()
    resumed = run(tmp_path, "killed", task, config=dataclasses.replace(CONFIG, snapshot_every=3))
    assert task.batches == [6, 7, 8, 9]
    whole = run(tmp_path, "whole", config=dataclasses.replace(CONFIG, snapshot_every=3))
    assert_same_bits(weights(whole), weights(resumed))
    steps = [row["step"] for row in resumed.history]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint at all", None])
def test_damaged_latest_falls_back_to_the_one_before(tmp_path: Path, damage: bytes | None) -> None:
    whole = run(tmp_path, "whole")
    run(tmp_path, stop_at_step=6)
    path = latest(tmp_path)
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    task = Line()
    with pytest.warns(UserWarning, match="latest.safetensors: damaged"):
        resumed = run(tmp_path, task=task)
    assert task.batches == [5, 6, 7, 8, 9]
    assert_same_bits(weights(whole), weights(resumed))


def test_two_damaged_checkpoints_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    run(tmp_path, stop_at_step=6)
    for name in ("latest", "previous"):
        latest(tmp_path).with_name(f"{name}.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="resume=False"):
        run(tmp_path)


def test_a_kill_between_the_two_renames_leaves_the_previous(tmp_path: Path) -> None:
    run(tmp_path, stop_at_step=6)
    latest(tmp_path).unlink()
    task = Line()
    run(tmp_path, task=task)
    assert task.batches[0] == 5


def test_accumulated_micro_batches_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    class Quarters(Line):
        """The same eight images, a quarter of them at a time."""

        def __init__(self, parts: int) -> None:
            super().__init__(batch_size=8 // parts)
            self.parts, self.given = parts, 0
            self.model.eval()

        def batch(self, step, generator):
            x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
            part = x.chunk(self.parts)[self.given % self.parts]
            self.given += 1
            return {"x": part}

        def loss(self, batch, **_):
            error = (self.model.layers[::2](batch["x"]) - 2 * batch["x"]).square().mean()
            return {"loss": error}

    whole = run(tmp_path, "whole", Quarters(1))
    parts = run(tmp_path, "parts", Quarters(4), config=dataclasses.replace(CONFIG, accumulate=4))
    assert [r["loss"] for r in parts.history] == pytest.approx([r["loss"] for r in whole.history])
    for name, value in weights(whole).items():
        if "calls" not in name:
            torch.testing.assert_close(weights(parts)[name], value, atol=1e-5, rtol=1e-4)
    draws = [step_seed(0, 3, micro) for micro in range(3)]
    assert len(set(draws)) == 3 and draws[0] == step_seed(0, 3)


def test_compiling_and_checkpointing_change_nothing_but_rounding(
    tmp_path: Path, monkeypatch
) -> None:
    plain = run(tmp_path, "plain", config=dataclasses.replace(CONFIG, steps=4))
    compiled: list[float] = []

    def traced(*_, **__):  # needs no C++ compiler
        compiled.append(1)
        return [{"backend": "eager"}]

    monkeypatch.setattr(surroundings, "ways_to_compile", traced)
    config = dataclasses.replace(CONFIG, steps=4, compile=True, checkpointing=True)
    result = run(tmp_path, "compiled", config=config)
    assert compiled and result.compile_s > 0
    assert result.ema_model.calls == plain.ema_model.calls == 4  # warming up left no trace
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(result)[name], value, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_compiled_or_comes_out_different_runs_as_it_was(
    tmp_path: Path, monkeypatch
) -> None:
    class Hot(Line):
        def __init__(self) -> None:
            super().__init__()
            self.hot = {"network": type(self.model).forward, "loss": torch.nn.functional.mse_loss}

        def loss(self, batch, **_):
            output = self.hot["network"](self.model, batch["x"])
            return {"loss": self.hot["loss"](output, batch["x"])}

    def refused(graph, inputs):
        raise TypeError("Expected a number but got Add:")

    def doubled(graph, inputs):
        return lambda *given: [2 * out for out in graph(*given)]

    config = dataclasses.replace(CONFIG, steps=4)
    plain = run(tmp_path, "plain", Hot(), config=config)
    for backend, reason in ((refused, "Expected a number"), (doubled, "loss and gradient")):
        ways = {"network": [{"backend": "eager"}], "loss": [{"backend": backend}]}
        monkeypatch.setattr(
            surroundings,
            "ways_to_compile",
            lambda tiling, ways=ways: ways["network" if tiling else "loss"],
        )
        torch.compiler.reset()
        with pytest.warns(UserWarning, match=f"the loss of Hot runs uncompiled.*{reason}"):
            result = run(
                tmp_path, backend.__name__, Hot(), config=dataclasses.replace(config, compile=True)
            )
        rows = [json.loads(row) for row in (result.run_dir / "log.jsonl").read_text().splitlines()]
        (row,) = [row for row in rows if row["event"] == "compile"]
        assert row["parts"]["network"] == "compiled" and reason in row["parts"]["loss"]
        for name, value in weights(plain).items():
            torch.testing.assert_close(weights(result)[name], value, atol=1e-6, rtol=1e-5)


def test_a_background_writer_keeps_what_it_was_given_and_reports_failures(
    tmp_path: Path, monkeypatch
) -> None:
    tensor = torch.zeros(3)
    with checkpoints.Writer(background=True) as writer:
        writer.save(tmp_path, {"x": tensor}, {"step": 1}, keep_as=["best"])
        tensor += 1  # training goes on
        writer.wait()
        assert checkpoints.read(tmp_path / "best.safetensors")[0]["x"].sum() == 0
        writer.save(tmp_path, {"x": tensor}, {"step": 2})
        writer.wait()
        monkeypatch.setattr(checkpoints.os, "fsync", _disk_full)
        writer.save(tmp_path, {"x": tensor}, {"step": 3})
        with pytest.raises(checkpoints.DiskFull, match="free some space"):
            writer.wait()
    assert checkpoints.read(tmp_path / "latest.safetensors")[1]["step"] == 2


def _disk_full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- interruption and failure ---------------------------------------------------------------


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    class Interrupted(Line):
        def batch(self, step, generator):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            return super().batch(step, generator)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 4 of 10; .*to resume"):
        run(tmp_path, task=Interrupted())
    assert signal.getsignal(signal.SIGINT) is before
    task = Line()
    resumed = run(tmp_path, task=task)
    assert task.batches[0] == 4
    assert_same_bits(weights(resumed), weights(run(tmp_path, "whole")))


def test_non_finite_loss_stops_the_run_and_keeps_the_batch(tmp_path: Path) -> None:
    with pytest.raises(train.NonFiniteLoss, match="step 7: not finite: loss, error") as stopped:
        run(tmp_path, task=Line(poison_step=7))
    assert stopped.value.step == 7
    batch = load_file(stopped.value.path)
    assert batch["x"].isnan().sum() == 1 and batch["x"].shape == (4, 1, 8, 8)
    tensors, metadata = checkpoints.read(latest(tmp_path))
    assert metadata["step"] == 5 and all(t.isfinite().all() for t in tensors.values())


def test_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch) -> None:
    run(tmp_path, stop_at_step=5)
    before = latest(tmp_path).read_bytes()

    monkeypatch.setattr(checkpoints.os, "fsync", _disk_full)
    with pytest.raises(checkpoints.DiskFull, match="free some space and run again to resume"):
        run(tmp_path)
    monkeypatch.undo()
    assert latest(tmp_path).read_bytes() == before
    assert not latest(tmp_path).with_name("latest.tmp").exists()
    assert run(tmp_path).steps == 10


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), MemoryError()])
def test_out_of_memory_says_what_to_lower(tmp_path: Path, error: BaseException) -> None:
    class Huge(Line):
        def loss(self, batch, **_):
            raise error

    with pytest.raises(train.OutOfMemory, match="step 0 with batch_size 4 on cpu: lower batch"):
        run(tmp_path, task=Huge())


# --- the gate -------------------------------------------------------------------------------


def test_no_training_without_a_passing_receipt(tmp_path: Path) -> None:
    options = {"config": CONFIG, "run_dir": tmp_path / "run", "progress_bar": False}
    task = Line()
    with pytest.raises(gate.GateRefusal, match="no gate receipt"):
        fit(task, dataset(tmp_path / "none", passed=None), **options)
    (tmp_path / "failed").mkdir()
    failed = dataset(tmp_path / "failed", passed=False)
    with pytest.raises(gate.GateRefusal, match="empty"):
        fit(task, failed, **options)
    other = dataclasses.replace(gate.read_receipt(failed), dataset_hash="sha256:1", passed=True)
    with pytest.raises(gate.GateRefusal, match="other data"):
        fit(task, failed, receipt=other, **options)
    assert task.batches == [] and not (tmp_path / "run").exists()


def test_an_overridden_gate_is_stamped_on_everything(tmp_path: Path) -> None:
    failed = dataset(tmp_path, passed=False)
    result = fit(
        Line(), failed, config=CONFIG, run_dir=tmp_path / "r", allow_failed_gate=True,
        progress_bar=False,
    )  # fmt: skip
    assert result.gate_overridden
    for name in ("latest", "best", "previous"):
        metadata = checkpoints.read(latest(tmp_path, "r").with_name(f"{name}.safetensors"))[1]
        assert metadata["gate_overridden"] is True
    rows = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    assert rows and all(row["gate_overridden"] for row in rows)


def test_allowing_failure_stamps_nothing_when_the_gate_passed(tmp_path: Path) -> None:
    assert not run(tmp_path, allow_failed_gate=True).gate_overridden


# --- what is written ------------------------------------------------------------------------


def test_log_previews_and_snapshots(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, keep_every=4, preview_steps=(0, 6))
    result = run(tmp_path, config=config)
    folder = tmp_path / "run"
    assert [p.name for p in result.previews] == [f"step_{s:06d}.png" for s in (0, 6, 10)]
    assert {p.stem for p in (folder / "checkpoints").iterdir()} == {
        "latest", "previous", "best", "step_000004", "step_000008",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["event"] == "validation"] == [0, 5, 10]
    trained = [r for r in rows if r["event"] == "train"]
    assert trained == result.history and trained[-1]["step"] == 10
    assert {"loss", "error", "grad_norm", "lr", "samples_per_s"} <= trained[0].keys()
    assert result.samples_per_s > 0 and result.peak_memory_bytes > 0 and result.duration_s > 0
    assert checkpoints.read(folder / "checkpoints/step_000004.safetensors")[1]["step"] == 4
    assert not list(folder.rglob("*.tmp"))


def test_best_checkpoint_is_the_one_with_the_lowest_validation_loss(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0])

    class Scored(Line):
        def validation(self, model) -> dict[str, float]:
            return {"loss": next(losses)}

    result = run(tmp_path, task=Scored())
    assert (result.best_step, result.best_loss) == (5, 1.0)
    net = Net()
    metadata = train.load_weights(latest(tmp_path).with_name("best.safetensors"), net)
    assert metadata["step"] == 5
    assert not torch.equal(net.layers[0].weight, result.ema_model.layers[0].weight)


def test_training_learns_and_bf16_runs(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=80, log_every=10, cooldown_share=0.0)
    for name, precision in (("fp32", "fp32"), ("bf16", "bf16")):
        changed = dataclasses.replace(config, precision=precision)
        result = run(tmp_path, name, config=changed)
        assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
        assert result.validations[-1]["loss"] < 0.5 * result.validations[0]["loss"]


def test_learning_rate_warms_up_and_cools_down(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, log_every=1, warmup_steps=4, cooldown_share=0.5)
    rates = [row["lr"] for row in run(tmp_path, config=config).history]
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates == pytest.approx([0.01 * value for value in expected])


def test_ema_has_the_stated_width_and_forgets_the_start() -> None:
    # EDM2 gives these exponents for its standard widths
    assert train.ema_exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert train.ema_exponent(0.1) == pytest.approx(6.94, abs=0.01)
    gamma, n = train.ema_exponent(0.05), 4000
    profile = np.zeros(n)
    for t in range(1, n + 1):
        beta = (1 - 1 / t) ** (gamma + 1)
        profile *= beta
        profile[t - 1] += 1 - beta
    assert profile.sum() == pytest.approx(1.0)  # nothing is left of the initial weights
    t = np.arange(1, n + 1) / n
    mean = (profile * t).sum()
    assert np.sqrt((profile * (t - mean) ** 2).sum()) == pytest.approx(0.05, rel=0.02)


def test_ema_follows_the_weights_and_copies_buffers(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.ema_model.calls == result.model.calls == 10
    ours, theirs = result.ema_model.layers[0].weight, result.model.layers[0].weight
    start = Line().model.layers[0].weight
    assert 0 < (ours - theirs).abs().max() < (start - theirs).abs().max()
    assert not any(p.requires_grad for p in result.ema_model.parameters())


def test_nonsense_configurations_are_refused() -> None:
    for bad, message in (
        ({"steps": 0}, "steps: got 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"precision": "fp16"}, "precision: got 'fp16'"),
        ({"ema_std": 0.5}, "ema_std"),
        ({"cooldown_share": 2.0}, "cooldown_share"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**bad)


def test_device_mismatch_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: got meta, the task's model is on cpu"):
        run(tmp_path, device="meta")


def test_compiled_code_is_kept_where_the_next_run_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for before in (None, default_cache_dir()):
        if before is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        surroundings.keep_compiled_code()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "fresnel" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    surroundings.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
