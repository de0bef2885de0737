"""What a pre-training step sees: its settings, and the images and chances that follow from seed and step alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from generators.base import uniform
from generators.pairs import Pairs, read_rows


@dataclass(frozen=True)
class Settings:
    """What decides a run. The defaults are those of CellFlux's published training, for a batch of one process.

    batch: images a step, over all processes. rate: AdamW's learning rate, after `warmup` steps that rise to it; it
    falls to 0 in a straight line over the last `cooldown` (share) of `steps`. clip: of the gradient norm, 0 = none.
    ema: largest decay of the average, min(ema, (1 + n) / (10 + n)). drop: share of images without their compound.
    noise: share of images whose source is control + noise (source mode control_plus_noise), the others start at the
    control. skewed: times from t = 1 / (1 + exp(1.2 z - 1.2)), z normal (most between 0.5 and 0.95), else uniform.
    augment: flips and transposition, each with this probability, for control and treated image apart (pictures of
    cells have no upside).
    """

    steps: int = 10_000
    batch: int = 32
    rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 0
    cooldown: float = 0.0
    clip: float = 0.0
    ema: float = 0.999
    drop: float = 0.2
    noise: float = 0.5
    skewed: bool = True
    augment: float = 0.3
    seed: int = 0
    bfloat16: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("cooldown", "drop", "noise", "augment", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: between 0 and 1")
        for name in ("rate", "clip", "weight_decay", "warmup", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: a finite number, 0 or more")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        last = self.cooldown * self.steps
        return self.rate * rise * (min(1.0, (self.steps - step) / last) if last else 1.0)

    def decay_at(self, updates: int) -> float:
        """Decay of the average after so many updates."""
        return min(self.ema, (1 + updates) / (10 + updates))


class Drawn(NamedTuple):
    """A step's images and chances, on the CPU. Images float32 (B, C, H, W) in [0, 1]; the others (B, ...)."""

    treated: Tensor
    control: Tensor
    compounds: list[str]
    noise: Tensor
    noisy: Tensor
    t: Tensor
    drop: Tensor


class Draw:
    """step -> what it sees. A pure function of the pairs, the settings and the step."""

    def __init__(
        self, pairs: Pairs, settings: Settings, channels: int, size: tuple[int, int], dequantise: bool = False
    ) -> None:
        self.pairs, self.settings, self.channels, self.size = pairs, settings, channels, size
        self.dequantise = dequantise

    def __call__(self, step: int) -> Drawn:
        """Read the images of a step and draw its chances. Raises ImageError."""
        s = self.settings
        items, controls = self.pairs.draw(s.seed, step, s.batch)
        stream = torch.Generator().manual_seed(seed_of(s.seed, step))
        treated = read_rows(self.pairs.manifest, self.pairs.treated[items], self.channels, self.size)
        control = read_rows(self.pairs.manifest, controls, self.channels, self.size)
        treated, control = (turned(images, s.augment, stream) for images in (treated, control))
        if self.dequantise:
            treated, control = (
                images + uniform(images.shape, images.device, stream) / 255 for images in (treated, control)
            )
        z = torch.randn(s.batch, generator=stream)
        t = torch.rand(s.batch, generator=stream)
        if s.skewed:
            t = (1 / (1 + torch.exp(1.2 * z - 1.2))).clamp(1e-4, 1)
        return Drawn(
            treated, control, [self.pairs.compounds[item] for item in items],
            torch.randn(treated.shape, generator=stream), torch.rand(s.batch, generator=stream) < s.noise, t,
            torch.rand(s.batch, generator=stream) < s.drop,
        )  # fmt: skip


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def turned(images: Tensor, probability: float, stream: torch.Generator) -> Tensor:
    """Images (B, C, H, W) flipped up-down, left-right and, where square, transposed, each with this probability."""
    chance = torch.rand(3, len(images), generator=stream) < probability
    for change, axes in zip(chance, ("rows", "columns", "both"), strict=True):
        if axes == "both" and images.shape[2] != images.shape[3]:
            continue
        other = images.mT if axes == "both" else images.flip(2 if axes == "rows" else 3)
        images = torch.where(change[:, None, None, None], other, images)
    return images
