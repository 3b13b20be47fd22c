from types import SimpleNamespace

import pytest
import torch

from fresnel.models.unet import FourierEmbedding, GroupNorm, SelfAttention, UNet, _scaled


def small(*, trained: bool = False, embedding_dim: int = 0, **changes) -> UNet:
    options = {"base_channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1}
    config = SimpleNamespace(**{**options, "attention_levels": (1,), "patch": 2, **changes})
    net = UNet(5, 3, config, embedding_dim=embedding_dim)
    if trained:  # residual branches and the head start at zero; open them
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d) and module.weight.abs().sum() == 0:
                module.reset_parameters()
    return net


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_shape_is_kept_at_any_allowed_resolution_and_magnitudes_stay_sane() -> None:
    for size in ((8, 8), (16, 12)):
        assert small()(torch.randn(2, 5, *size)).shape == (2, 3, *size)
    net = small(base_channels=32, channel_multipliers=(1, 2, 2), blocks_per_level=3, trained=True)
    assert 0.1 < net(torch.randn(4, 5, 16, 16)).std().item() < 3.0


def test_it_starts_at_zero_and_still_learns() -> None:
    net = small()
    out = net(torch.randn(2, 5, 8, 8))
    assert torch.equal(out, torch.zeros_like(out))
    (out - 1).square().mean().backward()
    assert net.head.weight.grad.abs().sum() > 0


def test_wrong_inputs_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"x: got 6 x 8 pixels, want both divisible by 4"):
        small()(torch.zeros(1, 5, 6, 8))
    for changes, message in (
        ({"attention_levels": (2,)}, r"attention_levels: got \(2,\), want levels in \[0, 1\]"),
        ({"patch": 0}, "'patch': 0}, want sizes of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)


def test_embedding_changes_the_output_and_gets_gradients() -> None:
    net = small(embedding_dim=6, trained=True)
    x, embedding = torch.randn(2, 5, 8, 8), torch.randn(2, 6, requires_grad=True)
    out = net(x, embedding)
    assert not torch.allclose(out, net(x, embedding + 1))
    out.sum().backward()
    assert embedding.grad is not None and embedding.grad.abs().max() > 0


def test_channels_last_gives_the_same_values() -> None:
    net, x, last = small(trained=True), torch.randn(2, 5, 16, 16), torch.channels_last
    expected = net(x)
    got = net.to(memory_format=last)(x.to(memory_format=last))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_attention_equals_the_textbook_formula() -> None:
    layer = SelfAttention(8, head_channels=4)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(1, 8, 3, 2)
    q, k, v = layer.qkv(layer.norm(x)).reshape(3, 2, 4, 6)  # which, head, channel, pixel
    weights = torch.softmax(q.transpose(-1, -2) @ k / 4**0.5, dim=-1)
    mixed = torch.einsum("hqk,hck->hcq", weights, v).reshape(1, 8, 3, 2)
    torch.testing.assert_close(layer(x), (x + layer.out(mixed)) * 0.5**0.5)


def test_fourier_embedding_has_unit_power_and_tells_values_apart() -> None:
    layer, features = FourierEmbedding(16), []
    layer.mlp[0].register_forward_pre_hook(lambda _, args: features.append(args[0]))
    out = layer(torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(features[0].square().mean(1), torch.ones(2))
    assert out.shape == (2, 16) and not torch.allclose(out[0], out[1])


def test_checkpointing_changes_no_bit_of_output_or_gradient() -> None:
    found, counts = [], []
    net = small(embedding_dim=6, trained=True)
    for net.checkpointing in (False, True):
        calls: list[int] = []
        hook = net.middle_in.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out = net(torch.ones(2, 5, 8, 8), torch.ones(2, 6))
        found.append([out, *torch.autograd.grad(out.square().sum(), net.parameters())])
        counts.append(len(calls))
        hook.remove()
    assert counts == [1, 2], "computed again on the way back"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_on_a_cpu_bf16_keeps_norms_in_float32_and_agrees_with_float32() -> None:
    net = small(base_channels=32, trained=True)
    x, seen = torch.randn(2, 5, 16, 16), []
    want = net(x)
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        got = net(x).float()
    assert set(seen) == {torch.float32}
    assert (got - want).norm() / want.norm() < 0.03
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(y.square().mean(), net.parameters())])
        for y in (got, want)
    )
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_a_compiled_norm_is_the_same_norm() -> None:
    norm = GroupNorm(4, 12)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = (3 * torch.randn(2, 12, 5, 6) + torch.arange(12)[:, None, None]).requires_grad_()
    # which way the compiler goes, without its minute of compiling
    traced = torch.compile(norm, backend="eager", fullgraph=True)
    weights, found = torch.randn(2, 12, 5, 6), []
    for run in (norm, traced):
        out = run(x)
        grads = torch.autograd.grad((weights * out).sum(), [x, norm.weight, norm.bias])
        found.append([out, *grads])
    assert out.dtype == torch.float32
    assert not torch.equal(found[0][0], found[1][0])  # another order of sums
    scaled = _scaled(x, *norm._per_channel(x))  # what a compiler makes of it for a GPU
    grads = torch.autograd.grad((weights * scaled).sum(), [x, norm.weight, norm.bias])
    for native, *ours in zip(found[0], found[1], [scaled, *grads], strict=True):
        for got in ours:
            torch.testing.assert_close(got, native, rtol=1e-4, atol=1e-5)


def test_a_modulated_norm_is_scaled_after_the_norm_and_before_the_silu() -> None:
    norm, x, modulation = GroupNorm(2, 8), torch.randn(2, 8, 5, 6), torch.randn(2, 16)
    scale, shift = modulation[:, :8, None, None], modulation[:, 8:, None, None]
    wanted = torch.nn.functional.silu(norm(x) * (1 + scale) + shift)
    torch.testing.assert_close(norm.activated(x, modulation), wanted)
    torch.testing.assert_close(norm.activated(x), torch.nn.functional.silu(norm(x)))
