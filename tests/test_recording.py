"""CUDA graphs: what can be tested without a GPU, and that a GPU's recorded steps change nothing."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_cvs import views

from fresnel.data.memory import Images
from fresnel.scene.cameras import Cameras, orbit
from fresnel.study import arms
from fresnel.training.cuda_graphs import Recorded, Recorder, put_together, taken_apart
from fresnel.training.step import Stepper
from fresnel.training.task import TrainConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def test_nested_values_are_taken_apart_and_put_together() -> None:
    cameras = orbit(
        torch.zeros(2), torch.zeros(2), 2.0, pivot=(0.0, 0.0, 0.0), focal_px=9.0, width=8, height=8
    )
    given = {"a": (torch.ones(2), 3, None), "b": [cameras, {"c": torch.zeros(1)}]}
    tensors, left = taken_apart(given)
    assert len(tensors) == 4
    again = put_together([t + 1 for t in tensors], left)
    assert again["a"][1:] == (3, None) and torch.equal(again["a"][0], torch.full((2,), 2.0))
    assert isinstance(again["b"][0], Cameras) and again["b"][0].width == 8
    assert torch.equal(again["b"][0].Ks, cameras.Ks + 1)


def test_a_recorded_part_gives_what_the_function_gives(monkeypatch) -> None:
    """With a recorder that only calls the module: the bookkeeping around it."""
    recordings: list[Any] = []
    monkeypatch.setattr(
        torch.cuda,
        "make_graphed_callables",
        lambda module, samples, *_, **__: (recordings.append(module), module(*samples)),
    )
    layer = torch.nn.Linear(3, 2)

    def function(model, batch, *, factor):
        return {"out": model(batch["x"]) * factor, "same": batch["x"]}

    recorded = Recorded(function, layer)
    for _ in range(5):
        x = torch.randn(4, 3)
        got, want = recorded(layer, {"x": x}, factor=2.0), function(layer, {"x": x}, factor=2.0)
        assert torch.equal(got["out"], want["out"]) and got["out"].requires_grad
        assert torch.equal(got["same"], x) and not got["same"].requires_grad
    assert len(recordings) == 1
    other = torch.randn(7, 3)  # another shape runs as it is
    monkeypatch.setattr(recorded.flat, "forward", None)
    assert recorded(layer, {"x": other}, factor=2.0)["out"].shape == (7, 2)
    with torch.no_grad():
        assert not recorded(layer, {"x": x}, factor=2.0)["out"].requires_grad


@pytest.mark.parametrize("refusals", [1, 99])
def test_a_spoilt_recording_is_tried_again_and_what_cannot_be_recorded_runs(
    monkeypatch, refusals: int
) -> None:
    tries: list[int] = []

    def refuse(module=None, samples=(), **_):
        tries.append(1)
        if len(tries) <= refusals:
            raise RuntimeError("operation not permitted when stream is capturing")
        return module(*samples)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    part, never = Recorded(lambda x: x * 2), refusals > 1
    with pytest.warns(UserWarning, match="runs unrecorded") if never else nullcontext():
        assert [part(torch.ones(1)).item() for _ in range(13)] == [2] * 13
    assert (part.refused is not None) == (part.flat is None) == never
    assert len(tries) == (3 if never else 2)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", refuse)
    if never:
        recorder, calls = Recorder(torch.Generator()), []
        with pytest.warns(UserWarning, match="steps run unrecorded.*not permitted"):
            for _ in range(6):
                recorder.run("a", lambda: calls.append(1))
        assert len(calls) == 6 and recorder.refused


def test_images_stay_on_the_host_where_a_device_has_no_room() -> None:
    data = views(objects=3, depth=True)
    all_there = Images(data, "cpu", depth=True)
    sizes = [x.nbytes for x in all_there.stored.values()]
    for room, left in ((sum(sizes), 0), (sum(sizes) - 1, sizes[-1]), (0, sum(sizes))):
        images = Images(data, "cpu", depth=True, room=room)
        assert images.on_host == left and images.room == room - sum(sizes) + left
    records, numbers = torch.tensor([2, 0]), torch.tensor([[0, 3], [4, 1]])
    found = all_there.pick(records, numbers)
    assert torch.equal(found["rgba"][1, 0, ..., :3], data.rgb[0, 3])
    assert torch.equal(found["rgba"][0, 0, ..., 3], data.inputs.alpha[2])
    assert torch.equal(found["depth"][0, 1], data.depth[2, 2])


@needs_gpu
def test_a_gpu_reads_the_same_batches_from_the_host() -> None:
    """In recorded steps, too."""
    losses = []
    for room in (None, 0):
        task = arms.make_task(
            "cvs-refine", "tiny", views(objects=4), batch_size=4, seed=0, device="cuda",
            ground_truth=True, renderer=arms.renderer("cvs-refine", "cuda"), room=room,
        )  # fmt: skip
        images, _, renders = task._sets[0]
        assert (images.on_host > 0) == (room == 0)
        assert all(x.is_cuda for x in (*images.stored.values(), renders))
        stepper = Stepper(task, TrainConfig(steps=8))
        for step in range(8):
            stepper.train(step)
            losses.append(stepper.take_terms()["loss"])
        assert stepper.recorder is not None and stepper.recorder.refused is None
    assert losses[:8] == pytest.approx(losses[8:], rel=1e-3)


ARMS: dict[str, dict[str, Any]] = {
    "consistency": {},
    "any input": {"ground_truth": True},
    "original": {"loss_mask": "depth_laplacian", "parameterisation": "original", "augment": False},
    "regression": {"parameterisation": "regression"},
    "some pairs": {"pairs": torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1]])},
    "render": {"model": "cvs-refine", "ground_truth": True},
    "refine": {"model": "cvs-refine"},
    "twin": {"model": "cvs-warp"},
    "decoder": {"model": "decoder", "ground_truth": True},
    "frontal": {"model": "decoder-frontal"},
}


@needs_gpu
@pytest.mark.parametrize("arm", ARMS)
def test_recorded_steps_are_the_steps(arm: str) -> None:
    options = {"model": "cvs", **ARMS[arm]}
    data = views(objects=4, depth=True)
    options["renderer"] = arms.renderer(options["model"], "cuda")
    runs = []
    for graphs in (False, True):
        task = arms.make_task(
            size="tiny", data=data, batch_size=4, seed=0, device="cuda", **options
        )
        stepper = Stepper(task, TrainConfig(steps=24, lr=1e-3, graphs=graphs))
        losses = []
        for step in range(24):
            stepper.train(step)
            losses.append(stepper.take_terms()["loss"])
        assert bool(stepper.recorder) == (graphs and "decoder" not in options["model"])
        if stepper.recorder:
            assert stepper.recorder.refused is None and stepper.recorder.graphs
        elif graphs:
            assert all(part.refused is None for part in task.hot.values())
            assert stepper.mover.refused is None and stepper.mover.graphs
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=2e-2)
    assert runs[1][5:] != runs[1][4:-1]  # each recorded step has its own draws
