"""The U-Net of CellFlux: residual blocks steered by time and condition, attention, skips (Dhariwal & Nichol 2021).

Names, order and shapes of the parameters are those of CellFlux's files, so that weights, and averages stored by
position, can be exchanged with them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Groups of every normalisation in CellFlux's networks; all widths are multiples.
GROUPS = 32


@dataclass(frozen=True)
class AdmConfig:
    """Shape of the network.

    width: base width; the time vector has 4 * width. mult: width of each level over `width`. blocks: residual blocks a
    level. attention: downsampling factors (1, 2, 4, ...) with attention. condition: D of an embedding. groups: of the
    normalisations; small networks need fewer than 32, because a group of one channel loses how bright an image is.
    The defaults are the three published networks but for channels and condition. Raises ValueError.
    """

    channels: int = 3
    condition: int = 1024
    width: int = 128
    mult: tuple[int, ...] = (2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (2,)
    dropout: float = 0.3
    groups: int = GROUPS

    def __post_init__(self) -> None:
        if min(self.channels, self.condition, self.width, self.blocks, self.groups, *self.mult, len(self.mult)) < 1:
            raise ValueError(f"{self}: every size is at least 1")
        for mult in self.mult:
            if mult * self.width % self.groups:
                raise ValueError(
                    f"width {self.width} times {mult} is no multiple of {self.groups} (group normalisation)"
                )
        scales = [2**level for level in range(len(self.mult))]
        if wrong := [a for a in self.attention if a not in scales]:
            raise ValueError(f"attention at {wrong[0]}: this network has the factors {scales}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: at least 0, below 1")

    @property
    def size_multiple(self) -> int:
        """H and W are multiples of it."""
        return int(2 ** (len(self.mult) - 1))


class Norm(nn.GroupNorm):
    """GroupNorm computed in float32 whatever comes in; the result has the input's type."""

    def __init__(self, width: int, groups: int = GROUPS) -> None:
        super().__init__(groups, width)

    def forward(self, input: Tensor) -> Tensor:
        """(B, W, ...) -> the same shape and type."""
        out = F.group_norm(input.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return out.to(input.dtype)


def zeroed(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a block that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    """(B, inputs, H, W), e (B, E) -> (B, outputs, H, W): two convolutions; e scales and shifts the second norm."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, groups: int = GROUPS) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(Norm(inputs, groups), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outputs))
        self.out_layers = nn.Sequential(
            Norm(outputs, groups), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.in_layers(x)
        scale, shift = self.emb_layers(e).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        norm, *rest = self.out_layers
        h = norm(h) * (1 + scale) + shift
        for layer in rest:
            h = layer(h)
        out: Tensor = self.skip_connection(x) + h
        return out


class Attention(nn.Module):
    """Self-attention over all pixels, one head; (B, W, H, W) -> the same shape."""

    def __init__(self, width: int, groups: int = GROUPS) -> None:
        super().__init__()
        self.norm = Norm(width, groups)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = zeroed(nn.Conv1d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        q, k, v = self.qkv(self.norm(tokens)).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        out: Tensor = (tokens + self.proj_out(mixed)).view_as(x)
        return out


class Downsample(nn.Module):
    """Mean of 2 x 2 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Nearest neighbour, twice the side."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Stage(nn.ModuleList):
    """Modules in a row; residual blocks also get e."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        for module in self:
            x = module(x, e) if isinstance(module, ResBlock) else module(x)
        return x


class AdmNet(nn.Module):
    """Velocity v(x, t, c). A fresh one returns exactly 0 (its last convolution starts at zero)."""

    def __init__(self, config: AdmConfig) -> None:
        super().__init__()
        self.config = config
        c, embedding = config, 4 * config.width
        self.mol_embed_transform = nn.Linear(c.condition, embedding)
        self.time_embed = nn.Sequential(nn.Linear(c.width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

        def block(inputs: int, outputs: int, level: int) -> Stage:
            stage = Stage([ResBlock(inputs, outputs, embedding, c.dropout, c.groups)])
            if 2**level in c.attention:
                stage.append(Attention(outputs, c.groups))
            return stage

        widths = [mult * c.width for mult in c.mult]
        now = widths[0]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(c.channels, now, 3, padding=1)])])
        skips = [now]
        for level, width in enumerate(widths):
            for _ in range(c.blocks):
                self.input_blocks.append(block(now, width, level))
                now = width
                skips.append(now)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage([Downsample()]))
                skips.append(now)
        self.middle_block = Stage(
            [
                ResBlock(now, now, embedding, c.dropout, c.groups),
                Attention(now, c.groups),
                ResBlock(now, now, embedding, c.dropout, c.groups),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for last in [False] * c.blocks + [True]:
                stage = block(now + skips.pop(), widths[level], level)
                now = widths[level]
                if last and level:
                    stage.append(Upsample())
                self.output_blocks.append(stage)
        self.out = nn.Sequential(Norm(now, c.groups), nn.SiLU(), zeroed(nn.Conv2d(now, c.channels, 3, padding=1)))

    def embedding(self, t: Tensor, condition: Tensor | None, drop: Tensor | None = None) -> Tensor:
        """The vector e (B, 4 width) that steers every block, in float32.

        In bfloat16 the last times of the EDM grid would be one: so never under autocast.
        """
        with torch.autocast(t.device.type, enabled=False):
            e: Tensor = self.time_embed(sinusoid(t.float(), self.config.width))
            if condition is not None:
                term = self.mol_embed_transform(condition.float())
                # The whole term goes, its bias too: no condition is not the condition zero.
                e = e + (term if drop is None else term.masked_fill(drop[:, None], 0.0))
            return e

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """Velocity (B, C, H, W).

        x: (B, C, H, W). t: scalar or (B,), 0 to 1. condition: (B, D) or None. drop: bool (B,), True = no condition.
        """
        e = self.embedding(t.expand(len(x)), condition, drop)
        skips = []
        for stage in self.input_blocks:
            x = stage(x, e)
            skips.append(x)
        x = self.middle_block(x, e)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), e)
        out: Tensor = self.out(x)
        return out


def sinusoid(t: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): cosines, then sines, of t * 10000^(-k / half); t as it is, not times 1000."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None] * frequency
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, width % 2))


def infer_config(shapes: Mapping[str, tuple[int, ...]], groups: int = GROUPS, dropout: float = 0.3) -> AdmConfig:
    """The configuration from the shapes of a state dict. Raises ValueError naming the key that does not fit.

    groups, dropout: shapes do not tell them. Nor the number of heads: one, as in every published network.
    """

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in shapes:
            raise ValueError(f"{key} is missing")
        if len(shapes[key]) != dims:
            raise ValueError(f"{key} has {len(shapes[key])} axes, wanted {dims}")
        return shapes[key]

    width = shape("time_embed.0.weight", 2)[1]
    condition = shape("mol_embed_transform.weight", 2)[1]
    first, channels = shape("input_blocks.0.0.weight", 4)[:2]
    for key, what in (("label_emb.weight", "class labels"), ("input_blocks.0.0.in_layers.0.weight", "residual input")):
        if key in shapes:
            raise ValueError(f"{key}: a network with {what}, which CellFlux does not have")
    if odd := [key for key in shapes if key.endswith((".op.weight", ".conv.weight"))]:
        raise ValueError(f"{odd[0]}: a network with learned resampling (conv_resample), which CellFlux does not have")
    # No more than five digits: a number from a strange file must not size a loop.
    indices = {int(match[1]) for key in shapes if (match := re.match(r"input_blocks\.(\d{1,5})\.", key))}
    gaps = sorted(set(range(max(indices))) - indices)
    levels = len(gaps) + 1
    blocks = gaps[0] - 1 if gaps else max(indices)
    if blocks < 1 or indices | set(gaps) != set(range(levels * (blocks + 1))) or any(g % (blocks + 1) for g in gaps):
        raise ValueError(f"input_blocks has the numbers {sorted(indices)}: not a whole network of this kind")
    mult, attention = [], []
    for level in range(levels):
        key = f"input_blocks.{level * (blocks + 1) + 1}"
        wide = shape(f"{key}.0.out_layers.3.weight", 4)[0]
        if wide % width:
            raise ValueError(f"{key}.0.out_layers.3.weight: width {wide} is no multiple of {width}")
        mult.append(wide // width)
        if f"{key}.1.qkv.weight" in shapes:
            attention.append(2**level)
    if first != mult[0] * width:
        raise ValueError(f"input_blocks.0.0.weight: width {first}, wanted {mult[0] * width}")
    return AdmConfig(channels, condition, width, tuple(mult), blocks, tuple(attention), dropout, groups)
