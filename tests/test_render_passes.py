"""What lies under the CPU renderer: memory that is used again, helping threads, the cache on disk.

Whatever is kept alive must stay as it was, however often, deeply and concurrently one renders.
"""

import multiprocessing
import os
import runpy
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from test_render import IMAGES, gradients, leaves_of, make_cameras, make_scene
from torch import Tensor
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from fresnel.render import Views, cpu, render
from fresnel.render.kernels import tasks
from fresnel.scene.cameras import Cameras
from fresnel.scene.gaussians import Gaussians

SIZE = 40
FORK = multiprocessing.get_context("fork")


def leaves(seed: int, num: int = 60) -> list[Tensor]:
    return leaves_of(make_scene(seed, num=num, sizes=(0.02, 0.2)))


def images(tensors: list[Tensor], cameras: Cameras | None = None) -> Views:
    cameras = make_cameras(1, SIZE, SIZE) if cameras is None else cameras
    return render(Gaussians(*tensors), cameras, backend="cpu")


def loss(views: Views) -> Tensor:
    return (views.rgb**2).sum() + (views.alpha * views.depth).sum()


def fresh_gradients(seed: int, num: int = 60) -> list[Tensor]:
    tensors = leaves(seed, num)
    with torch.enable_grad():  # autograd turns it off while it calls hooks
        return list(grad(loss(images(tensors)), tensors))


def same(a: list[Tensor] | tuple[Tensor, ...], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def always_ask_for_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes of a test's size would otherwise be left to one thread."""
    monkeypatch.setattr(cpu, "_threads", lambda projections, pixels: 2)


def test_images_and_graphs_stay_as_they_were_while_others_are_rendered() -> None:
    """Twelve forward passes first, then their backward passes, out of order."""
    sets = [leaves(seed, num=20 + 10 * seed) for seed in range(12)]
    views = [images(tensors) for tensors in sets]
    kept = [getattr(view, name) for view in views for name in IMAGES]
    copies = [image.detach().clone() for image in kept]
    losses: list[Any] = [loss(view) for view in views]
    for seed in (*range(0, 12, 2), *range(1, 12, 2)):
        got, losses[seed] = grad(losses[seed], sets[seed]), None
        assert same(got, fresh_gradients(seed, num=20 + 10 * seed))
    assert same(kept, copies)


def test_a_retained_graph_can_be_used_again_and_again() -> None:
    tensors = leaves(1)
    value = loss(images(tensors))
    for other in range(2, 5):
        assert same(grad(value, tensors, retain_graph=True), fresh_gradients(1))
        fresh_gradients(other)
    assert same(grad(value, tensors), fresh_gradients(1))
    with pytest.raises(RuntimeError, match="second time"):
        grad(value, tensors)


def test_a_render_within_a_backward_pass() -> None:
    tensors, inner = leaves(3), []
    views = images(tensors)
    views.rgb.register_hook(lambda slope: inner.append(fresh_gradients(4)))
    assert same(grad(loss(views), tensors), fresh_gradients(3))
    assert same(inner[0], fresh_gradients(4))


def test_graphs_used_from_several_threads_at_once() -> None:
    want = {seed: fresh_gradients(seed) for seed in range(6)}

    def work(k: int) -> bool:
        tensors = leaves(k % 6)
        value = loss(images(tensors))
        twice = (grad(value, tensors, retain_graph=True) for _ in range(2))
        return all(same(found, want[k % 6]) for found in twice)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(120)))


def test_checkpointing_and_saving_elsewhere() -> None:
    """Autograd may render again, or hand back copies of what was saved."""
    tensors = leaves(5)
    again = checkpoint(lambda *t: loss(images(list(t))), *tensors, use_reentrant=False)
    assert same(grad(again, tensors), fresh_gradients(5))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        value = loss(images(tensors))
    fresh_gradients(6)
    assert same(grad(value, tensors), fresh_gradients(5))


def test_gradients_of_gradients_are_refused() -> None:
    tensors = leaves(7)
    (slope,) = grad(loss(images(tensors)), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("used", IMAGES)
@pytest.mark.parametrize("size", [(32, 32), (21, 19)])
def test_a_loss_on_one_image_alone(used: str, size: tuple[int, int]) -> None:
    """What the loss leaves out has no gradient, rather than one of zeros."""
    scene, cameras = make_scene(8, num=30, sizes=(0.02, 0.2)), make_cameras(2, *size)
    shapes = dict(zip(IMAGES, (3, 1, 1), strict=True))
    weights = {n: torch.zeros(2, size[1], size[0], k).double() for n, k in shapes.items()}
    weights[used] += 1.0
    _, want = gradients(scene, cameras, Views(**weights), "cpu")
    tensors = leaves_of(scene)
    assert same(grad(getattr(images(tensors, cameras), used).double().sum(), tensors), want)


def test_entries_that_do_not_fit_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaussians over the whole image have more entries than the first guess has room for."""
    scene = make_scene(9, num=30, sizes=(0.4, 4.0))
    found = []
    for room in (cpu.ROOM, 1000):
        monkeypatch.setattr(cpu, "ROOM", room)
        tensors = leaves_of(scene)
        views = images(tensors, make_cameras(2, 100, 70))
        capacity, total = views.rgb.grad_fn.entries  # type: ignore[union-attr]
        assert capacity == max(total, room * 2 * 30) and total > 8 * 2 * 30
        found.append([views.rgb, views.depth, *grad(loss(views), tensors)])
    assert same(*found)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_batches_are_the_scenes_one_by_one(batch: tuple[int, ...], backend: Any) -> None:
    scene, single = make_scene(10, batch=batch, num=15), make_cameras(2, 21, 19)
    poses = single.viewmats.expand(*batch, 2, 4, 4), single.Ks.expand(*batch, 2, 3, 3)
    backdrop = torch.rand(*batch, 2, 3, generator=torch.Generator().manual_seed(0))
    views = render(scene, Cameras(*poses, 21, 19), background=backdrop, backend=backend)
    assert views.rgb.shape == (*batch, 2, 19, 21, 3) and views.depth.shape[-1] == 1
    for b in np.ndindex(batch):
        alone = render(scene[b], single, background=backdrop[b], backend=backend)
        assert torch.equal(views.rgb[b], alone.rgb) and torch.equal(views.depth[b], alone.depth)


def test_no_views_have_gradients_of_zero() -> None:
    tensors = leaves(11)
    views = images(tensors, make_cameras(2, SIZE, SIZE)[:0])
    assert views.rgb.shape == (0, SIZE, SIZE, 3)
    assert all((g == 0).all() for g in grad(views.rgb.sum(), tensors))


@pytest.mark.parametrize("coefficients", [0, 4])
def test_what_is_left_in_reused_memory_does_not_matter(
    coefficients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Used(cpu.Pool):
        left = 0

        def take(self, size: int) -> np.ndarray:
            loan = super().take(size)
            loan.view(np.uint8)[:] = self.left
            return loan

    scene = make_scene(14, num=700, sizes=(0.005, 0.2), coefficients=coefficients)
    pool, results = Used(limit=1 << 30), []
    monkeypatch.setattr(cpu, "_pool", pool)
    for pool.left in (0, 255, 0x5A):
        tensors = leaves_of(scene)
        views = images(tensors, make_cameras(2, 100, 70))
        results.append([views.rgb, views.alpha, views.depth, *grad(loss(views), tensors)])
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_memory_that_is_let_go_is_used_again_up_to_a_limit() -> None:
    pool = cpu.Pool(limit=1 << 20)
    loans = [pool.take(size) for size in (1000, 1000, 30_000)]
    first, second, large = (loan.ctypes.data for loan in loans)
    assert first != second and first % 64 == second % 64 == large % 64 == 0
    while loans:
        loans.pop(0)
    loans = [pool.take(size) for size in (900, 30_000, 100, 1000)]
    assert [loan.ctypes.data for loan in loans[:3]] == [second, large, first], "the last, warm one"
    pool.limit = loans[1].nbytes + 1
    while loans:
        loans.pop()
    assert [memory.ctypes.data for memory in pool.idle.values()] == [second], "the longest idle go"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_has_helpers_of_its_own() -> None:
    want = images(leaves(13)).rgb.detach()
    queue = FORK.SimpleQueue()
    child = lambda: queue.put(torch.equal(images(leaves(13)).rgb, want))  # noqa: E731
    process = FORK.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and queue.get()


CALLEE = "from tasks import stage\n@stage\ndef number():\n    return 1\n"
CALLER = """
from callee import number
from tasks import kernel
@kernel
def twice(x):
    return 2 * number() * x
value = twice(1)
"""


def test_an_edited_callee_is_compiled_again(tmp_path: Path) -> None:
    """Numba looks at the caller's own file, which an update need not have touched."""
    shutil.copy(tasks.__file__, tmp_path)
    (tmp_path / "callee.py").write_text(CALLEE)
    (tmp_path / "caller.py").write_text(CALLER)

    def work(queue: Any) -> None:
        numba.config.CACHE_DIR = str(tmp_path / "cache")
        sys.path.insert(0, str(tmp_path))
        found = runpy.run_path(str(tmp_path / "caller.py"))
        queue.put([found["value"], sum(found["twice"].stats.cache_hits.values())])

    def answer() -> list[int]:
        """Of a process in which none of it is imported."""
        queue = FORK.SimpleQueue()
        process = FORK.Process(target=work, args=(queue,))
        process.start()
        process.join(60)
        return queue.get() if process.exitcode == 0 else []

    assert answer() == [2, 0]
    (tmp_path / "callee.py").write_text(CALLEE.replace("return 1", "return 3"))
    assert answer() == [6, 0]
    assert answer() == [6, 1]
    for file in (tmp_path / "cache").rglob("*.nb*"):  # as a full disk or a crash leaves them
        file.write_bytes(file.read_bytes()[:10])
    assert answer() == [6, 0]


def test_kernels_do_without_a_cache_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(function: object) -> None:
        raise RuntimeError("cannot cache function: no locator available for file")

    monkeypatch.setattr(tasks, "_Cache", refused)
    assert tasks.kernel(lambda x: x + 1)(2) == 3
