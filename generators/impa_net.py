"""The networks of IMPA: an image-to-image generator steered by a style vector, and what makes styles.

Palma et al. 2025, "Predicting cell morphological responses to perturbations using generative modeling", Nat. Commun.,
after StarGAN v2 (Choi et al. 2020). Tensor names follow the released checkpoints. Every normalisation is instance
normalisation without running statistics, so training and evaluation mode agree.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.2


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU, slope 0.2."""
    return F.leaky_relu(x, SLOPE)


class DownBlock(nn.Module):
    """Pre-activation residual block, halving height and width when `pool`. (B, inputs, H, W) -> (B, outputs, ...)."""

    def __init__(self, inputs: int, outputs: int, *, normalise: bool, pool: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm1 = nn.InstanceNorm2d(inputs, affine=True) if normalise else nn.Identity()
        self.norm2 = nn.InstanceNorm2d(inputs, affine=True) if normalise else nn.Identity()
        self.conv1x1 = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.pool = nn.AvgPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.conv1(activate(self.norm1(x))))
        h = self.conv2(activate(self.norm2(h)))
        out: Tensor = (self.pool(self.conv1x1(x)) + h) / math.sqrt(2)
        return out


class AdaIN(nn.Module):
    """Instance normalisation whose gain and bias come from the style; without a style, the normalisation alone."""

    def __init__(self, style: int, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(style, 2 * width)

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        x = F.instance_norm(x)
        if style is None:
            return x
        gain, bias = self.fc(style)[:, :, None, None].chunk(2, 1)
        out: Tensor = (1 + gain) * x + bias
        return out


class UpBlock(nn.Module):
    """Residual block with adaptive normalisation, doubling height and width when `enlarge`."""

    def __init__(self, inputs: int, outputs: int, style: int, *, enlarge: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm1 = AdaIN(style, inputs)
        self.norm2 = AdaIN(style, outputs)
        self.conv1x1 = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        self.enlarge = nn.Upsample(scale_factor=2, mode="nearest") if enlarge else nn.Identity()

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        h = self.conv1(self.enlarge(activate(self.norm1(x, style))))
        h = self.conv2(activate(self.norm2(h, style)))
        out: Tensor = (self.conv1x1(self.enlarge(x)) + h) / math.sqrt(2)
        return out


class StyleGenerator(nn.Module):
    """Draws an image again in another style. Fully convolutional: sides are multiples of 2^levels.

    widths: channels in front of the first encoder block and after each of them; the last two blocks do not pool, and
    the decoder is the mirror. style: length of the style vector.
    """

    def __init__(self, channels: int, widths: list[int], style: int) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.levels = len(pairs) - 2
        self.from_rgb = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.encode = nn.ModuleList(
            DownBlock(a, b, normalise=True, pool=i < self.levels) for i, (a, b) in enumerate(pairs)
        )
        self.decode = nn.ModuleList(UpBlock(b, a, style, enlarge=i >= 2) for i, (a, b) in enumerate(reversed(pairs)))
        self.to_rgb = nn.Sequential(
            nn.InstanceNorm2d(widths[0], affine=True), nn.LeakyReLU(SLOPE), nn.Conv2d(widths[0], channels, 1)
        )

    def encoded(self, x: Tensor) -> Tensor:
        """The code of images (B, C, H, W): (B, widths[-1], H / 2^levels, W / 2^levels)."""
        x = self.from_rgb(x)
        for block in self.encode:
            x = block(x)
        return x

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        """(B, C, H, W) in [-1, 1] and styles (B, style), or None for the plain normalisation -> (B, C, H, W),
        about [-1, 1], not limited to it."""
        x = self.encoded(x)
        for block in self.decode:
            x = block(x, style)
        out: Tensor = self.to_rgb(x)
        return out


class StyleEncoder(nn.Module):
    """The style of an image: (B, C, side, side) -> (B, style). `widths` as in `StyleGenerator`, every block pools.

    kernel: side of the map that the blocks leave, of which the last convolution makes one value a channel.
    """

    def __init__(self, channels: int, widths: list[int], style: int, kernel: int) -> None:
        super().__init__()
        pairs = pairwise(widths)
        blocks = [DownBlock(a, b, normalise=False, pool=True) for a, b in pairs]
        self.kernel, self.levels = kernel, len(blocks)
        last = nn.Conv2d(widths[-1], widths[-1], kernel)
        trunk = [nn.Conv2d(channels, widths[0], 3, padding=1), *blocks, nn.LeakyReLU(SLOPE), last, nn.LeakyReLU(SLOPE)]
        self.conv = nn.Sequential(*trunk)
        self.linear = nn.Linear(widths[-1], style)

    def forward(self, x: Tensor) -> Tensor:
        sides = [side >> self.levels for side in x.shape[-2:]]
        if sides != [self.kernel] * 2:
            low, high = self.kernel << self.levels, (self.kernel + 1 << self.levels) - 1
            raise ValueError(
                f"this style encoder reads images of {low} to {high} px a side, these are {x.shape[-2]} x {x.shape[-1]}"
            )
        out: Tensor = self.linear(self.conv(x).flatten(1))
        return out


class StyleMapping(nn.Module):
    """[embedding of the perturbation, noise] -> style: linear layers with ReLU between."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, embedding: Tensor, z: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cat([embedding, z], 1))
        return out


class IMPANet(nn.Module):
    """The networks of a prediction: `generator`, one `mapping_network` per modality, perhaps `style_encoder`.

    z: length of the noise that each mapping takes after the embedding.
    """

    def __init__(
        self, generator: StyleGenerator, mappings: list[StyleMapping], encoder: StyleEncoder | None, z: int
    ) -> None:
        super().__init__()
        self.generator = generator
        self.mapping_network = nn.ModuleList(mappings)
        self.style_encoder = encoder
        self.z = z
