"""VGG16, LPIPS and the patch discriminator as PyTorch has them, under the keys that their published weights have."""

from __future__ import annotations

import torch
from torch import nn

FEATURES = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
TAPS = (3, 8, 15, 22, 29)


def vgg16() -> nn.Module:
    """torchvision's `vgg16().features`, below "features." as in its state."""
    layers: list[nn.Module] = []
    channels = 3
    for features in FEATURES:
        if isinstance(features, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU()]
            channels = features
    return nn.ModuleDict({"features": nn.Sequential(*layers)})


class TorchLPIPS(nn.Module):
    """lpips.LPIPS(net="vgg") in evaluation (richzhang/PerceptualSimilarity, lpips/lpips.py)."""

    def __init__(self, vgg: nn.Module, weights: list[torch.Tensor]):
        super().__init__()
        self.net, self.weights = vgg["features"], weights
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def taps(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, found = (x - self.shift) / self.scale, []
        for number, layer in enumerate(self.net):
            x = layer(x)
            if number in TAPS:
                found.append(x)
        return found

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(len(x), 1, 1, 1)
        for a, b, weight in zip(self.taps(x), self.taps(y), self.weights, strict=True):
            a, b = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (a, b))
            total = total + ((a - b).square() * weight).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total


class TorchDiscriminator(nn.Module):
    """CompVis/taming-transformers, taming/modules/discriminator/model.py, with batch normalisation."""

    def __init__(self, layers: int):
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = 64
        for i in range(1, layers + 1):
            new = 64 * min(2**i, 8)
            modules += [nn.Conv2d(width, new, 4, 2 if i < layers else 1, 1, bias=False), nn.BatchNorm2d(new)]
            modules += [nn.LeakyReLU(0.2)]
            width = new
        self.main = nn.Sequential(*modules, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x)
